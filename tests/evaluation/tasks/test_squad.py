"""SQuAD: its files, the prompts, answers that are cut at the line end, and the scores of known answers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from longmem.errors import ConfigError, DataError
from longmem.evaluation.asking import Answer, Asker, Prompt
from longmem.evaluation.bootstrap import Bootstrap
from longmem.evaluation.task import run_task
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


@dataclasses.dataclass(frozen=True)
class Scripted(Asker):
    """A system that says ``the hill`` and then goes on, whatever it is asked."""

    prompts: list[Prompt] = dataclasses.field(default_factory=list)

    def ask(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        for number, prompt in reversed(list(enumerate(prompts))):
            self.prompts.append(prompt)
            yield number, Answer((), tuple(self.tokenizer(" the hill\nQuestion: Who")["input_ids"]))


def test_known_answers_give_known_scores_by_article(read: tuple[SquadFile, SquadFile], byte_tokenizer: Any) -> None:
    asker = Scripted("backbone", "backbone", {}, None, byte_tokenizer, 240)
    result = run_task(task(read, byte_tokenizer), [asker], bootstrap=Bootstrap(resamples=20))
    # half of the questions ask where; "Ada d00" and "the hill" share no word
    assert [(group["group"], group["examples"], group["units"]) for group in result["groups"]] == [
        ("all", 16, 2),
        ("1 + 0", 8, 2),
        ("1 + 4", 8, 2),
    ]
    assert {score["value"] for group in result["groups"] for score in group["scores"]} == {50}
    assert result["extra"]["by_article"]["1 + 4"]["backbone"]["f1"] == {"Article_0": 50, "Article_1": 50}
    assert result["extra"]["per_seed"]["1 + 0"]["backbone"]["exact_match"] == {"1": 50, "2": 50}
    assert result["extra"]["shots"]["1 + 4"]["backbone"] == {"window": 1, "memory": 0, "cut": 0}
    assert len(asker.prompts) == 2 * 4  # seeds, questions: demonstrations in memory change nothing for it
    asked = str(byte_tokenizer.decode(asker.prompts[-1].contexts[0]))
    assert asked.count("Context:") == 2 and asked.endswith("\nQuestion: Who came?\nAnswer:")


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
