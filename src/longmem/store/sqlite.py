"""Connections to the catalog, and SQLite's errors in our words."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from longmem.errors import LongMemError, StoreDamaged, StoreError, StoreFull

BUSY_SECONDS = 20.0
Mode = Literal["create", "rw", "ro", "immutable"]

# a cut or torn database file shows itself in these
_DAMAGED = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_FORMAT", "SQLITE_IOERR_READ", "SQLITE_IOERR_SHORT_READ")
_DAMAGED_IF_OURS = (
    "SQLITE_ERROR",
    "SQLITE_CONSTRAINT",
    "SQLITE_MISMATCH",
    "SQLITE_TOOBIG",
    "SQLITE_RANGE",
    "SQLITE_NOMEM",
)
_UNWRITABLE = (
    "SQLITE_IOERR_WRITE",
    "SQLITE_IOERR_FSYNC",
    "SQLITE_IOERR_TRUNCATE",
    "SQLITE_IOERR_SHM",
    "SQLITE_IOERR_DIR_FSYNC",
)


def connect(path: Path, mode: Mode) -> sqlite3.Connection:
    """A connection in autocommit mode; writers get the settings of a durable store.

    ``immutable`` promises SQLite that nobody writes: it then needs no file beside the catalog.
    """
    if mode == "rw":
        _check_rights(path)
    how = {"create": "mode=rwc", "rw": "mode=rw", "ro": "mode=ro", "immutable": "mode=ro&immutable=1"}[mode]
    with sqlite_errors(path):
        connection = sqlite3.connect(
            f"file:{quote(str(path.absolute()))}?{how}",
            uri=True,
            isolation_level=None,
            timeout=BUSY_SECONDS,
            check_same_thread=False,
        )
        try:
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA cell_size_check = ON")
            connection.execute("PRAGMA mmap_size = 0")  # a cut file is an error then, not a signal
            connection.execute("PRAGMA temp_store = MEMORY")  # no text in files outside of the store
            if mode in ("create", "rw"):
                _prepare_writer(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


def _check_rights(path: Path) -> None:
    """Say which file may not be written: SQLite would open the catalog to read, and complain at the first change."""
    for each in (path, *(path.with_name(path.name + suffix) for suffix in ("-wal", "-shm"))):
        if each.exists() and not os.access(each, os.W_OK):
            raise StoreFull(f"{each}: may not be written; allow writing there, or open the store with mode='read'")


def _prepare_writer(connection: sqlite3.Connection, path: Path) -> None:
    journal = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    if journal != "wal":
        raise StoreError(
            f"{path}: this file system does not support the shared memory of SQLite's write-ahead log "
            f"(journal mode {journal}); keep the store on a local disk"
        )
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA secure_delete = ON")
    connection.execute("PRAGMA foreign_keys = ON")


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Turn errors of SQLite into one clear line.

    Raises:
        StoreDamaged: the catalog cannot be read as what it is.
        StoreFull: no room, or no right to write.
        StoreError: busy, or cannot be opened.
    """
    try:
        yield
    except sqlite3.Error as error:
        raise translated(error, path) from error


_RESTORE = "restore a backup, or run `longmem memory verify` to see what is damaged"


def translated(error: sqlite3.Error, path: Path) -> LongMemError:
    """The error of ours that says what this one of SQLite's means for the store."""
    if isinstance(error, sqlite3.ProgrammingError):
        return StoreError(f"{path}: {error}; the store was closed: open it again")
    name = getattr(error, "sqlite_errorname", None) or "SQLITE_ERROR"
    said = " ".join(str(error).split())  # SQLite quotes what it cannot read, of any length and with line ends
    said = said if len(said) <= 200 else f"{said[:200]}..."
    if name.startswith(_DAMAGED) or name.startswith(_DAMAGED_IF_OURS):
        return StoreDamaged(f"{path}: {said} ({name}); {_RESTORE}")
    if name.startswith("SQLITE_FULL") or name.startswith(_UNWRITABLE):
        return StoreFull(f"{path}: {said} ({name}); nothing was changed: make room, then go on")
    if name.startswith(("SQLITE_READONLY", "SQLITE_PERM")):
        return StoreFull(
            f"{path}: {said} ({name}); nothing was changed: allow writing there, or open the store to read"
        )
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StoreError(f"{path}: busy for {BUSY_SECONDS:.0f} s ({said}); another program holds it: try again")
    if name.startswith("SQLITE_CANTOPEN"):
        return StoreError(f"{path}: {said}; check that the file is there and may be read")
    return StoreError(f"{path}: {said} ({name}); nothing was changed")
