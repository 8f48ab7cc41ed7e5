"""What a task is: examples, what each system is asked about them, and the metrics of its answers."""

from __future__ import annotations

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from longmem.errors import ConfigError
from longmem.evaluation.asking import Answer, Asker, Prompt
from longmem.evaluation.bootstrap import Bootstrap

Json = dict[str, Any]


@dataclass(frozen=True)
class Example:
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
    item: Any = field(repr=False)
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


class Task(ABC):
    """An evaluation: ``run_task`` asks every system every example and averages ``measure``.

    Attributes:
        name: of the result file.
        metrics: what every example is measured by.
        seeds: of the choice of examples.
    """

    name: str
    metrics: Sequence[Metric]
    seeds: Sequence[int] = (0,)

    @abstractmethod
    def settings(self) -> Json:
        """All that the examples depend on, for the result file."""

    @abstractmethod
    def examples(self) -> Sequence[Example]:
        """In the order of the result; those that share a long memory follow one another."""

    @abstractmethod
    def prompt(self, example: Example, asker: Asker) -> Prompt:
        """What this system is asked."""

    @abstractmethod
    def measure(self, example: Example, prompt: Prompt, answer: Answer) -> dict[str, float]:
        """Every metric of an answer. It may depend on ``gold``, the prompt and the answer alone."""

    def gold(self, example: Example) -> Json:
        """What ``measure`` compares answers with, where the prompt does not say it; for people, what was asked."""
        return {}

    def summarise(
        self, result: Json, examples: Sequence[Example], askers: Sequence[Asker], bootstrap: Bootstrap
    ) -> None:
        """Add to the result what else the task has to say, under ``extra``."""
        result["extra"] = {}

    def notes(self, result: Json) -> Iterable[str]:
        """Lines for people, below the table."""
        return ()


def means_by(
    examples: Sequence[Example], values: Sequence[Json], part: Callable[[Example], Any], digits: int = 3
) -> Json:
    """group -> system -> metric -> part (a seed, an article) -> mean over examples.

    Args:
        examples: whose means are wanted.
        values: of each example, system -> metric -> value.
        part: of an example.
        digits: that are kept.
    """
    found: Json = {}
    for example, of_systems in zip(examples, values, strict=True):
        for system, of_metrics in of_systems.items():
            for metric, value in of_metrics.items():
                place = found.setdefault(example.group, {}).setdefault(system, {}).setdefault(metric, {})
                place.setdefault(str(part(example)), []).append(value)
    means: Json = leaves(found, lambda numbers: round(float(np.mean(numbers)), digits))
    return means


def leaves(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Nested dicts with every value changed that is no dict."""
    return {key: leaves(inner, change) for key, inner in tree.items()} if isinstance(tree, dict) else change(tree)


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
