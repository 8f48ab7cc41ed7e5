"""Facts told in another conversation: what each system sees, and the numbers of hand-made answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longmem import AlibiGPTForCausalLM, LongMem
from longmem.evaluation.asking import Answer, Asker, Scored, askers
from longmem.evaluation.systems import Comparison
from longmem.evaluation.task import run_task
from longmem.evaluation.tasks.facts import IN_WINDOW, FactsTask, names
from longmem.evaluation.tasks.needle import read_haystack


@pytest.fixture
def task(byte_tokenizer: Any, made_text: Callable[..., str], tmp_path: Path) -> FactsTask:
    path = tmp_path / "text.txt"
    path.write_text(made_text(300))
    haystack = read_haystack([str(path)], byte_tokenizer, 256, 64)
    settings: dict[str, Any] = {"between": [64, 256], "sessions": 2, "facts": 2, "recall": 2, "new_tokens": 4}
    return FactsTask(haystack, byte_tokenizer, **settings)


@pytest.fixture
def systems(task: FactsTask, tiny_backbone: AlibiGPTForCausalLM, byte_tokenizer: Any) -> dict[str, Asker]:
    torch.manual_seed(1)
    model = LongMem.from_backbone(tiny_backbone, chunk_size=4, num_retrieved=8, memory_size=1024).eval()
    compared = Comparison.of_longmem(model, [1024])
    found = task.systems(askers(compared, byte_tokenizer, window=2048, rows=4))
    return {asker.name: asker for asker in found}


def test_memory_has_the_conversation_then_the_text_and_no_question_is_in_it(
    task: FactsTask, systems: dict[str, Asker], byte_tokenizer: Any
) -> None:
    for example in task.examples():
        fact = task._fact(example)
        prompt = task.prompt(example, systems["memory_1024"])
        assert isinstance(prompt.memory, tuple)
        memory = byte_tokenizer.decode(prompt.memory)
        told = memory[: -example.item.between]
        assert fact.said in told and fact.asked not in memory
        question, answer = (byte_tokenizer.decode(context) for context in prompt.contexts)
        assert fact.asked in question and fact.value not in question
        assert (answer + byte_tokenizer.decode(prompt.options[0])).endswith(fact.before + fact.value)


def test_other_systems_have_the_conversation_or_passages_of_it_in_their_window(
    task: FactsTask, systems: dict[str, Asker], byte_tokenizer: Any
) -> None:
    assert list(systems) == [
        "backbone", "memory_off", "memory_1024", "backbone+recall", "memory_1024+recall", IN_WINDOW,
    ]  # fmt: skip
    example = task.examples()[0]
    fact = task._fact(example)
    whole = task.prompt(example, systems[IN_WINDOW])
    assert whole.memory == () and fact.said in byte_tokenizer.decode(whole.contexts[0])
    for name in ("backbone+recall", "memory_1024+recall"):
        assert fact.said in byte_tokenizer.decode(task.prompt(example, systems[name]).contexts[0])
    assert task.prompt(example, systems["backbone"]) == task.prompt(example, systems["memory_1024"])


def test_a_value_that_is_certain_and_named_scores_best(
    task: FactsTask, systems: dict[str, Asker], byte_tokenizer: Any
) -> None:
    example = task.examples()[0]
    prompt, value = task.prompt(example, systems["backbone"]), task._fact(example).value
    right = Scored((0.0,), (True,), prompt.options[0][0])
    said = tuple(byte_tokenizer(f"It is {value.upper()}!", add_special_tokens=False)["input_ids"])
    best = {"value_nats": 0.0, "first_token": 100.0, "exact": 100.0, "named": 100.0}
    assert task.measure(example, prompt, Answer((right, right), said)) == best
    assert names("in Rome.", "Rome") and not names("Romeo", "Rome") and not names("130", "30")


def test_every_system_answers_every_fact(task: FactsTask, systems: dict[str, Asker]) -> None:
    result = run_task(task, list(systems.values()), quiet=True)
    assert [group["group"] for group in result["groups"]] == ["all", "64 tokens between", "256 tokens between"]
    assert all(set(one["values"]) == set(systems) for one in result["examples"])
