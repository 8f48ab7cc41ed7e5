"""bAbI in book text: its files, where facts are hidden, and BABILong's rule for answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longmem import AlibiGPTForCausalLM, LongMem
from longmem.errors import DataError
from longmem.evaluation.asking import askers
from longmem.evaluation.systems import Comparison
from longmem.evaluation.task import run_task
from longmem.evaluation.tasks.babi import BabiTask, Story, answered, read_babi
from longmem.evaluation.tasks.needle import read_haystack

FILE = (
    "1 Ann went to the attic.\n2 Bob went to the barn.\n3 Where is Ann? \tattic\t1\n4 Ann went to the cave.\n"
    "5 Where is Ann? |cave|4\n1 Bob went to the attic.\n2 Where is Bob? \tattic\t1\n"
)


@pytest.fixture
def task(byte_tokenizer: Any, made_text: Callable[..., str], tmp_path: Path) -> BabiTask:
    for part in ("train", "test"):
        (tmp_path / f"qa1_single-supporting-fact_{part}.txt").write_text(FILE)
    (tmp_path / "book.txt").write_text(made_text(400))
    sets = read_babi(str(tmp_path), [1])
    haystack = read_haystack([str(tmp_path / "book.txt")], byte_tokenizer, 512, 32)
    return BabiTask(haystack, sets, byte_tokenizer, lengths=[128, 512], trials=3, shots=1, recall=2)


def test_a_story_has_all_facts_before_its_question(task: BabiTask) -> None:
    first, second, third = task.sets[0].test
    assert first == Story(("Ann went to the attic.", "Bob went to the barn."), "Where is Ann?", "attic")
    assert second.facts == (*first.facts, "Ann went to the cave.") and second.answer == "cave"
    assert third.facts == ("Bob went to the attic.",)
    assert task.sets[0].labels == ("attic", "cave")


def test_a_missing_task_is_named(task: BabiTask, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"qa2_\*_train.txt"):
        read_babi(str(tmp_path), [2])


def test_facts_stand_whole_and_in_order_in_a_text_of_the_length_asked_for(task: BabiTask, byte_tokenizer: Any) -> None:
    for example in task.examples():
        item = example.item
        text = byte_tokenizer.decode(item.trial.text(task.haystack))
        places = [text.index(fact) for fact in item.story.facts]
        assert places == sorted(places)
        assert len(item.trial.text(task.haystack)) == item.trial.length
        assert byte_tokenizer.decode(item.trial.options[0]) == f" {item.story.answer}"


def test_every_system_is_asked_and_recall_finds_the_facts(
    task: BabiTask, tiny_backbone: AlibiGPTForCausalLM, byte_tokenizer: Any
) -> None:
    torch.manual_seed(1)
    model = LongMem.from_backbone(tiny_backbone, chunk_size=4, num_retrieved=8, memory_size=1024).eval()
    asked = task.systems(askers(Comparison.of_longmem(model, [512]), byte_tokenizer, window=512, rows=4))
    again = next(asker for asker in asked if asker.name == "memory_512+recall")
    for example in task.examples():
        context = byte_tokenizer.decode(task.prompt(example, again).contexts[0])
        assert example.item.story.question.removesuffix("?") in context
        assert any(fact.split()[0] in context.split("Notes")[1] for fact in example.item.story.facts)
    result = run_task(task, asked, quiet=True)
    assert len(result["systems"]) == 5
    assert len(result["examples"]) == 6


def test_an_answer_names_the_right_label_alone() -> None:
    story, labels = Story((), "Where is Ann?", "attic"), ("attic", "cave", "Ann")
    assert answered(" The Attic. Not the cave.", story, labels)
    assert answered("Ann is in the attic", story, labels)
    assert not answered("the attic or the cave", story, labels)
    assert not answered("nowhere", story, labels)
