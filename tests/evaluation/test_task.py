"""A task over all systems: what is asked once, resuming."""

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
    """A system whose answers are written above; ``stop`` after so many prompts of all systems."""

    calls: list[tuple[str, list[Prompt]]] = field(default_factory=list)
    stop: int = 1000

    def ask(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answer]]:
        self.calls.append((self.name, []))
        for number in reversed(range(len(prompts))):
            if len(asked(self)) == self.stop:
                raise KeyboardInterrupt
            self.calls[-1][1].append(prompts[number])
            yield number, Answer((Scored((VALUES[self.name][prompts[number].contexts[0][0]],), (True,), 0),))


def systems(*names: str, stop: int = 1000) -> list[Known]:
    told: list[Any] = []
    return [Known(n, n.upper(), {"weights": n}, None, tokenizer=None, window=8, calls=told, stop=stop) for n in names]


def asked(system: Known) -> list[tuple[str, int]]:
    """Of all systems beside it too: who was asked for the value of which number."""
    return [(name, prompt.contexts[0][0]) for name, prompts in system.calls for prompt in prompts]


class OfFour(Task):
    name = "of-four"
    metrics = (Metric("accuracy", "accuracy", "%", chance=50.0),)

    def source(self) -> dict[str, Any]:
        return {"of": "four"}

    def examples(self) -> list[Example]:
        return [Example(f"e{n}", "a", "one", n) for n in range(4)]

    def prompt(self, example: Example, asker: Asker) -> Prompt:
        return Prompt(((example.item,),), ((5,),))

    def measure(self, example: Example, prompt: Prompt, answer: Answer) -> dict[str, float]:
        return {"accuracy": answer.scored[0].logprobs[0]}


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first, records = systems("backbone", "memory_8", stop=6), tmp_path / "records.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_task(OfFour(), first, records=records)
    with records.open("ab") as file:
        file.write(b'\xff\x00\n{"key": "cut sh')
    second = systems("backbone", "memory_8")
    result = run_task(OfFour(), second, records=records)
    before, after = asked(first[0]), asked(second[0])
    assert len(before) + len(after) == 8 and not set(before) & set(after)
    assert result["examples"] == run_task(OfFour(), systems("backbone", "memory_8"))["examples"]
    third = systems("backbone", "memory_8")
    third[1].identity["weights"] = "others"
    run_task(OfFour(), third, records=records)
    assert {name for name, _ in asked(third[0])} == {"memory_8"}  # other weights, other answers


def test_what_is_equal_is_asked_once_also_under_another_name() -> None:
    class Twice(OfFour):
        def prompt(self, example: Example, asker: Asker) -> Prompt:
            return Prompt(((example.item // 2,),), ((5,),))

    found = systems("backbone", "memory_off", "memory_8")
    found[1].identity["weights"] = found[2].identity["weights"] = "side"
    found[2].identity["memory"] = 8
    result = run_task(Twice(), found)
    # nothing of these prompts goes to memory: the answers are those of the same model without it
    assert asked(found[0]) == [("backbone", 1), ("backbone", 0), ("memory_off", 1), ("memory_off", 0)]
    assert result["examples"][0]["values"]["memory_8"] == result["examples"][1]["values"]["memory_off"]


def test_memory_is_read_once_for_what_is_asked_with_passages_and_without() -> None:
    class Recalling(OfFour):
        recall = 2

        def prompt(self, example: Example, asker: Asker) -> Prompt:
            return Prompt(((example.item, *(asker.recall * [9])),), ((5,),), memory=(7, example.item // 2))

    remembering = Known("memory_8", "MEMORY", {"weights": "m"}, 8, tokenizer=None, window=8)
    result = run_task(Recalling(), [*systems("backbone"), remembering])
    assert list(result["systems"]) == ["backbone", "memory_8", "backbone+recall", "memory_8+recall"]
    assert list(result["examples"][0]["values"]) == list(result["systems"])
    assert [[(prompt.memory, *prompt.contexts) for prompt in prompts] for _, prompts in remembering.calls] == [
        [((7, 0), (1, 9, 9)), ((7, 0), (1,)), ((7, 0), (0, 9, 9)), ((7, 0), (0,))],
        [((7, 1), (3, 9, 9)), ((7, 1), (3,)), ((7, 1), (2, 9, 9)), ((7, 1), (2,))],
    ]
