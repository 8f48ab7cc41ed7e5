"""Finished parts of a measurement on disk, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Ledger:
    """JSON objects, one a line, found by ``key`` (what numbers depend on besides the text) and ``digest`` (the text).

    Args:
        path: of the file; None keeps them in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._records: dict[tuple[str, str], dict[str, Any]] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    record = json.loads(line)
                    self._records[record["key"], record["digest"]] = record
                except (ValueError, KeyError, TypeError):
                    continue  # empty, cut short, or of another version

    def get(self, key: str, digest: str) -> dict[str, Any] | None:
        return self._records.get((key, digest))

    def append(self, key: str, digest: str, **fields: Any) -> None:
        """Replaces what was there."""
        record = self._records[key, digest] = {"key": key, "digest": digest, **fields}
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                # the line break in front keeps a line that an interruption cut short from spoiling this one
                file.write(f"\n{json.dumps(record)}\n")
