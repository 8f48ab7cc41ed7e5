"""Run a task over all systems: resume, averages, intervals, paired differences."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from longmem.errors import DataError
from longmem.evaluation.asking import Asker
from longmem.evaluation.bootstrap import Bootstrap, Floats, Interval
from longmem.evaluation.results import RunHeader
from longmem.evaluation.systems import compared
from longmem.evaluation.task import Example, Metric, Task, digest_of

ALL = "all"
RECORDS_VERSION = 1  # part of every record's key; raised when a record's meaning changes

Progress = Callable[[str, int, int], Any]
"""``(system, examples done, examples in all)``."""


@dataclass(frozen=True)
class MetricScore:
    """Mean of a metric for one system, with its interval over units."""

    system: str
    metric: str
    value: float
    interval: Interval | None


@dataclass(frozen=True)
class MetricDifference:
    """Mean of ``system`` minus mean of ``against`` on the same examples, with its paired interval."""

    system: str
    against: str
    metric: str
    value: float
    interval: Interval | None


@dataclass(frozen=True)
class GroupScores:
    """Examples of one group."""

    group: str
    examples: int
    units: int
    scores: list[MetricScore]
    differences: list[MetricDifference]

    def score(self, system: str, metric: str) -> MetricScore:
        return next(s for s in self.scores if s.system == system and s.metric == metric)


@dataclass(frozen=True)
class ExampleScores:
    """One example: ``values[system][metric]``."""

    id: str
    group: str
    unit: str
    values: dict[str, dict[str, float]]


@dataclass(frozen=True)
class TaskResult:
    """What a task writes as JSON.

    Attributes:
        systems: name -> label, those asked.
        skipped: name -> reason, those not asked.
        groups: ``all`` first, then each by itself.
        extra: what else a task has to say.
    """

    header: RunHeader
    systems: dict[str, str]
    skipped: dict[str, str]
    metrics: list[Metric]
    groups: list[GroupScores]
    examples: list[ExampleScores]
    extra: dict[str, Any]

    def with_extra(self, **more: Any) -> TaskResult:
        return replace(self, extra=self.extra | more)


def run_task(
    task: Task,
    askers: Sequence[Asker],
    *,
    records: Path | None = None,
    bootstrap: Bootstrap | None = None,
    command: str = "",
    config: dict[str, Any] | None = None,
    seeds: Sequence[int] = (0,),
    progress: Progress | None = None,
) -> TaskResult:
    """Ask every system every example.

    Args:
        task: see ``Task``.
        askers: the systems, see ``asking.askers``.
        records: JSONL file of finished examples; what it already holds is not asked again.
        bootstrap: resamples, level and seed of intervals.
        command: as typed, kept in the result.
        config: what else the result should say about its making.
        seeds: of the choice of examples.
        progress: told after every example.

    Raises:
        DataError: the task has no examples.
    """
    bootstrap = bootstrap or Bootstrap()
    examples: Sequence[Example] = task.examples()
    if not examples:
        raise DataError(f"{task.name} has no examples under these settings; give it more text, or wider limits")
    skip = getattr(task, "skip", lambda asker: None)
    reasons = {asker.name: skip(asker) for asker in askers}
    asked = [asker for asker in askers if reasons[asker.name] is None]
    if not asked:
        raise DataError(f"{task.name} asks none of these systems: {'; '.join(filter(None, reasons.values()))}")
    ledger = _Ledger(records)
    values: list[dict[str, dict[str, float]]] = [{} for _ in examples]
    seconds = sum(_ask(task, asker, examples, values, ledger, progress) for asker in asked)
    names = [asker.name for asker in asked]
    units = "examples" if all(e.unit == e.id for e in examples) else "units"
    groups = list(dict.fromkeys(example.group for example in examples))
    return TaskResult(
        header=RunHeader(
            task=task.name,
            command=command,
            config=task.settings() | {"bootstrap": asdict(bootstrap)} | (config or {}),
            models={asker.name: asker.identity | {"window": asker.window} for asker in asked},
            samples={"examples": len(examples), "units": len({example.unit for example in examples})},
            seeds=list(seeds),
            seconds=round(seconds, 1),
        ),
        systems={asker.name: asker.label for asker in asked},
        skipped={name: reason for name, reason in reasons.items() if reason is not None},
        metrics=list(task.metrics),
        groups=[
            _group(name, names, task.metrics, examples, values, bootstrap, units)
            for name in ([ALL, *groups] if len(groups) > 1 else groups)
        ],
        examples=[
            ExampleScores(example.id, example.group, example.unit, found)
            for example, found in zip(examples, values, strict=True)
        ],
        extra={},
    )


def _ask(
    task: Task,
    asker: Asker,
    examples: Sequence[Example],
    values: list[dict[str, dict[str, float]]],
    ledger: _Ledger,
    progress: Progress | None,
) -> float:
    """Fill in ``values``; returns the seconds that asking took, those of earlier runs included."""
    version = {"records": RECORDS_VERSION, "window": asker.window, "task": task.name}
    key = digest_of(version, asker.name, asker.identity)
    waiting, seconds = [], 0.0
    for number, example in enumerate(examples):
        known = ledger.get(key, example.digest)
        if known is not None and known.values.keys() >= {metric.name for metric in task.metrics}:
            values[number][asker.name] = known.values
            seconds += known.seconds
        else:
            waiting.append(number)
    done = len(examples) - len(waiting)
    if progress is not None:
        progress(asker.label, done, len(examples))
    began = time.monotonic()
    for at, found in task.answer(asker, [examples[number] for number in waiting]):
        number, now = waiting[at], time.monotonic()
        values[number][asker.name] = found
        ledger.append(key, examples[number], asker.name, _Known(found, now - began))
        seconds, began = seconds + now - began, now
        done += 1
        if progress is not None:
            progress(asker.label, done, len(examples))
    return seconds


def _group(
    name: str,
    systems: Sequence[str],
    metrics: Sequence[Metric],
    examples: Sequence[Example],
    values: Sequence[dict[str, dict[str, float]]],
    bootstrap: Bootstrap,
    units: str,
) -> GroupScores:
    chosen = [number for number, example in enumerate(examples) if name in (ALL, example.group)]
    number_of = {unit: at for at, unit in enumerate(dict.fromkeys(examples[number].unit for number in chosen))}
    where = np.array([number_of[examples[number].unit] for number in chosen])
    count = np.bincount(where, minlength=len(number_of)).astype(float)
    total: dict[tuple[str, str], Floats] = {}
    for metric in metrics:
        for system in systems:
            column = np.array([values[number][system][metric.name] for number in chosen], dtype=float)
            summed = np.bincount(where, weights=column, minlength=len(number_of))
            total[system, metric.name] = summed.astype(np.float64)
    return GroupScores(
        group=name,
        examples=len(chosen),
        units=len(number_of),
        scores=[
            MetricScore(system, metric, float(t.sum() / count.sum()), bootstrap.mean(t, count, units))
            for (system, metric), t in total.items()
        ],
        differences=[
            MetricDifference(
                system,
                against,
                metric.name,
                float(gap.sum() / count.sum()),
                bootstrap.mean(gap, count, units),
            )
            for metric in metrics
            for system, against in compared(systems)
            for gap in (total[system, metric.name] - total[against, metric.name],)
        ],
    )


@dataclass(frozen=True)
class _Known:
    """Metrics of an example, and the seconds from the answer before to this one."""

    values: dict[str, float]
    seconds: float


class _Ledger:
    """Finished examples on disk, one JSON line each; without a path they are not kept."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[tuple[str, str], _Known] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    record = json.loads(line)
                    known = _Known(record["values"], record.get("seconds", 0.0))
                    self._known[record["key"], record["digest"]] = known
                except (ValueError, KeyError, TypeError):
                    continue  # empty, cut short, or of another version

    def get(self, key: str, digest: str) -> _Known | None:
        return self._known.get((key, digest))

    def append(self, key: str, example: Example, system: str, known: _Known) -> None:
        self._known[key, example.digest] = known
        if self.path is not None:
            names = {"key": key, "digest": example.digest, "example": example.id, "system": system}
            record = names | {"values": known.values, "seconds": round(known.seconds, 4)}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                # the line break in front keeps a line that an interruption cut short from spoiling this one
                file.write(f"\n{json.dumps(record)}\n")
