"""Progress on stderr: one line that is rewritten in a terminal, a new line every ten seconds anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Self, TypeVar

T = TypeVar("T")

EVERY = {True: 0.2, False: 10.0}
"""Seconds between two reports, by whether stderr is a terminal."""


class Progress:
    """``with Progress("reading", total=65_536, unit="tokens") as progress: progress.advance(256, "book.txt")``.

    Work that ends within ten seconds leaves no line in a log file.

    Args:
        what: the work, as a verb: "encoding".
        total: how much there is to do; None where that is not known, then no time left is shown.
        unit: of ``total``.
        quiet: report nothing.
    """

    def __init__(self, what: str, total: int | None = None, unit: str = "", *, quiet: bool = False) -> None:
        self.what, self.total, self.unit, self.quiet = what, total, unit, quiet
        self.started = self._shown = time.monotonic()
        self.done = 0
        self._first: tuple[float, int] | None = None  # when something was first done, and how much
        self._terminal = sys.stderr.isatty()
        self._width = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._width:  # leave an empty line to whatever is printed next
            self._write("\r" + " " * self._width + "\r")

    def advance(self, amount: int = 1, note: str = "") -> None:
        """``amount`` more is done; ``note`` says what, or how it went."""
        self.done += amount
        now = time.monotonic()
        if amount and self._first is None:
            self._first = now, self.done
        if self.quiet or now - self._shown < EVERY[self._terminal]:
            return
        self._shown = now
        line = self.line(now, note)
        if self._terminal:
            self._write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._write(line + "\n")

    def say(self, text: str) -> None:
        """A line of its own, in the place of a report."""
        if self.quiet:
            return
        self._shown = time.monotonic()
        self._write("\r" * bool(self._width) + text.ljust(self._width) + "\n")

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    def line(self, now: float, note: str = "") -> str:
        """The report at a time of the monotonic clock."""
        unit, note = f" {self.unit}" if self.unit else "", f", {note}" if note else ""
        if not self.total:
            return f"{self.what}: {self.done:,}{unit} in {clock(now - self.started)}{note}"
        # the first time includes what is done once: reading a memory, a whole batch before its first answer
        then, before = self._first or (now, self.done)
        new = self.done - before
        left = f", {clock((now - then) / new * max(0, self.total - self.done))} left" if new else ""
        return f"{self.what}: {self.done:,} of {self.total:,}{unit} ({100 * self.done // self.total} %){left}{note}"


def track(
    items: Iterable[T], what: str, total: int | None = None, unit: str = "", *, quiet: bool = False
) -> Iterator[T]:
    """The same items, with progress."""
    with Progress(what, total, unit, quiet=quiet) as progress:
        for item in items:
            yield item
            progress.advance()


def clock(seconds: float) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
