"""The catalog: what the store holds, in SQLite. One transaction of it is the only commit point.

Threads share one connection behind a lock. SQLite keeps POSIX locks on its file, which a process loses when it closes
*any* descriptor of it: nothing here opens the catalog but SQLite.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from longmem.errors import LongMemError, StoreDamaged, StoreError, StoreFull
from longmem.store.disk import failpoint
from longmem.store.encode import Tokens, joined_tokens
from longmem.store.records import FORMAT, DocumentInfo, Layout

CATALOG = "catalog.sqlite"
BUSY_SECONDS = 20.0
READER_SECONDS = 2.0
"""How long ``compact`` waits for readers in a snapshot."""
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
CREATE TABLE piece (id INTEGER PRIMARY KEY AUTOINCREMENT, digest BLOB UNIQUE NOT NULL, tokens INTEGER NOT NULL,
    first INTEGER NOT NULL, count INTEGER NOT NULL, crc INTEGER NOT NULL,
    token_ids BLOB NOT NULL, text TEXT, starts BLOB);
CREATE TABLE document (id INTEGER PRIMARY KEY AUTOINCREMENT, namespace TEXT NOT NULL, name TEXT NOT NULL, source TEXT,
    metadata TEXT NOT NULL, added REAL NOT NULL, expires REAL, tokens INTEGER NOT NULL, revision INTEGER NOT NULL,
    UNIQUE (namespace, name));
CREATE TABLE part (document INTEGER NOT NULL REFERENCES document ON DELETE CASCADE, ordinal INTEGER NOT NULL,
    piece INTEGER NOT NULL REFERENCES piece, first_token INTEGER NOT NULL, tokens INTEGER NOT NULL,
    PRIMARY KEY (document, ordinal)) WITHOUT ROWID;
CREATE INDEX part_piece ON part (piece);
"""
_FIELDS = "id, namespace, name, source, metadata, added, expires, tokens, revision"


def insert(db: sqlite3.Connection, table: str, **row: Any) -> int:
    """A row more; its number."""
    places = ", ".join("?" * len(row))
    found = db.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({places})", tuple(row.values())).lastrowid
    assert found is not None
    return found


class Part(NamedTuple):
    """The first ``tokens`` tokens of a piece as the tokens from ``first_token`` on of a document."""

    piece: int
    first_token: int
    tokens: int


class Catalog:
    """The open catalog of a store's folder.

    Args:
        path: of the file, absolute.
        writable: whether it may be changed.
        new: the layout of a store that is made now; what a killed maker left is made whole.

    Raises:
        StoreDamaged: it cannot be read as what it is.
        StoreError: it cannot be opened, or another version wrote it.
    """

    def __init__(self, path: Path, *, writable: bool, new: Layout | None = None) -> None:
        self.path, self.writable = path, writable
        self._guard = threading.RLock()
        self._connections = 0
        self._closed = False
        self._watched: tuple[object, ...] | None = None  # where SQLite cannot tell us that a writer came
        self._db = self._connect(new is not None)
        try:
            with sqlite_errors(path):
                if new is not None:
                    self._make(new)
                self.layout = self._read_layout()
        except BaseException:
            self._db.close()
            raise

    def _connect(self, create: bool = False) -> sqlite3.Connection:
        how = "mode=rwc" if create else "mode=rw" if self.writable else "mode=ro"
        if self.writable:
            for each in (self.path, *(self.path.with_name(f"{CATALOG}-{kind}") for kind in ("wal", "shm"))):
                if each.exists() and not os.access(each, os.W_OK):  # else SQLite complains at the first change only
                    raise StoreFull(f"{each}: may not be written; allow writing there, or open with mode='read'")
        elif not os.access(self.path.parent, os.W_OK):
            log = self.path.with_name(f"{CATALOG}-wal")
            if not (log.exists() and log.stat().st_size):
                # SQLite could not make the files that it wants beside a write-ahead log
                how, self._watched = "mode=ro&immutable=1", self._state()
        with sqlite_errors(self.path):
            where = f"file:{quote(str(self.path))}?{how}"
            db = sqlite3.connect(where, BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=True)
            try:
                db.execute("PRAGMA trusted_schema = OFF")
                db.execute("PRAGMA mmap_size = 0")  # a cut file is then an error, not a signal
                db.execute("PRAGMA temp_store = MEMORY")  # no text in files outside of the store
                if self.writable:
                    self._prepare(db)
            except BaseException:
                db.close()
                raise
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        journal = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if journal != "wal":
            raise StoreError(
                f"{self.path}: this file system does not support the shared memory of SQLite's write-ahead log "
                f"(journal mode {journal}); keep the store on a local disk"
            )
        for setting in ("synchronous = FULL", "secure_delete = ON", "foreign_keys = ON"):
            db.execute(f"PRAGMA {setting}")

    def _make(self, layout: Layout) -> None:
        if self._db.execute("PRAGMA user_version").fetchone()[0]:
            return
        with self.write() as db:
            for statement in SCHEMA.split(";"):
                db.execute(statement)
            rows = [("layout", layout.to_json()), ("generation", 1), ("records", 0)]
            db.executemany("INSERT INTO meta VALUES (?, ?)", rows)
            db.execute(f"PRAGMA user_version = {FORMAT}")

    def _read_layout(self) -> Layout:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        folder = self.path.parent
        if version == 0:
            raise StoreError(f"{folder}: this store was never finished; open it to write once, or delete the folder")
        if version == 1:
            raise StoreError(
                f"{folder}: a store of format 1, this version reads {FORMAT}; write each namespace to a file with "
                "`longmem memory export` of longmem 0.1, and read it into a new store with `longmem memory import`"
            )
        if version != FORMAT:
            raise StoreError(f"{folder}: format {version}, this version reads {FORMAT}; use a newer longmem")
        try:
            return Layout.from_fields(json.loads(self.meta("layout")))
        except (ValueError, KeyError, TypeError) as error:
            raise StoreDamaged(f"{self.path}: its layout cannot be read ({error}); restore a backup") from error

    def close(self) -> None:
        """Close; a writer empties the write-ahead log if no reader needs it."""
        with self._guard:
            if not self._closed and self.writable:
                with suppress(StoreError):  # the log itself is durable
                    self.empty_log(0.0)
            self._closed = True
            self._db.close()

    # states and transactions

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """One consistent state while the block lasts; other threads wait."""
        with self._guard, sqlite_errors(self.path):
            if self._db.in_transaction:
                yield self._db
                return
            self._db.execute("BEGIN")
            try:
                yield self._db
            finally:
                self._db.rollback()

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of the block's changes, durable when it ends, or none."""
        with self._guard, sqlite_errors(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                failpoint("commit.begun")
                self._db.execute("COMMIT")
            except BaseException:
                self._db.rollback()
                raise
            failpoint("commit.done")

    @contextmanager
    def apart(self) -> Iterator[Catalog]:
        """One state for long reading, in a connection of its own: threads do not wait for it."""
        other = Catalog(self.path, writable=False)
        try:
            with other.read():
                yield other
        finally:
            other.close()

    def version(self) -> tuple[object, ...]:
        """Another value whenever any process has changed the catalog; takes microseconds."""
        with self._guard, sqlite_errors(self.path):
            if self._watched is not None and self._watched != self._state():
                self._db.close()
                self._watched = None
                self._db = self._connect()
                self._connections += 1
            others = self._db.execute("PRAGMA data_version").fetchone()[0]  # commits of other connections
            return self._connections, self._db.total_changes, others

    def _state(self) -> tuple[object, ...]:
        """Size and time of the files, for a folder in which SQLite may not watch a writer."""
        found: list[object] = []
        for name in (CATALOG, f"{CATALOG}-wal"):
            path = self.path.with_name(name)
            status = path.stat() if path.exists() else None
            found.append(None if status is None else (status.st_ino, status.st_size, status.st_mtime_ns))
        return tuple(found)

    def empty_log(self, seconds: float = READER_SECONDS) -> bool:
        """Bring the write-ahead log into the catalog and cut it; False where a reader needs it for longer."""
        with self._guard, sqlite_errors(self.path):
            self._db.execute(f"PRAGMA busy_timeout = {int(seconds * 1000)}")
            try:
                return not self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            finally:
                self._db.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")

    def vacuum(self) -> None:
        """Write the whole catalog anew, without what was freed."""
        with self._guard, sqlite_errors(self.path):
            self._db.execute("VACUUM")

    @property
    def disk_bytes(self) -> int:
        """Of the catalog and its log."""
        paths = (self.path, self.path.with_name(f"{CATALOG}-wal"))
        return sum(path.stat().st_size for path in paths if path.exists())

    # what is in it

    def meta(self, key: str) -> Any:
        """``layout`` (JSON), ``generation`` of the data files, or ``records``: chunks in them."""
        row = self.row("SELECT value FROM meta WHERE key = ?", key)
        if row is None:
            raise StoreDamaged(f"{self.path}: {key} is missing; restore a backup")
        return row[0]

    def row(self, query: str, *given: Any) -> Any:
        """The first row of a query, None if there is none."""
        with self.read() as db:
            return db.execute(query, given).fetchone()

    def documents(self, namespace: str | None = None, *, expired: bool = False) -> list[DocumentInfo]:
        """Documents of a namespace, or of all, by time and number; ``expired``: also those past their time."""
        where, given = ("", ()) if namespace is None else ("WHERE namespace = ?", (namespace,))
        with self.read() as db:
            rows = db.execute(f"SELECT {_FIELDS} FROM document {where} ORDER BY added, id", given)
            found = [self._info(row) for row in rows]
        now = time.time()
        return [each for each in found if expired or not each.expired(now)]

    def find(self, namespace: str, name: str) -> DocumentInfo | None:
        """The document of this name, expired or not."""
        row = self.row(f"SELECT {_FIELDS} FROM document WHERE namespace = ? AND name = ?", namespace, name)
        return None if row is None else self._info(row)

    def live(self, namespace: str, name: str) -> DocumentInfo:
        """The document of this name.

        Raises:
            StoreError: there is none, or it has expired.
        """
        found = self.find(namespace, name)
        if found is None or found.expired(time.time()):
            raise StoreError(f"namespace {namespace!r} has no document {name!r}; `longmem memory list` shows its names")
        return found

    def _info(self, row: Sequence[Any]) -> DocumentInfo:
        try:
            metadata = json.loads(row[4])
        except ValueError as error:
            raise StoreDamaged(f"{self.path}: metadata of document {row[2]!r} is no JSON ({error})") from error
        number, namespace, name, source, _, added, expires, tokens, revision = row
        chunks = self.layout.chunks(tokens)
        return DocumentInfo(number, namespace, name, source, metadata, added, expires, tokens, chunks, revision)

    def parts(self, document: int) -> list[Part]:
        """Of a document, in order."""
        with self.read() as db:
            rows = db.execute(
                "SELECT piece, first_token, tokens FROM part WHERE document = ? ORDER BY ordinal", (document,)
            )
            return [Part(*row) for row in rows]

    def tokens(self, piece: int) -> Tokens:
        """Token ids and text of a piece."""
        row = self.row("SELECT token_ids, text, starts FROM piece WHERE id = ?", piece)
        if row is None:
            raise StoreDamaged(f"{self.path}: piece {piece} is missing; run `longmem memory verify`")
        return Tokens.from_columns(*row)

    def whole(self, document: DocumentInfo) -> Tokens:
        """All tokens of a document."""
        with self.read():
            return joined_tokens([self.tokens(part.piece).slice(0, part.tokens) for part in self.parts(document.id)])

    def piece_of(self, digest: bytes) -> int | None:
        """The number of the piece with this digest, if it is there."""
        row = self.row("SELECT id FROM piece WHERE digest = ?", digest)
        return None if row is None else int(row[0])

    def dead_tokens(self) -> int:
        """Tokens of pieces that no document uses."""
        return int(self.row("SELECT total(tokens) FROM piece WHERE id NOT IN (SELECT piece FROM part)")[0])


def matches(document: DocumentInfo, where: Mapping[str, Any] | None) -> bool:
    """Whether a document's metadata has every key of ``where`` with an equal value."""
    return all(key in document.metadata and document.metadata[key] == value for key, value in (where or {}).items())


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Turn errors of SQLite into one clear line.

    Raises:
        StoreDamaged: the catalog cannot be read as what it is.
        StoreFull: no room, or no right to write.
        StoreError: busy, closed, or cannot be opened.
    """
    try:
        yield
    except sqlite3.Error as error:
        raise _translated(error, path) from error


def _translated(error: sqlite3.Error, path: Path) -> LongMemError:
    if isinstance(error, sqlite3.ProgrammingError):
        return StoreError(f"{path}: {error}; the store was closed: open it again")
    name = getattr(error, "sqlite_errorname", None) or "SQLITE_ERROR"
    said = " ".join(str(error).split())[:200]  # SQLite quotes what it cannot read, of any length
    if name.startswith("SQLITE_FULL") or name in _UNWRITABLE:
        return StoreFull(f"{path}: {said} ({name}); nothing was changed: make room, then go on")
    if name.startswith(("SQLITE_READONLY", "SQLITE_PERM")):
        return StoreFull(f"{path}: {said} ({name}); nothing was changed: allow writing there, or open with mode='read'")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StoreError(f"{path}: busy for {BUSY_SECONDS:.0f} s ({said}); another program holds it: try again")
    if name.startswith("SQLITE_CANTOPEN"):
        return StoreError(
            f"{path}: {said}; check that it may be read (a write-ahead log in a read-only folder must first be "
            "brought in by a writer)"
        )
    return StoreDamaged(f"{path}: {said} ({name}); restore a backup, or run `longmem memory verify`")


_UNWRITABLE = {
    f"SQLITE_IOERR_{what}" for what in ("WRITE", "FSYNC", "TRUNCATE", "SHMOPEN", "SHMSIZE", "SHMMAP", "DIR_FSYNC")
}
