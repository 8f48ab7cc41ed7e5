"""A task over all systems: means, intervals, differences, what is asked once, resuming."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from longmem.evaluation.asking import Answer, Asker, Prompt, Scored
from longmem.evaluation.tasks import Example, Metric, Task, run_task

VALUES = {"backbone": [0.0, 0.0, 100.0, 0.0], "memory_off": [0.0, 100.0, 0.0, 0.0], "memory_8": [100.0] * 4}


@dataclass(frozen=True)
class Known(Asker):
    """A system whose answers are written above; ``stop`` after so many of all systems."""

    asked: list[tuple[str, int]] = field(default_factory=list)
    stop: int = 1000

    def ask(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        for number in reversed(range(len(prompts))):
            if len(self.asked) == self.stop:
                raise KeyboardInterrupt
            self.asked.append((self.name, prompts[number].contexts[0][0]))
            value = VALUES[self.name][prompts[number].contexts[0][0]]
            yield number, Answer((Scored((value,), (True,), 0),))


class OfFour(Task):
    name = "of-four"
    metrics = (Metric("accuracy", "accuracy", "%", chance=50.0),)
    where = (("a", "one"), ("a", "one"), ("b", "two"), ("b", "three"))

    def source(self) -> dict[str, Any]:
        return {"of": "four"}

    def examples(self) -> list[Example]:
        return [Example(f"e{n}", group, unit, n) for n, (group, unit) in enumerate(self.where)]

    def prompt(self, example: Example, asker: Asker) -> Prompt:
        return Prompt(((example.item,),), ((5,),))

    def measure(self, example: Example, prompt: Prompt, answer: Answer) -> dict[str, float]:
        return {"accuracy": answer.scored[0].logprobs[0]}


def systems(*names: str, stop: int = 1000) -> list[Known]:
    told: list[tuple[str, int]] = []
    return [Known(n, n.upper(), {"weights": n}, None, tokenizer=None, window=8, asked=told, stop=stop) for n in names]


def test_means_and_paired_differences_of_every_group() -> None:
    result = run_task(OfFour(), systems("backbone", "memory_off", "memory_8"))
    assert [group["group"] for group in result["groups"]] == ["all", "a", "b"]
    assert [(group["examples"], group["units"]) for group in result["groups"]] == [(4, 3), (2, 1), (2, 2)]
    everything, first, _ = [{s["system"]: s for s in group["scores"]} for group in result["groups"]]
    assert everything["backbone"]["value"] == 25 and first["memory_off"]["value"] == 50
    gaps = {(d["system"], d["against"]): d["value"] for d in result["groups"][0]["differences"]}
    assert gaps == {("memory_off", "backbone"): 0, ("memory_8", "backbone"): 75, ("memory_8", "memory_off"): 75}
    interval = everything["backbone"]["interval"]
    assert interval["low"] <= 25 <= interval["high"] and interval["count"] == 3
    assert first["backbone"]["interval"] is None  # one unit says nothing of its spread
    assert result["examples"][1]["values"]["memory_off"] == {"accuracy": 100.0}
    assert result["header"]["task"] == "of-four"


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first, records = systems("backbone", "memory_8", stop=6), tmp_path / "records.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_task(OfFour(), first, records=records)
    with records.open("ab") as file:
        file.write(b'\xff\x00\n{"key": "cut sh')
    second = systems("backbone", "memory_8")
    result = run_task(OfFour(), second, records=records)
    assert len(first[0].asked) + len(second[0].asked) == 8
    assert not set(first[0].asked) & set(second[0].asked)
    fresh = run_task(OfFour(), systems("backbone", "memory_8"))
    assert result["examples"] == fresh["examples"]
    third = systems("backbone", "memory_8")
    third[1].identity["weights"] = "others"
    run_task(OfFour(), third, records=records)
    assert {name for name, _ in third[0].asked} == {"memory_8"}  # other weights, other answers


def test_what_is_equal_is_asked_once_also_under_another_name() -> None:
    class Twice(OfFour):
        def prompt(self, example: Example, asker: Asker) -> Prompt:
            return Prompt(((example.item // 2,),), ((5,),))

    found = systems("backbone", "memory_off", "memory_8")
    found[1].identity["weights"] = found[2].identity["weights"] = "side"
    found[2].identity["memory"] = 8
    result = run_task(Twice(), found)
    # nothing of these prompts goes to memory: the answers are those of the same model without it
    assert found[0].asked == [("backbone", 1), ("backbone", 0), ("memory_off", 1), ("memory_off", 0)]
    assert result["examples"][0]["values"]["memory_8"] == result["examples"][1]["values"]["memory_off"]


def test_memory_is_read_once_for_what_is_asked_with_passages_and_without() -> None:
    class Recalling(OfFour):
        recall = 2

        def prompt(self, example: Example, asker: Asker) -> Prompt:
            notes = (9,) if asker.recall else ()
            return Prompt(((example.item, *notes),), ((5,),), memory=(7, example.item // 2))

    calls = []

    class Counted(Known):
        def ask(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
            calls.append([(prompt.memory, prompt.contexts[0]) for prompt in prompts])
            return super().ask(prompts)

    remembering = Counted("memory_8", "MEMORY", {"weights": "m"}, 8, tokenizer=None, window=8)
    result = run_task(Recalling(), [*systems("backbone"), remembering])
    assert list(result["systems"]) == ["backbone", "memory_8", "backbone+recall", "memory_8+recall"]
    assert list(result["examples"][0]["values"]) == list(result["systems"])
    assert calls == [
        [((7, 0), (0,)), ((7, 0), (0, 9)), ((7, 0), (1,)), ((7, 0), (1, 9))],
        [((7, 1), (2,)), ((7, 1), (2, 9)), ((7, 1), (3,)), ((7, 1), (3, 9))],
    ]
