"""SQuAD: prompts and the scores of known answers; and demonstrations: which are drawn, and which fit the window."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longmem.errors import ConfigError, DataError
from longmem.evaluation.asking import Asker
from longmem.evaluation.tasks.squad import Asked, SquadTask, draw, f1_score, lay_out, normalise_answer, shown

ASKED = Asked(((1, 1, 1), (2, 2), (3, 3)), ((10, 10, 10), (11, 11), (12, 12)), [(7, 8)], new_tokens=2)


def asker(window: int, *, whole: bool = False, memory: int | None = None, tokenizer: Any = None) -> Asker:
    return Asker("it", "it", {}, None, memory, tokenizer=tokenizer, window=window, whole=whole)


# demonstrations


def test_a_draw_has_no_demonstration_twice_and_more_contain_fewer() -> None:
    near, far = draw("sst2", 3, 50, 20, 30)
    assert sorted(near + far) == list(range(50))
    assert draw("sst2", 3, 50, 4, 10) == (near[-4:], far[-10:])
    assert draw("sst2", 4, 50, 20, 30) != (near, far) != draw("mr", 3, 50, 20, 30)
    with pytest.raises(DataError, match=r"mr: 20 demonstrations .* 2,000 in memory need 2,020 .* there are 50"):
        draw("mr", 1, 50, 20, 2000)


@pytest.mark.parametrize(
    ("window", "whole", "local", "memory", "context"),
    [
        (12, False, 3, 0, (0, 1, 1, 1, 2, 2, 3, 3, 7, 8)),
        (
            11,
            False,
            2,
            0,
            (0, 2, 2, 3, 3, 7, 8),
        ),  # one token short of the farthest demonstration: it is gone as a whole
        (8, False, 1, 0, (0, 3, 3, 7, 8)),
        (6, False, 0, 0, (0, 7, 8)),
        (16, True, 3, 2, (0, 11, 11, 12, 12, 1, 1, 1, 2, 2, 3, 3, 7, 8)),  # those of memory in front
        (11, True, 2, 0, (0, 2, 2, 3, 3, 7, 8)),  # not even all of the window's fit
    ],
)
def test_demonstrations_are_kept_whole_from_the_right(
    window: int, whole: bool, local: int, memory: int, context: tuple[int, ...]
) -> None:
    laid = lay_out(ASKED, asker(window, whole=whole), (0,))
    assert laid == ((context,), local, memory, 0)


def test_every_query_fits_behind_the_demonstrations_and_loses_its_beginning_where_it_must() -> None:
    calibrating = ASKED._replace(queries=[(7, 8), (9, 9, 9, 9)])
    assert lay_out(calibrating, asker(13), (0,)).contexts == ((0, 2, 2, 3, 3, 7, 8), (0, 2, 2, 3, 3, 9, 9, 9, 9))
    assert lay_out(ASKED._replace(queries=[(5, 6, 7, 8)]), asker(5), (0,)) == (((0, 7, 8),), 0, 0, 2)
    with pytest.raises(ConfigError, match=r"window \(3\) has no room for a question beside 2 tokens"):
        lay_out(ASKED, asker(3), (0,))


# SQuAD


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The shape of the official files: two questions about each paragraph, answered by one person or by two."""
    for name, paragraphs in (("train", 5), ("dev", 1)):
        data = []
        for a in range(2):
            made = []
            for place in (f"{name[0]}{a}{p}" for p in range(paragraphs)):
                qas = [
                    {"id": f"{place}-0", "question": "Who came?", "answers": [{"text": f"Ada {place}"}]},
                    {"id": f"{place}-1", "question": f"Where is {place}?", "answers": [{"text": "the hill"}]},
                ]
                made.append({"context": f"The Ada {place}\n came to the  hill.", "qas": qas})
            data.append({"title": f"Article_{a}", "paragraphs": made})
        (tmp_path / f"{name}.json").write_text(json.dumps({"version": "1.1", "data": data}))
    return {"train": tmp_path / "train.json", "data": tmp_path / "dev.json"}


def task(files: dict[str, Path], tokenizer: Any, **settings: Any) -> SquadTask:
    wanted: dict[str, Any] = {"local_shots": 1, "memory_shots": (0, 4), "draws": 2, "limit": None} | settings
    made = SquadTask(**files, **wanted)
    made.begin([asker(2000, memory=200, tokenizer=tokenizer)])
    return made


def test_a_question_is_shown_with_its_answer_or_without(files: dict[str, Path], byte_tokenizer: Any) -> None:
    question = task(files, byte_tokenizer).asked.items[1]
    told = "Context: The Ada d00 came to the hill.\nQuestion: Where is d00?\nAnswer:"
    assert shown(question, answered=True) == f"{told} the hill\n\n"
    assert shown(question, answered=False) == told
    telling = question._replace(answers=("Answer: {hill}",))
    assert shown(telling, answered=True) == f"{told} Answer: {{hill}}\n\n"
    assert shown(telling, answered=False) == told


def test_demonstrations_show_no_passage_twice_and_none_that_is_asked(
    files: dict[str, Path], byte_tokenizer: Any
) -> None:
    made = task(files, byte_tokenizer)
    for seed in made.seeds:
        local, memory = made.shots(seed, 4)
        texts = [str(byte_tokenizer.decode(ids)) for ids in (*local, *memory)]
        assert len({text.splitlines()[0] for text in texts}) == 5
        assert all("Ada t" in text and text.endswith("\n\n") for text in texts)
        assert made.shots(seed, 0)[0] == local
    with pytest.raises(DataError, match=r"train.json: 1 demonstrations .* there are 10"):
        made.shots(1, 200)
    with pytest.raises(DataError, match=r"dev.json: 1 demonstrations .* there are 0"):
        task(files | {"train": files["data"]}, byte_tokenizer).examples()
    with pytest.raises(ConfigError, match=r"memory_shots \(none\)"):
        task(files, byte_tokenizer, memory_shots=())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Denver Broncos.", "denver broncos"),
        ("  a  man,\tAN ape\nand THE theatre ", "man ape and theatre"),
        ("the a an", ""),
        ("A-ha", "aha"),  # the hyphen goes before articles are looked for
        ("Café “Zürich”", "café “zürich”"),  # only ASCII punctuation is removed
    ],
)
def test_answers_are_normalised_as_published(text: str, expected: str) -> None:
    assert normalise_answer(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Denver", ["Denver Broncos"], 2 * 1 * 0.5 / 1.5),  # precision 1/1, recall 1/2
        ("in Denver in Colorado", ["in Colorado"], 2 * 0.5 * 1 / 1.5),  # 2 of 4 words, the second "in" has no partner
        ("cats and dogs", ["dogs", "cats and birds"], 2 / 3),  # the better one: 2 of 3 and 2 of 3
        ("red", ["blue"], 0.0),
        ("the", ["the"], 0.0),  # no shared word is left: 0, as published
    ],
)
def test_f1_counts_shared_words_and_takes_the_best_answer(prediction: str, answers: list[str], expected: float) -> None:
    assert f1_score(prediction, answers) == pytest.approx(expected)
