"""SQuAD: its files, the prompts, answers that are cut at the line end, and the scores of known answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from longmem.errors import ConfigError, DataError
from longmem.evaluation.tasks.squad import (
    SquadFile,
    SquadTask,
    f1_score,
    normalise_answer,
    read_squad,
    shown,
)


def squad(articles: int, paragraphs: int, name: str) -> dict[str, Any]:
    """The shape of the official files: two questions about each paragraph, answered by one person or by two."""
    data = []
    for a in range(articles):
        made = []
        for p in range(paragraphs):
            place = f"{name}{a}{p}"
            qas = [
                {"id": f"{place}-0", "question": "Who came?", "answers": [{"text": f"Ada {place}"}]},
                {
                    "id": f"{place}-1",
                    "question": f"Where is {place}?",
                    "answers": [{"text": "the hill"}, {"text": "hill"}],
                },
            ]
            made.append({"context": f"The Ada {place}\n came to the  hill.", "qas": qas})
        data.append({"title": f"Article_{a}", "paragraphs": made})
    return {"version": "1.1", "data": data}


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> tuple[SquadFile, SquadFile]:
    folder = tmp_path_factory.mktemp("squad")
    for name, content in (("train", squad(2, 5, "t")), ("dev", squad(2, 1, "d"))):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return read_squad(folder / "train.json"), read_squad(folder / "dev.json")


def task(read: tuple[SquadFile, SquadFile], tokenizer: Any, **settings: Any) -> SquadTask:
    wanted = {"local_shots": 1, "memory_shots": (0, 4), "seeds": 2, "limit": None, "max_answer_tokens": 8}
    return SquadTask(*read, tokenizer, **wanted | settings)


def test_a_question_is_shown_with_its_answer_or_without(read: tuple[SquadFile, SquadFile]) -> None:
    question = read[1].questions[1]
    told = "Context: The Ada d00 came to the hill.\nQuestion: Where is d00?\nAnswer:"
    assert shown(question, answered=True) == f"{told} the hill\n\n"
    assert shown(question, answered=False) == told
    telling = question._replace(answers=("Answer: {hill}",))
    assert shown(telling, answered=True) == f"{told} Answer: {{hill}}\n\n"
    assert shown(telling, answered=False) == told


def test_demonstrations_show_no_passage_twice_and_none_that_is_asked(
    read: tuple[SquadFile, SquadFile], byte_tokenizer: Any
) -> None:
    made = task(read, byte_tokenizer)
    for seed in made.seeds:
        shots = made.shots(seed, 4)
        texts = [str(byte_tokenizer.decode(ids)) for ids in (*shots.local, *shots.memory)]
        assert len({text.splitlines()[0] for text in texts}) == 5
        assert all("Ada t" in text and text.endswith("\n\n") for text in texts)
        assert made.shots(seed, 0).local == shots.local
    with pytest.raises(DataError, match=r"every passage in it is asked about in dev.json"):
        SquadTask(read[1], read[1], byte_tokenizer)
    with pytest.raises(DataError, match=r"train.json: 1 demonstrations .* there are 10"):
        task(read, byte_tokenizer, memory_shots=[200]).shots(1, 200)
    with pytest.raises(ConfigError, match=r"memory_shots \(none\)"):
        task(read, byte_tokenizer, memory_shots=())


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
