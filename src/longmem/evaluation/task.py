"""What a task is: examples, how each system is asked, the metrics of its answers; and the result that is written."""

from __future__ import annotations

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numpy as np

from longmem.errors import ConfigError
from longmem.evaluation.asking import Answer, Asker, Prompt
from longmem.evaluation.bootstrap import Bootstrap, Interval
from longmem.evaluation.results import RunHeader
from longmem.evaluation.systems import compared

Item = TypeVar("Item")
Values = dict[str, dict[str, float]]
"""Of one example: system -> metric -> value."""


@dataclass(frozen=True)
class Example(Generic[Item]):
    """One thing asked of every system.

    Attributes:
        id: its name in the result file.
        group: what is reported apart (a split, a data set and its shots, a length, a category).
        unit: what is drawn for intervals: examples of one unit (a book, a conversation) are drawn together.
        item: what the task knows about it.
        seed: of its demonstrations.
    """

    id: str
    group: str
    unit: str
    item: Item = field(repr=False)
    seed: int = 0


@dataclass(frozen=True)
class Metric:
    """A number of every example, averaged over them.

    Attributes:
        name: its key in results.
        label: its name for people.
        unit: ``%`` (an example is 0 to 100), ``nats``, or empty.
        better: which way.
        chance: what guessing gives, where that is known.
    """

    name: str
    label: str
    unit: str = ""
    better: Literal["higher", "lower"] = "higher"
    chance: float | None = None


class Task(ABC, Generic[Item]):
    """An evaluation: ``run_task`` asks every system every example and averages ``measure``.

    Attributes:
        name: of the result file.
        metrics: what every example is measured by.
        seeds: of the choice of examples.
    """

    name: ClassVar[str]
    metrics: Sequence[Metric]
    seeds: Sequence[int] = (0,)

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that the examples depend on, for the result file."""

    @abstractmethod
    def examples(self) -> Sequence[Example[Item]]:
        """In the order of the result; those that share a long memory follow one another."""

    @abstractmethod
    def prompt(self, example: Example[Item], asker: Asker) -> Prompt:
        """What this system is asked."""

    @abstractmethod
    def measure(self, example: Example[Item], prompt: Prompt, answer: Answer) -> dict[str, float]:
        """Every metric of an answer. It may depend on ``gold``, the prompt and the answer alone."""

    def gold(self, example: Example[Item]) -> dict[str, Any]:
        """What ``measure`` compares answers with, where the prompt does not say it; for people, what was asked."""
        return {}

    def summarise(
        self, result: TaskResult, examples: Sequence[Example[Item]], askers: Sequence[Asker], bootstrap: Bootstrap
    ) -> TaskResult:
        """The result with what else the task has to say."""
        return result

    def notes(self, result: TaskResult) -> Iterable[str]:
        """Lines for people, below the table."""
        return ()


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
    values: Values


@dataclass(frozen=True)
class TaskResult:
    """What a task writes as JSON.

    Attributes:
        systems: name -> label.
        skipped: name -> why a system was not asked; empty, kept for older readers of results.
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


def group_scores(
    name: str,
    examples: Sequence[Example[Any]],
    values: Sequence[Values],
    metrics: Sequence[Metric],
    bootstrap: Bootstrap,
    *,
    weights: Sequence[float] | None = None,
    drawn: str = "",
) -> GroupScores:
    """Means, differences and intervals over some examples.

    Args:
        name: of the group.
        examples: E of them, in U units.
        values: of each example.
        metrics: to average.
        bootstrap: of intervals, which draws units.
        weights: of each example in the mean; None weights all alike.
        drawn: what a unit is, for the result file; empty is "examples", or "units" where a unit has several.
    """
    units = {unit: at for at, unit in enumerate(dict.fromkeys(example.unit for example in examples))}
    where = np.array([units[example.unit] for example in examples])
    weight = np.ones(len(examples)) if weights is None else np.asarray(weights, dtype=float)

    def summed(column: Sequence[float] | np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.bincount(where, weights=weight * np.asarray(column), minlength=len(units)).astype(np.float64)

    count, systems = summed(np.ones(len(examples))), list(values[0])
    total = {(s, m.name): summed([value[s][m.name] for value in values]) for m in metrics for s in systems}
    gaps = {(s, a, m.name): total[s, m.name] - total[a, m.name] for m in metrics for s, a in compared(systems)}

    def mean(sums: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, Interval | None]:
        said = drawn or ("examples" if all(example.unit == example.id for example in examples) else "units")
        return float(sums.sum() / count.sum()), bootstrap.mean(sums, count, said)

    return GroupScores(
        group=name,
        examples=len(examples),
        units=len(units),
        scores=[MetricScore(*key, *mean(sums)) for key, sums in total.items()],
        differences=[MetricDifference(*key, *mean(sums)) for key, sums in gaps.items()],
    )


def means_by(
    examples: Sequence[Example[Any]], values: Sequence[Values], part: Callable[[Example[Any]], str]
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """group -> system -> metric -> part (a seed, an article) -> mean over examples."""
    found: dict[str, Any] = {}
    for example, of_systems in zip(examples, values, strict=True):
        for system, of_metrics in of_systems.items():
            for metric, value in of_metrics.items():
                of_metric = found.setdefault(example.group, {}).setdefault(system, {}).setdefault(metric, {})
                of_metric.setdefault(part(example), []).append(value)
    return {
        group: {
            system: {
                metric: {name: float(np.mean(numbers)) for name, numbers in parts.items()}
                for metric, parts in of_metrics.items()
            }
            for system, of_metrics in of_systems.items()
        }
        for group, of_systems in found.items()
    }


def drawn(seed: str, count: int, limit: int | None) -> list[int]:
    """All numbers below ``count``, or ``limit`` of them drawn with a seed, in their order."""
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), limit))


def different(problems: Sequence[str] = (), /, **lists: Sequence[float]) -> None:
    """Refuse lists that are empty, that name a value twice, or one below 0.

    Raises:
        ConfigError: names every list that does, after ``problems``.
    """
    wrong = [
        f"{name} ({','.join(f'{value:g}' for value in values) or 'none'}) must be different numbers from 0 up"
        for name, values in lists.items()
        if not values or min(values) < 0 or len(set(values)) < len(values)
    ]
    if wrong or problems:
        raise ConfigError([*problems, *wrong])


def numbered(names: Sequence[str]) -> list[str]:
    """Equal names told apart: ``test.txt``, ``test.txt (2)``."""
    taken: dict[str, int] = {}
    found = []
    for name in names:
        shown = name
        while shown in taken:
            taken[name] += 1
            shown = f"{name} ({taken[name]})"
        taken[shown] = 1
        found.append(shown)
    return found


def digest_of(*parts: Any) -> str:
    """Hash of what JSON can say."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
