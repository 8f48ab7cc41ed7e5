"""A task over all systems: means, intervals, differences, resuming."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from longmem.errors import DataError
from longmem.evaluation.asking import Asker
from longmem.evaluation.results import to_json
from longmem.evaluation.runner import run_task
from longmem.evaluation.task import Example, Metric, digest_of

VALUES = {"backbone": [0.0, 0.0, 100.0, 0.0], "memory_off": [0.0, 100.0, 0.0, 0.0], "memory_8": [100.0] * 4}


@dataclass
class Known:
    """A task whose answers are written above."""

    asked: list[tuple[str, str]] = field(default_factory=list)
    stop_after: int | None = None
    name: str = "known"
    metrics: tuple[Metric, ...] = (Metric("accuracy", "accuracy", "%", chance=50.0),)

    def settings(self) -> dict[str, Any]:
        return {"of": "known"}

    def examples(self) -> Sequence[Example]:
        where = [("a", "one"), ("a", "one"), ("b", "two"), ("b", "three")]
        return [Example(f"e{n}", digest_of(n), group, unit) for n, (group, unit) in enumerate(where)]

    def skip(self, asker: Asker) -> str | None:
        return "it is not wanted" if asker.name == "control" else None

    def answer(self, asker: Asker, examples: Sequence[Example]) -> Iterator[tuple[int, dict[str, float]]]:
        for number in reversed(range(len(examples))):
            if self.stop_after is not None and len(self.asked) == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append((asker.name, examples[number].id))
            yield number, {"accuracy": VALUES[asker.name][int(examples[number].id[1:])]}


def systems(*names: str) -> list[Asker]:
    return [Asker(name, name.upper(), {"weights": name}, None, None, window=8) for name in names]


def test_means_and_paired_differences_of_every_group() -> None:
    result = run_task(Known(), systems("backbone", "memory_off", "memory_8", "control"))
    assert [group.group for group in result.groups] == ["all", "a", "b"]
    assert [(group.examples, group.units) for group in result.groups] == [(4, 3), (2, 1), (2, 2)]
    assert result.groups[0].score("backbone", "accuracy").value == 25
    assert result.groups[1].score("memory_off", "accuracy").value == 50
    gaps = {(d.system, d.against): d.value for d in result.groups[0].differences}
    assert gaps == {("memory_off", "backbone"): 0, ("memory_8", "backbone"): 75, ("memory_8", "memory_off"): 75}
    interval = result.groups[0].score("backbone", "accuracy").interval
    assert interval is not None
    assert interval.low <= 25 <= interval.high
    assert interval.count == 3
    assert result.groups[1].score("backbone", "accuracy").interval is None  # one unit says nothing of its spread
    assert result.skipped == {"control": "it is not wanted"}
    assert result.examples[1].values["memory_off"] == {"accuracy": 100.0}


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first, records = Known(stop_after=6), tmp_path / "records.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_task(first, systems("backbone", "memory_8"), records=records)
    with records.open("ab") as file:
        file.write(b'\xff\x00\n{"key": "cut sh')
    second = Known()
    result = run_task(second, systems("backbone", "memory_8"), records=records)
    assert len(first.asked) + len(second.asked) == 8
    assert not set(first.asked) & set(second.asked)
    fresh = run_task(Known(), systems("backbone", "memory_8"))
    assert [e.values for e in result.examples] == [e.values for e in fresh.examples]
    third = Known()
    changed = [cast(Asker, asker) for asker in systems("backbone", "memory_8")]
    changed[1].identity["weights"] = "others"
    run_task(third, changed, records=records)
    assert {name for name, _ in third.asked} == {"memory_8"}  # other weights, other answers


def test_the_time_of_earlier_runs_counts(tmp_path: Path) -> None:
    class Slow(Known):
        def answer(self, asker: Asker, examples: Sequence[Example]) -> Iterator[tuple[int, dict[str, float]]]:
            for each in super().answer(asker, examples):
                time.sleep(0.05)
                yield each

    records = tmp_path / "records.jsonl"
    alone = run_task(Slow(), systems("backbone"), records=records).header.seconds
    assert alone >= 0.2
    both = run_task(Slow(), systems("backbone", "memory_8"), records=records).header.seconds
    assert both >= alone + 0.2  # what the first run asked is not asked again, and is counted
    assert run_task(Known(), systems("backbone", "memory_8"), records=records).header.seconds >= 0.4


def test_progress_is_told_and_the_result_is_json() -> None:
    told: list[tuple[str, int, int]] = []
    result = run_task(Known(), systems("backbone"), progress=lambda *what: told.append(what))
    assert told == [("BACKBONE", done, 4) for done in range(5)]
    assert '"task": "known"' in to_json(result)


def test_a_task_without_examples_or_systems_says_so() -> None:
    class Empty(Known):
        def examples(self) -> Sequence[Example]:
            return []

    with pytest.raises(DataError, match="known has no examples"):
        run_task(Empty(), systems("backbone"))
    with pytest.raises(DataError, match="asks none of these systems: it is not wanted"):
        run_task(Known(), systems("control"))
