"""Demonstrations: which are drawn, which fit the window, and how they become tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longmem.errors import ConfigError, DataError
from longmem.evaluation.asking import Asker
from longmem.evaluation.documents import start_tokens
from longmem.evaluation.task import Example
from longmem.evaluation.tasks.shots import LaidOut, Shots, ShotsTask, draw, encode_after, fitting


def asker(window: int, *, whole: bool = False, memory: int | None = None) -> Asker:
    return Asker("it", "it", {}, None, None, window, memory_size=memory, whole=whole)


SHOTS = Shots((0,), ((1, 1, 1), (2, 2), (3, 3)), ((10, 10, 10), (11, 11), (12, 12)))


def test_a_draw_has_no_demonstration_twice_and_more_contain_fewer() -> None:
    near, far = draw("sst2", 3, 50, 20, 30)
    assert sorted(near + far) == list(range(50))
    assert draw("sst2", 3, 50, 4, 10) == (near[-4:], far[-10:])
    assert draw("sst2", 4, 50, 20, 30) != (near, far) != draw("mr", 3, 50, 20, 30)
    with pytest.raises(DataError, match=r"mr: 20 demonstrations .* 2,000 in memory need 2,020 .* there are 50"):
        draw("mr", 1, 50, 20, 2000)


@pytest.mark.parametrize(
    ("window", "local", "before"),
    [
        (12, 3, (0, 1, 1, 1, 2, 2, 3, 3)),
        (11, 2, (0, 2, 2, 3, 3)),  # one token short of the farthest demonstration: it is gone as a whole
        (8, 1, (0, 3, 3)),
        (6, 0, (0,)),
    ],
)
def test_demonstrations_are_kept_whole_from_the_right(window: int, local: int, before: tuple[int, ...]) -> None:
    laid = SHOTS.lay_out(asker(window), (7, 8), after=2)
    assert (laid.before, laid.query, laid.local, laid.memory, laid.cut) == (before, (7, 8), local, 0, 0)


def test_a_full_context_has_demonstrations_of_memory_in_front() -> None:
    laid = SHOTS.lay_out(asker(14, whole=True), (7, 8), after=0)
    assert (laid.local, laid.memory) == (3, 2)
    assert laid.before == (0, 11, 11, 12, 12, 1, 1, 1, 2, 2, 3, 3)
    assert SHOTS.lay_out(asker(9, whole=True), (7, 8), after=0).memory == 0  # not even all of the window's fit
    assert SHOTS.remembered(asker(9, whole=True)) == SHOTS.remembered(asker(9)) == ()
    assert SHOTS.remembered(asker(9, memory=4)) == (0, 10, 10, 10, 11, 11, 12, 12)


def test_a_question_longer_than_the_window_loses_its_beginning() -> None:
    laid = SHOTS.lay_out(asker(4), (5, 6, 7, 8), after=1)
    assert (laid.before, laid.query, laid.local, laid.cut) == ((0,), (7, 8), 0, 2)
    with pytest.raises(ConfigError, match=r"window \(2\) has no room for a question beside 1 tokens"):
        SHOTS.lay_out(asker(2), (5,), after=1)


def test_what_each_system_sees_is_counted() -> None:
    askers = [replace(asker(12, memory=size), name=str(size)) for size in (4, 6, 8, None)]

    class OfOne(ShotsTask):
        settings = examples = prompt = measure = None  # type: ignore[assignment]

        def laid_out(self, example: Example, asker: Asker) -> tuple[Shots, LaidOut]:
            return SHOTS, SHOTS.lay_out(asker, (7, 8), after=2)

    task = OfOne()  # type: ignore[abstract]
    found = task.shots_seen([Example("e", "sst2, 4 + 3", "u", None)], askers)
    seen = found["sst2, 4 + 3"]
    assert {name: each["memory"] for name, each in seen.items()} == {"4": 2, "6": 2, "8": 3, "None": 0}
    assert {each["window"] for each in seen.values()} == {3} and seen["4"]["cut"] == 0
    assert list(task.notes({"extra": {"shots": found}})) == [
        "sst2, 4 + 3: 3 of 4 demonstrations fit the window, on average (4, 6, 8, None)",
        "sst2, 4 + 3: 2 of 3 are in memory, on average (4, 6)",
    ]
    assert fitting([], 5) == 0


def test_tokens_are_those_of_the_joined_text(byte_tokenizer: Any) -> None:
    assert encode_after(byte_tokenizer, ".", [" ab", ""]) == [tuple(byte_tokenizer(" ab")["input_ids"]), ()]
    assert start_tokens(byte_tokenizer) == ()
    # like Llama's: a space sign stands before every text, and so must be none where a text goes on
    vocabulary = {token: number for number, token in enumerate("▁ab.")}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    spaced = PreTrainedTokenizerFast(tokenizer_object=inner)
    assert spaced("ab")["input_ids"] == [0, 1, 2]
    assert encode_after(spaced, "a.", ["b", " a"]) == [(2,), (0, 1)]
