"""The seal: ``catalog.seal`` holds the size and SHA-256 of a catalog that no writer has changed since.

A writer removes it before its first transaction and writes it when it closes with the write-ahead log emptied. After a
crash there is none; then the check sums of the rows decide, and the next writer that closes makes a new one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from longmem.errors import StoreDamaged
from longmem.store.durable import failpoint, file_errors, placed, remove
from longmem.store.held import HeldFile

SEAL = "catalog.seal"


@dataclass(frozen=True)
class Seal:
    """Size and SHA-256 (hex) of the catalog file."""

    bytes: int
    sha256: str


def read_seal(folder: Path) -> Seal | None:
    """The seal, or None where there is none.

    Raises:
        StoreDamaged: what is there is no seal.
    """
    path = folder / SEAL
    try:
        with file_errors(path, "reading"):
            try:
                text = path.read_bytes()
            except FileNotFoundError:
                return None
        fields = json.loads(text)
        if text != _as_text(seal := Seal(int(fields["bytes"]), str(fields["sha256"]))):
            raise ValueError("written by something else")
        return seal
    except (ValueError, KeyError, TypeError) as error:
        raise StoreDamaged(
            f"{path}: not what was written ({error}); `longmem memory verify --repair` renews it"
        ) from error


def write_seal(folder: Path, catalog: HeldFile) -> Seal:
    """Seal the catalog as it is on the disk; nothing may write to it meanwhile."""
    seal = Seal(*catalog.sha256())
    with placed(folder / "staging", folder / SEAL) as stream:
        stream.write(_as_text(seal))
        failpoint("seal.staged")
    failpoint("seal.placed")
    return seal


def remove_seal(folder: Path) -> None:
    """Say that the catalog is about to change."""
    if (folder / SEAL).exists():
        remove(folder / SEAL)
        failpoint("seal.removed")


def check_seal(folder: Path, catalog: HeldFile) -> bool:
    """Whether the catalog is sealed; beside a writer that is just beginning, the answer is no.

    Raises:
        StoreDamaged: there is a seal, and the catalog is not what it says.
    """
    while (seal := read_seal(folder)) is not None:
        size, sha256 = catalog.sha256()
        log = folder / "catalog.sqlite-wal"
        with file_errors(log, "looking at"):
            log_bytes = log.stat().st_size if log.exists() else 0
        if (size, sha256) == (seal.bytes, seal.sha256) and not log_bytes:
            return True
        if read_seal(folder) != seal:
            continue
        if log_bytes and (size, sha256) == (seal.bytes, seal.sha256):
            raise StoreDamaged(
                f"{log}: a write-ahead log of {log_bytes} bytes beside a sealed catalog is not its own; "
                "delete it if it was copied here, or restore a backup of the whole folder"
            )
        raise StoreDamaged(
            f"{catalog.path}: {size} bytes with SHA-256 {sha256[:12]}..., the seal says {seal.bytes} with "
            f"{seal.sha256[:12]}...; restore a backup, or run `longmem memory verify` to see what is damaged"
        )
    return False


def _as_text(seal: Seal) -> bytes:
    return json.dumps({"bytes": seal.bytes, "sha256": seal.sha256}).encode() + b"\n"
