"""What the commands print: data on stdout, progress on stderr."""

from __future__ import annotations

import json
import sys
import time as clock
from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from longmem.store.records import Progress

_EVERY = 10.0  # seconds between lines where there is no terminal
_WORDS = {"encode": "encoded", "check": "checked", "rewrite": "rewritten", "copy": "copied"}


def print_json(value: object) -> None:
    """One JSON document."""
    click.echo(json.dumps(as_plain(value), indent=1, ensure_ascii=False))


def as_plain(value: object) -> Any:
    """Records as JSON has them."""
    if is_dataclass(value) and not isinstance(value, type):
        return {key: as_plain(inner) for key, inner in asdict(value).items()}
    if isinstance(value, dict):
        return {str(key): as_plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(inner) for inner in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def print_columns(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Aligned columns, numbers to the right; a line is never cut."""
    lines = [[_cell(value) for value in row] for row in rows]
    right = [bool(lines) and all(_is_number(line[at]) for line in lines) for at in range(len(heads))]
    widths = [max(len(line[at]) for line in [list(heads), *lines]) for at in range(len(heads))]
    for line in [list(heads), *lines]:
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)]
        click.echo("  ".join(cells).rstrip())


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _is_number(text: str) -> bool:
    return text == "-" or text.replace(",", "").replace(".", "").isdigit()


def date(seconds: float | None) -> str | None:
    """A moment in local time."""
    return None if seconds is None else datetime.fromtimestamp(seconds).isoformat(" ", "seconds")


def one_line(text: str) -> str:
    """Text within a line: white space as single blanks, nothing that a terminal would obey."""
    return "".join(sign if sign.isprintable() else "·" for sign in " ".join(text.split()))


def counted(number: int, what: str) -> str:
    """``1 document``, ``2,000 documents``."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


class ShownProgress:
    """Progress of long work on stderr: a bar on a terminal, elsewhere a line now and then."""

    def __enter__(self) -> ShownProgress:
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._last = clock.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        """Show how far it is."""
        if sys.stderr.isatty():
            self._draw(progress)
        elif clock.monotonic() - self._last >= _EVERY:
            self._last = clock.monotonic()
            of = "" if progress.total is None else f" of {progress.total:,}"
            step = _WORDS.get(progress.step, progress.step)
            click.echo(f"{step} {progress.done:,}{of} {progress.unit}, at {progress.name}", err=True)

    def _draw(self, progress: Progress) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.markup import escape
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._escape = escape
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"))
            self._bar = Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))
            self._bar.start()
        task = self._tasks.get(progress.step)
        if task is None:
            task = self._tasks[progress.step] = self._bar.add_task("", total=progress.total, count="")
        passed = self._bar.tasks[list(self._tasks).index(progress.step)].elapsed or 0.0
        rate = f", {progress.done / passed:,.0f}/s" if passed > 1 else ""
        of = "" if progress.total is None else f" of {progress.total:,}"
        self._bar.update(
            task,
            completed=progress.done,
            total=progress.total,
            description=self._escape(f"{progress.step} {progress.name[-40:]}"),
            count=f"{progress.done:,}{of} {progress.unit}{rate}",
        )
