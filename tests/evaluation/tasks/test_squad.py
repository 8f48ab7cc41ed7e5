"""SQuAD: its files, the prompts, answers that are cut at the line end, and the scores of known answers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longmem import AlibiGPTForCausalLM, LongMem
from longmem.errors import ConfigError, DataError
from longmem.evaluation.asking import Asker, Prompt, askers
from longmem.evaluation.bootstrap import Bootstrap
from longmem.evaluation.runner import run_task
from longmem.evaluation.systems import Comparison
from longmem.evaluation.tasks.squad import TEMPLATE, SquadSettings, SquadTask, first_line, judged, shown
from longmem.evaluation.tasks.squad_data import SquadFile, SquadQuestion, read_squad

SETTINGS = SquadSettings(local_shots=1, memory_shots=(0, 4), seeds=2, limit=None, max_answer_tokens=8)


def squad(articles: int, paragraphs: int, name: str) -> dict[str, Any]:
    """The shape of the official files: two questions about each paragraph, answered by one person or by two."""
    data = []
    for a in range(articles):
        made = []
        for p in range(paragraphs):
            place = f"{name}{a}{p}"
            qas = [
                {"id": f"{place}-0", "question": "Who came?", "answers": [{"text": f"Ada {place}", "answer_start": 4}]},
                {
                    "id": f"{place}-1",
                    "question": f"Where is {place}?",
                    "answers": [{"text": "the hill", "answer_start": 9}, {"text": "hill", "answer_start": 13}],
                },
            ]
            made.append({"context": f"The Ada {place}\n came to the  hill.", "qas": qas})
        data.append({"title": f"Article_{a}", "paragraphs": made})
    return {"version": "1.1", "data": data}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("squad")
    paths = folder / "train.json", folder / "dev.json"
    for path, content in zip(paths, (squad(2, 5, "t"), squad(2, 1, "d")), strict=True):
        path.write_text(json.dumps(content), encoding="utf-8")
    return paths


@pytest.fixture
def read(files: tuple[Path, Path]) -> tuple[SquadFile, SquadFile]:
    return read_squad(files[0]), read_squad(files[1])


def test_every_question_is_read_with_its_article_and_answers(read: tuple[SquadFile, SquadFile]) -> None:
    train, dev = read
    assert (len(train.questions), len(dev.questions)) == (20, 4)
    assert dev.questions[3] == SquadQuestion(
        "d10-1", "Article_1", "The Ada d10 came to the hill.", "Where is d10?", ("the hill", "hill")
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"dev.json: not JSON"),
        ("[]", r"dev.json: the file has no list 'data'"),
        ('{"data": []}', r"dev.json: no question in it"),
        ('{"data": [{"title": "a"}]}', r"dev.json: data\[0\] has no list 'paragraphs'"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', r"data\[0\].paragraphs\[0\] has no text 'context'"),
        (
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "1", "question": "q", "answers": []}]}]}]}',
            r"data\[0\].paragraphs\[0\].qas\[0\] has no answer; SQuAD v1.1 has one or more",
        ),
    ],
)
def test_a_file_of_another_form_is_named_with_the_place(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "dev.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_squad(tmp_path / "dev.json")
    with pytest.raises(DataError, match=r"nowhere.json: cannot be read"):
        read_squad(tmp_path / "nowhere.json")


def test_a_question_is_shown_with_its_answer_or_without(read: tuple[SquadFile, SquadFile]) -> None:
    question = read[1].questions[1]
    told = "Context: The Ada d00 came to the hill.\nQuestion: Where is d00?\nAnswer:"
    assert shown(question, answered=True) == f"{told} the hill\n\n"
    assert shown(question, answered=False) == told
    telling = replace(question, answers=("Answer: {hill}",))
    assert shown(telling, answered=True) == f"{told} Answer: {{hill}}\n\n"
    assert shown(telling, answered=False) == told
    assert TEMPLATE.format(passage="p", question="q", answer="a") == "Context: p\nQuestion: q\nAnswer: a\n\n"


def test_an_answer_ends_with_its_line_and_is_scored_as_published(read: tuple[SquadFile, SquadFile]) -> None:
    assert first_line(" the Hill.\n\nContext: more") == "the Hill."
    assert first_line("\nhill") == ""
    question = read[1].questions[1]  # the hill, hill
    assert judged(" The Hill.\nno", question) == {"exact_match": 100, "f1": 100}
    # one of three words: against "hill", precision 1/3 and recall 1
    assert judged(" the old green hill", question) == {"exact_match": 0, "f1": pytest.approx(100 * 2 / 3 / (4 / 3))}
    assert judged("", question) == {"exact_match": 0, "f1": 0}


def test_demonstrations_show_no_passage_twice_and_none_that_is_asked(
    read: tuple[SquadFile, SquadFile], byte_tokenizer: Any
) -> None:
    task = SquadTask(*read, byte_tokenizer, SETTINGS)
    for seed in task.seeds:
        shots = task._shots(seed, 4)
        texts = [str(byte_tokenizer.decode(ids)) for ids in (*shots.local, *shots.memory)]
        assert len({text.splitlines()[0] for text in texts}) == 5
        assert all("Ada t" in text and text.endswith("\n\n") for text in texts)
        assert task._shots(seed, 0).local == shots.local
    with pytest.raises(DataError, match=r"every passage in it is asked about in dev.json"):
        SquadTask(read[1], read[1], byte_tokenizer)
    with pytest.raises(DataError, match=r"train.json: 3 demonstrations .* there are 10"):
        SquadTask(*read, byte_tokenizer).examples()
    with pytest.raises(ConfigError, match=r"local_shots \(-1\).*memory_shots \(\).*limit \(0\)"):
        SquadSettings(local_shots=-1, memory_shots=(), limit=0)


@dataclasses.dataclass(frozen=True)
class Scripted(Asker):
    """A system that says ``the hill`` and then goes on, whatever it is asked."""

    prompts: list[Prompt] = dataclasses.field(default_factory=list)

    def generate(self, prompts: Sequence[Prompt], bank: Any = None) -> Iterator[tuple[int, list[int]]]:
        for number, prompt in reversed(list(enumerate(prompts))):
            self.prompts.append(prompt)
            yield number, self.tokenizer(" the hill\nQuestion: Who")["input_ids"]


def test_known_answers_give_known_scores_by_article(read: tuple[SquadFile, SquadFile], byte_tokenizer: Any) -> None:
    task = SquadTask(*read, byte_tokenizer, SETTINGS)
    asker = Scripted("backbone", "backbone", {}, None, byte_tokenizer, 240)
    result = task.summarise(run_task(task, [asker], bootstrap=Bootstrap(resamples=20)), [asker])
    # half of the questions ask where; "Ada d00" and "the hill" share no word
    assert [(group.group, group.examples, group.units) for group in result.groups] == [
        ("all", 16, 2),
        ("1 + 0", 8, 2),
        ("1 + 4", 8, 2),
    ]
    assert [group.score("backbone", "exact_match").value for group in result.groups] == [50, 50, 50]
    assert [group.score("backbone", "f1").value for group in result.groups] == [50, 50, 50]
    assert result.extra["by_article"]["1 + 4"]["backbone"]["f1"] == {"Article_0": 50, "Article_1": 50}
    assert result.extra["per_seed"]["1 + 0"]["backbone"]["exact_match"] == {"1": 50, "2": 50}
    assert result.extra["shots"]["1 + 4"]["backbone"] == {"window": 1, "memory": 0, "cut": 0}
    assert len(asker.prompts) == 2 * 4  # seeds, questions: demonstrations in memory change nothing for it
    asked = str(byte_tokenizer.decode(asker.prompts[-1].context))
    assert asked.count("Context:") == 2 and asked.endswith("\nQuestion: Who came?\nAnswer:")


def test_a_tiny_model_answers_with_and_without_memory(
    read: tuple[SquadFile, SquadFile], tiny_backbone: AlibiGPTForCausalLM, byte_tokenizer: Any
) -> None:
    torch.manual_seed(1)
    model = LongMem.from_backbone(tiny_backbone, chunk_size=4, num_retrieved=16, memory_size=512).eval()
    settings = dataclasses.replace(SETTINGS, seeds=1, limit=2)
    task = SquadTask(*read, byte_tokenizer, settings)
    found = askers(Comparison.of_longmem(model, [256]), byte_tokenizer, window=128, full_context=512)
    result = task.summarise(run_task(task, found, bootstrap=Bootstrap(resamples=20)), found)
    assert list(result.systems) == ["backbone", "memory_off", "memory_256", "full_512"]
    for example in result.examples:
        assert all(0 <= value <= 100 for values in example.values.values() for value in values.values())
        if example.group == "1 + 0":
            assert example.values["memory_256"] == example.values["memory_off"]
    # a demonstration has 76 to 81 bytes, a question 66 to 70; 8 tokens are kept for the answer
    shots = result.extra["shots"]["1 + 4"]
    assert [shots[name]["window"] for name in result.systems] == [0, 0, 0, 1]
    assert [shots[name]["memory"] for name in result.systems] == [0, 0, 3, 4]
    header = result.header.config
    assert header["train"]["questions"] == 20 and header["template"] == TEMPLATE
