"""The open folder of a store: its documents, in SQLite, and its data files. A transaction is the only commit point.

Threads share one connection behind a lock. SQLite keeps POSIX locks on its file, which a process loses when it closes
*any* descriptor of it: nothing here opens the catalog but SQLite.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from longmem.errors import ConfigError, StoreDamaged, StoreError
from longmem.files import to_disk
from longmem.store.disk import (
    BUSY_SECONDS,
    FORMAT,
    Layout,
    StoredChunks,
    failpoint,
    file_errors,
    mapped,
    paths_of,
    sqlite_errors,
    writer_lock,
)
from longmem.store.encode import Tokens, composed, joined_tokens

CATALOG = "catalog.sqlite"
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


@dataclass(frozen=True)
class DocumentInfo:
    """A document of a namespace."""

    id: int  # its number in the store, never given again
    namespace: str
    name: str  # composed (Unicode NFC), as namespaces are
    source: str | None
    metadata: dict[str, Any]
    added: float  # its time, seconds since the epoch
    expires: float | None  # seconds since the epoch from which on it is not found any more
    tokens: int
    chunks: int
    revision: int  # 1, and one more at every append and replacement

    def expired(self, now: float) -> bool:
        """Whether it is not found any more."""
        return self.expires is not None and self.expires <= now


@dataclass(frozen=True)
class Selection:
    """Which documents of a namespace; all conditions hold together."""

    documents: Sequence[str] | None = None  # their names; None is all
    where: Mapping[str, Any] | None = None  # metadata that they have: every key with an equal value
    after: float | None = None  # added at this time (seconds since the epoch) or later
    before: float | None = None  # added before this time

    def __post_init__(self) -> None:
        if isinstance(self.documents, str):
            raise ConfigError(f"documents ({self.documents!r}) must be a list of names; write [{self.documents!r}]")

    def of(self, namespace: str, found: list[DocumentInfo]) -> list[DocumentInfo]:
        """Those of the namespace's documents that are meant; StoreError if one that was named is not there."""
        if self.documents is not None:
            names = {composed(name) for name in self.documents}
            if missing := sorted(names - {each.name for each in found}):
                raise no_document(namespace, missing[0])
            found = [each for each in found if each.name in names]
        after = -math.inf if self.after is None else self.after
        before = math.inf if self.before is None else self.before
        wanted, nothing = dict(self.where or {}), object()
        return [
            each
            for each in found
            if after <= each.added < before
            and all(each.metadata.get(key, nothing) == value for key, value in wanted.items())
        ]


def no_document(namespace: str, name: str) -> StoreError:
    """The error of a name that is not there."""
    return StoreError(f"namespace {namespace!r} has no document {name!r}; `longmem memory list` shows its names")


class Part(NamedTuple):
    """The first ``tokens`` tokens of a piece as the tokens from ``first_token`` on of a document."""

    piece: int
    first_token: int
    tokens: int
    digest: bytes  # of the whole piece


class Piece(NamedTuple):
    """A piece without its text; its chunks are the records from ``first`` on."""

    id: int
    digest: bytes
    tokens: int
    first: int
    chunks: int
    crc: int


class Catalog:
    """The open folder of a store.

    Args:
        folder: absolute.
        writable: whether it may be changed; one process at a time may.
        new: the layout of a store that is made where there is none; what a killed maker left is made whole.

    Attributes:
        layout: what is fixed for the whole store.
        pinned: numbers of pieces that unfinished adds count on, by who adds; ``compact`` leaves them.

    Raises:
        StoreLocked: another process writes to it.
        StoreDamaged: it cannot be read as what it is.
        StoreError: it cannot be opened, or another version wrote it.
    """

    def __init__(self, folder: Path, *, writable: bool, new: Layout | None = None) -> None:
        self.folder, self.writable = folder, writable
        self.path, self._log = folder / CATALOG, folder / f"{CATALOG}-wal"
        self.pinned: dict[object, set[int]] = {}
        self._guard, self._changing = threading.RLock(), threading.RLock()
        self._opener = os.getpid()
        self._mapped: tuple[int, StoredChunks] | None = None
        self._watched: list[object] | None = None  # where SQLite cannot tell us that a writer came
        with ExitStack() as ends:
            if writable:
                with file_errors(folder, "making the folder"):
                    folder.mkdir(parents=True, exist_ok=True)
                ends.enter_context(writer_lock(folder))
                failpoint("create.folder")
            self._db = self._connect(new is not None)
            ends.callback(self._db.close)
            with sqlite_errors(self.path):
                if new is not None and not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    self._make(new)
                self.layout = self._read_layout()
            if writable:  # data files that the catalog does not name are of a compact that was interrupted
                named = paths_of(folder, self.meta("generation"))
                self.remove(path for path in folder.glob("k*-*.bin") if path not in named)
            # also what nobody closed gives lock and connection back when it is collected
            self._ends = ends.pop_all()
            self._end = weakref.finalize(self, self._ends.close)

    def _connect(self, create: bool = False) -> sqlite3.Connection:
        how = "mode=rwc" if create else "mode=rw" if self.writable else "mode=ro"
        if not self.writable and not os.access(self.folder, os.W_OK) and not _sizes([self._log]):
            # SQLite could not make the files that it wants beside a write-ahead log
            how, self._watched = "mode=ro&immutable=1", self._state()
        with sqlite_errors(self.path), ExitStack() as undo:
            where = f"file:{quote(str(self.path))}?{how}"
            db = sqlite3.connect(where, BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=True)
            undo.callback(db.close)
            # a cut file is an error then, not a signal; no text comes into files outside of the store
            settings = ["trusted_schema = OFF", "mmap_size = 0", "temp_store = MEMORY"]
            if self.writable:
                journal = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
                if journal != "wal":
                    raise StoreError(
                        f"{self.path}: this file system does not support the shared memory of SQLite's write-ahead "
                        f"log (journal mode {journal}); keep the store on a local disk"
                    )
                settings += ["synchronous = FULL", "secure_delete = ON", "foreign_keys = ON"]
            for setting in settings:
                db.execute(f"PRAGMA {setting}")
            undo.pop_all()
        return db

    def _make(self, layout: Layout) -> None:
        with self.write() as db:
            for statement in SCHEMA.split(";"):
                db.execute(statement)
            rows = [("layout", json.dumps(asdict(layout))), ("generation", 1), ("records", 0)]
            db.executemany("INSERT INTO meta VALUES (?, ?)", rows)
            db.execute(f"PRAGMA user_version = {FORMAT}")
        to_disk(self.folder)
        to_disk(self.folder.parent)

    def _read_layout(self) -> Layout:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == FORMAT:
            try:
                return Layout.from_fields(json.loads(self.meta("layout")))
            except (ValueError, KeyError, TypeError) as error:
                raise StoreDamaged(f"{self.path}: its layout cannot be read ({error}); restore a backup") from error
        ways_out = {
            0: "this store was never finished; open it to write once, with its model, or delete the folder",
            1: f"a store of format 1, this version reads {FORMAT}; write each namespace to a file with `longmem memory "
            "export` of longmem 0.1, and read it into a new store with `longmem memory import`",
        }
        newer = f"format {version}, this version reads {FORMAT}; use a newer longmem"
        raise StoreError(f"{self.folder}: {ways_out.get(version, newer)}")

    def close(self) -> None:
        """Close; a writer empties the write-ahead log if no reader needs it."""
        with self._changing, self._guard:
            try:
                if self.writable:
                    with suppress(StoreError):  # the log itself is durable
                        self.empty_log(0.0)
            finally:
                self._end()

    # states and transactions

    def writing(self) -> threading.RLock:
        """A lock to hold while data files and catalog are changed, so that threads do it one after the other.

        Raises StoreError where the store was opened to read, or by the parent of this process.
        """
        if not self.writable:
            raise StoreError(f"{self.folder}: opened to read; open it with mode='write'")
        if self._opener != os.getpid():
            raise StoreError(f"{self.folder}: opened by process {self._opener}; open it in this process")
        return self._changing

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
        other = Catalog(self.folder, writable=False)
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
                self._ends.callback(self._db.close)
            others = self._db.execute("PRAGMA data_version").fetchone()[0]  # commits of other connections
            return self._watched, self._db.total_changes, others

    def _state(self) -> list[object]:
        """Size and time of the files, for a folder in which SQLite may not watch a writer."""
        found = [path.stat() if path.exists() else None for path in (self.path, self._log)]
        return [status and (status.st_ino, status.st_size, status.st_mtime_ns) for status in found]

    def vacuum(self) -> None:
        """Write the whole catalog anew, without what was freed."""
        with self._guard, sqlite_errors(self.path):
            self._db.execute("VACUUM")

    def empty_log(self, seconds: float = READER_SECONDS) -> bool:
        """Bring the write-ahead log into the catalog and cut it; False where a reader needs it for longer."""
        with self._guard, sqlite_errors(self.path):
            self._db.execute(f"PRAGMA busy_timeout = {int(seconds * 1000)}")
            try:
                return not self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            finally:
                self._db.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")

    # data files

    def end(self) -> tuple[int, int]:
        """Generation of the data files, and how many records they hold."""
        with self.read():
            return self.meta("generation"), self.meta("records")

    def chunks(self) -> StoredChunks:
        """The records of the data files as the catalog's present state has them; call it inside of ``read``.

        Raises GenerationGone where ``compact`` of another process has just replaced them: read the catalog again.
        """
        generation, count = self.end()
        if self._mapped is None or self._mapped[0] != generation or len(self._mapped[1]) < count:
            self._mapped = generation, mapped(self.folder, self.layout, generation, count)
        return self._mapped[1]

    def remove(self, paths: Iterable[Path]) -> None:
        """Unlink data files, durably; a map would keep their bytes on the disk."""
        with self._guard:
            self._mapped = None
        removed = list(paths)
        for path in removed:
            with file_errors(path, "removing"):
                path.unlink(missing_ok=True)
            failpoint("compact.unlinked")
        if removed:
            to_disk(self.folder)

    def sizes(self) -> tuple[int, int]:
        """Bytes of the data files, and of the catalog with its log."""
        with self.read():
            files = paths_of(self.folder, self.meta("generation"))
        return _sizes(files), _sizes((self.path, self._log))

    # what is in it

    def row(self, query: str, *given: Any) -> Any:
        """The first row of a query, None if there is none."""
        with self.read() as db:
            return db.execute(query, given).fetchone()

    def meta(self, key: str) -> Any:
        """``layout`` (JSON), ``generation`` of the data files, or ``records``: chunks in them."""
        return self.row("SELECT value FROM meta WHERE key = ?", key)[0]

    def documents(
        self, namespace: str | None = None, selection: Selection | None = None, *, expired: bool = False
    ) -> list[DocumentInfo]:
        """Documents of a namespace, or of all, by time and number; ``expired``: also those past their time."""
        where, given = ("", ()) if namespace is None else ("WHERE namespace = ?", (composed(namespace),))
        with self.read() as db:
            rows = db.execute(f"SELECT {_FIELDS} FROM document {where} ORDER BY added, id", given)
            found = [self._info(row) for row in rows]
        if not expired:
            now = time.time()
            found = [each for each in found if not each.expired(now)]
        return found if selection is None else selection.of(namespace or "", found)

    def find(self, namespace: str, name: str) -> DocumentInfo | None:
        """The document of this name, expired or not."""
        names = composed(namespace), composed(name)
        row = self.row(f"SELECT {_FIELDS} FROM document WHERE namespace = ? AND name = ?", *names)
        return None if row is None else self._info(row)

    def live(self, namespace: str, name: str) -> DocumentInfo:
        """The document of this name; StoreError if there is none, or it has expired."""
        found = self.find(namespace, name)
        if found is None or found.expired(time.time()):
            raise no_document(namespace, name)
        return found

    def _info(self, row: tuple[Any, ...]) -> DocumentInfo:
        number, namespace, name, source, metadata, added, expires, tokens, revision = row
        try:
            about = json.loads(metadata)
        except ValueError as error:
            raise StoreDamaged(f"{self.path}: metadata of document {name!r} is no JSON ({error})") from error
        chunks = self.layout.chunks(tokens)
        return DocumentInfo(number, namespace, name, source, about, added, expires, tokens, chunks, revision)

    def parts(self, document: int) -> list[Part]:
        """Of a document, in order."""
        with self.read() as db:
            query = (
                "SELECT piece, first_token, part.tokens, digest FROM part LEFT JOIN piece ON piece.id = piece "
                "WHERE document = ? ORDER BY ordinal"
            )
            return [Part(*row) for row in db.execute(query, (document,))]

    def pieces(self) -> list[Piece]:
        """All of them, in the order of the data files."""
        with self.read() as db:
            query = "SELECT id, digest, tokens, first, count, crc FROM piece ORDER BY first"
            return [Piece(*row) for row in db.execute(query)]

    def tokens(self, piece: int) -> Tokens:
        """Token ids and text of a piece; StoreDamaged where they are cut."""
        ids, text, starts = self.row("SELECT token_ids, text, starts FROM piece WHERE id = ?", piece)
        try:
            return Tokens(np.frombuffer(ids, "<u4"), text, None if starts is None else np.frombuffer(starts, "<u4"))
        except ValueError as error:
            raise StoreDamaged(f"{CATALOG}, piece {piece}: its token ids are cut; restore a backup") from error

    def whole(self, document: DocumentInfo, start: int = 0, stop: int = 1 << 62) -> Tokens:
        """The tokens of a document, or those from ``start`` to ``stop``."""
        with self.read():
            runs = [
                self.tokens(piece).slice(max(0, start - first), min(tokens, stop - first))
                for piece, first, tokens, _ in self.parts(document.id)
                if first < stop and start < first + tokens
            ]
        return joined_tokens(runs)


def _sizes(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.exists())
