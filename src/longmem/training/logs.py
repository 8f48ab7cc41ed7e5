"""What a run tells: a line for people and a JSON record per log step, a progress bar, TensorBoard if asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Record = Mapping[str, Any]


class RunLog:
    """Writes ``metrics.jsonl`` and stderr; a process that is not the main one stays silent.

    Args:
        folder: the run's folder.
        title: what the progress bar is called.
        resume_step: records after this step are dropped, they will be written again; None begins a new file.
        main: whether this is the main process.
        tensorboard: also write ``tensorboard/``.
        quiet: no lines and no bar.
    """

    def __init__(
        self,
        folder: Path,
        title: str,
        *,
        resume_step: int | None = None,
        main: bool = True,
        tensorboard: bool = False,
        quiet: bool = False,
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self._main, self._title = main, title
        self._speaks = main and not quiet
        self._bar: Any = None
        self._task: Any = None
        self._board: Any = None
        if not main:
            return
        kept = _kept_lines(self.path, resume_step) if resume_step is not None else []
        self._file = self.path.open("w", encoding="utf-8")
        self._file.writelines(kept)
        self._file.flush()
        if tensorboard:
            self._board = _board(folder / "tensorboard")

    def __enter__(self) -> Self:
        if self._speaks and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress, TextColumn, TimeElapsedColumn

            # description, bar, percentage and time left are rich's own columns
            took = (TextColumn("left ·"), TimeElapsedColumn(), TextColumn("passed"))
            self._bar = Progress(*Progress.get_default_columns(), *took, console=Console(stderr=True))
            self._task = self._bar.add_task(self._title, total=1.0)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._main:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def record(self, record: Record) -> None:
        """One JSON line."""
        if not self._main:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def say(self, line: str) -> None:
        """One line for people, on stderr."""
        if not self._speaks:
            return
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    def progress(self, done: float) -> None:
        """Share of the run that is done, 0 to 1."""
        if self._bar is not None:
            self._bar.update(self._task, completed=min(1.0, done))


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.4 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _kept_lines(path: Path, step: int) -> list[str]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):  # a line that a crash cut in half
            continue
    return kept


def _board(folder: Path) -> Any:
    from longmem.errors import ConfigError

    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("log.tensorboard is true: pip install tensorboard, or set it to false") from error
    return SummaryWriter(str(folder))
