"""What an evaluation task is: examples, and the metrics of each system's answers to them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from longmem.evaluation.asking import Asker


@dataclass(frozen=True)
class Example:
    """One thing asked of every system.

    Attributes:
        id: its name in the result file.
        digest: hash of all that is asked, see ``digest_of``; an interrupted run goes on by it.
        group: what is reported apart (a split, a data set and its shots, a length, a category).
        unit: what is drawn for intervals: examples of one unit (a book, a conversation) are drawn together.
    """

    id: str
    digest: str
    group: str
    unit: str


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


class Task(Protocol):
    """An evaluation. A task may also have ``skip(asker) -> str | None``: why a system is not asked."""

    @property
    def name(self) -> str:
        """Names the result file."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What every example is measured by."""

    def settings(self) -> dict[str, Any]:
        """All that the examples depend on, for the result file."""

    def examples(self) -> Sequence[Any]:
        """``Example``s, or what a task makes of them."""

    def answer(self, asker: Asker, examples: Sequence[Any]) -> Iterator[tuple[int, dict[str, float]]]:
        """Ask one system.

        Yields:
            (number in ``examples``, value of each metric), in the order in which they are done.
        """


def numbered(names: Sequence[str]) -> list[str]:
    """Equal names told apart: ``test.txt``, ``test.txt (2)``."""
    taken: set[str] = set()
    tried: dict[str, int] = {}  # the last number that was tried for a name
    found = []
    for name in names:
        shown = name
        while shown in taken:
            tried[name] = tried.get(name, 1) + 1
            shown = f"{name} ({tried[name]})"
        taken.add(shown)
        found.append(shown)
    return found


def digest_of(*parts: Any) -> str:
    """Hash of what JSON can say."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
