"""Which files are results, and of which kind."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longmem.errors import DataError

KINDS = ("perplexity", "task", "harness", "ablate", "efficiency", "layers", "bench")
"""In the order in which they are shown."""

TASKS = ("chapterbreak", "icl", "squad", "needle", "dialogue")
"""Tasks in the paper's order, and what it has not; others follow by name."""

NOT_RESULTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "run.json",
)
"""Of checkpoints and runs that may lie beside results."""


@dataclass(frozen=True)
class ResultFile:
    """A result as it is in its file.

    Attributes:
        path: as it is shown.
        name: short, for headings.
        kind: one of ``KINDS``.
        task: what was measured.
    """

    path: str
    name: str
    kind: str
    task: str
    data: dict[str, Any]

    @property
    def header(self) -> dict[str, Any]:
        found = self.data.get("header", {})
        return found if isinstance(found, dict) else {}

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.header.get("config", {}))


def read_results(paths: Sequence[str | Path], base: Path | None = None) -> tuple[list[ResultFile], list[str]]:
    """All results in files and folders, ordered by kind, and a line for everything that is none.

    Args:
        paths: files, or folders that are searched to their ends.
        base: paths below it are shown as seen from there.

    Raises:
        DataError: a path is not there, or there is no result at all.
    """
    found, problems = list[ResultFile](), list[str]()
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; name result files (JSON) or folders of them")
        for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
            if path.is_dir() and (file.name in NOT_RESULTS or file.name.endswith(".index.json")):
                continue
            shown = _shown(file, base)
            try:
                found.append(_read(file, shown))
            except (DataError, OSError) as problem:
                problems.append(f"{shown}: {problem}")
    if not found:
        raise DataError("; ".join(problems) or f"no result files in {', '.join(map(str, paths))}")
    twice = Counter(one.name for one in found)
    found = [one if twice[one.name] == 1 else replace(one, name=one.path.removesuffix(".json")) for one in found]
    order = {task: number for number, task in enumerate(TASKS)}
    found.sort(key=lambda one: (KINDS.index(one.kind), order.get(one.task, len(order)), one.task, one.path))
    return found, problems


def _read(file: Path, shown: str) -> ResultFile:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # what is nested a thousand times deep is not ours either
        raise DataError(f"not JSON ({error}); it was cut short or is something else") from error
    if not isinstance(data, dict):
        raise DataError("not a result of longmem: no object at its top")
    header = data.get("header")
    task = str(header.get("task", "")) if isinstance(header, dict) else Path(shown).stem
    kind = _kind(data, task)
    if kind is None:
        what = f"of an unknown task ({task!r})" if isinstance(header, dict) else "without header and command"
        raise DataError(f"not a result that can be shown: JSON {what}")
    return ResultFile(shown, _name(shown, kind, task), kind, task, data)


def _name(shown: str, kind: str, task: str) -> str:
    """``results/books/perplexity.json`` is ``books``."""
    parts = list(Path(shown).with_suffix("").parts)
    if kind != "bench" and len(parts) > 1 and parts[-1] in (task, kind):
        parts.pop()
    if "results" in parts[:-1]:
        return "/".join(parts[parts.index("results") + 1 :])
    return "/".join(parts[-1:] if kind == "bench" else parts[-2:])


def _kind(data: dict[str, Any], task: str) -> str | None:
    if not isinstance(data.get("header"), dict):
        return "bench" if isinstance(data.get("command"), str) else None
    for kind, fields in (
        ("ablate", ("axes", "protocols")),
        ("perplexity", ("protocols", "systems")),
        ("efficiency", ("points", "ratios")),
        ("task", ("metrics", "groups", "systems")),
        ("layers", ("ranks", "recommended")),
        ("harness", ("tasks", "systems")),
    ):
        if all(field in data for field in fields):
            return kind
    return None


def _shown(file: Path, base: Path | None) -> str:
    if base is not None and file.resolve().is_relative_to(base.resolve()):
        return file.resolve().relative_to(base.resolve()).as_posix()
    return file.as_posix()
