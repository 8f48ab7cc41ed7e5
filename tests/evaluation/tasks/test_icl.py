"""In-context learning: scores worked by hand, demonstrations, and what the result says."""

from __future__ import annotations

import math
from typing import Any

import pytest

from longmem.evaluation.asking import Answer, Prompt, Scored
from longmem.evaluation.tasks.icl import IclTask, calibrated, starts_label
from longmem.evaluation.tasks.icl_data import KINDS, IclSet, Labelled

WINDOW = 160


def made(name: str, texts: int = 40) -> IclSet:
    words, kind = ("old", "new", "dull", "fine", "long"), KINDS[name]
    made = [Labelled(f"{words[n % 5]} film {name} {n}", n * 7 % len(kind.labels)) for n in range(texts)]
    return IclSet(name, kind.labels, tuple(made[10:]), tuple(made[:10]), {"files": [name]}, *kind.words)


def task(tokenizer: Any, *names: str, **settings: Any) -> IclTask:
    wanted: dict[str, Any] = {"local_shots": (1, 8), "memory_shots": (0, 12), "seeds": 2, "limit": 3} | settings
    return IclTask([made(name) for name in names], tokenizer, **wanted)


@pytest.mark.parametrize(
    ("first", "label", "right"),
    [
        (" positive", "positive", True),
        (" pos", "positive", True),
        ("", "positive", False),
        (" ", "positive", False),  # empty once stripped, though every text begins with nothing
        (" Positive", "positive", False),
        ("positively", "positive", False),
        (" neg", "positive", False),
    ],
)
def test_the_first_token_must_be_a_prefix_of_the_label(first: str, label: str, right: bool) -> None:
    assert starts_label(first, label) is right


def test_calibration_divides_by_what_labels_get_for_nothing() -> None:
    # shares of two labels where there is nothing to judge: 0.8 to 0.2 and 0.6 to 0.4, on average 0.7 to 0.3
    free = [[math.log(0.08), math.log(0.02)], [math.log(0.3), math.log(0.2)]]
    found = calibrated([math.log(0.6), math.log(0.3)], free)
    assert [math.exp(value) for value in found] == pytest.approx([0.6 / 0.7, 0.3 / 0.3])
    assert calibrated([-1.0, -2.0], [[0.0, -2000.0]])[1] == pytest.approx(-2 - math.log(1e-300))


def test_an_answer_is_judged_in_three_ways(byte_tokenizer: Any) -> None:
    of_one = task(byte_tokenizer, "sst2")
    negative, positive = (
        next(e for e in of_one.examples() if made("sst2").test[e.item.text].label == n) for n in (0, 1)
    )
    begins = byte_tokenizer("p")["input_ids"][0]
    scored = Scored((math.log(0.2), math.log(0.1)), (False, False), begins)
    answer = Answer((scored, Scored((math.log(0.9), math.log(0.1)), (False, False), 0)))
    prompt = Prompt(((1,),))
    assert of_one.measure(negative, prompt, answer) == {"first_token": 0, "likelihood": 100, "calibrated": 0}
    assert of_one.measure(positive, prompt, answer) == {"first_token": 100, "likelihood": 0, "calibrated": 100}
