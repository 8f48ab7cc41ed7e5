"""The catalog: what the store holds, in SQLite; a transaction of it is the only commit point.

A writer has two connections, one to write and one to read, so that reading is a consistent snapshot in every process,
the writer's included.
"""

from __future__ import annotations

import logging
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from longmem.errors import LongMemError, StoreDamaged, StoreError
from longmem.store.durable import failpoint, file_errors, sync_folder
from longmem.store.held import HeldFile
from longmem.store.lock import WriterLock, read_holder
from longmem.store.migrations import MIGRATIONS, SCHEMA, expected_schema, migrate, schema_number, schema_of
from longmem.store.records import Layout
from longmem.store.schema import MetaRow
from longmem.store.seal import SEAL, check_seal, remove_seal, write_seal
from longmem.store.snapshot import Snapshot
from longmem.store.sqlite import connect, sqlite_errors
from longmem.store.transaction import Transaction

log = logging.getLogger(__name__)
CATALOG = "catalog.sqlite"


class Catalog:
    """The open catalog of a store's folder.

    Args:
        folder: of the store.
        lock: of the writer; None reads only.
        check: compare the catalog with its seal, and its schema with ours, first; without, what is damaged can be
            looked at.

    Raises:
        StoreDamaged: it is not what was written.
        StoreError: it cannot be opened, or a newer version wrote it.
    """

    def __init__(self, folder: Path, lock: WriterLock | None = None, *, check: bool = True) -> None:
        self.folder = folder
        self.path = folder / CATALOG
        self.sealed = False
        self._lock = lock
        self._guard = threading.RLock()
        self._depth = 0
        self._copy: tempfile.TemporaryDirectory[str] | None = None
        self._watched: tuple[object, ...] | None = None  # where SQLite cannot tell us that a writer came
        self._generation = 0
        self._layout: Layout | None = None
        self.trusted = check  # a catalog that was not checked is not sealed
        self.unsettled = False  # a commit failed in a way that may still come true after a crash
        self._open(check)

    # opening and closing

    @classmethod
    def create(cls, folder: Path, lock: WriterLock, layout: Layout) -> Catalog:
        """A catalog with tables, the layout and nothing else; what an interrupted ``create`` left is made whole."""
        connection = connect(folder / CATALOG, "create")
        try:
            failpoint("create.catalog")
            with sqlite_errors(folder / CATALOG):
                connection.execute("BEGIN IMMEDIATE")
                try:
                    migrate(connection)
                    tx = Transaction(connection, folder / CATALOG)
                    for key, value in layout.to_meta().items():
                        tx.insert(MetaRow(key, value))
                    tx.write_totals()
                    connection.execute("COMMIT")
                except BaseException:
                    _roll_back(connection)
                    raise
            with file_errors(folder, "writing"):
                sync_folder(folder)
        finally:
            connection.close()
        failpoint("create.done")
        return cls(folder, lock)

    def _open(self, check: bool) -> None:
        self._file = HeldFile(self.path)
        self._write: sqlite3.Connection | None = None
        self._read: sqlite3.Connection | None = None
        try:
            holder = read_holder(self.folder)  # before the catalog: a writer beside us only adds to it
            self.sealed = check_seal(self.folder, self._file) if check else False
            if self._lock is not None:
                self._write = connect(self.path, "rw")
                self._migrate(self._write)
            self._read = self._reader()
            self._check_schema(self._read)
            if check:
                self.check_schema()
            if check and holder is not None:
                self.check_commits(holder.commits)
        except BaseException:
            self.close(seal=False)
            raise

    def _connect_reader(self) -> sqlite3.Connection:
        return connect(*self._reads)

    def _reader(self) -> sqlite3.Connection:
        self._reads: tuple[Path, Literal["ro", "immutable"]] = (self.path, "ro")
        try:
            connection = self._connect_reader()
            try:
                with sqlite_errors(self.path):
                    connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            except BaseException:
                connection.close()
                raise
            return connection
        except StoreDamaged:
            raise
        except StoreError:
            # a folder that cannot be written, without the files that SQLite wants beside a write-ahead log
            if self._lock is not None:
                raise
            return self._reader_of_read_only_folder()

    def _reader_of_read_only_folder(self) -> sqlite3.Connection:
        log_file = self.folder / f"{CATALOG}-wal"
        self._watched = self._state_of_files()
        with file_errors(log_file, "looking at"):
            has_log = log_file.exists() and log_file.stat().st_size > 0
        if not has_log:
            self._reads = (self.path, "immutable")
            return self._connect_reader()
        # the log of a writer that crashed has to be played back, which needs a folder that can be written: a copy
        self._copy = tempfile.TemporaryDirectory(prefix="longmem-catalog-")
        copied = Path(self._copy.name) / CATALOG
        with file_errors(copied, "copying the catalog of a read-only folder"):
            with copied.open("wb") as stream:
                for _, data in self._file.slabs():
                    stream.write(data)
            copied.with_name(f"{CATALOG}-wal").write_bytes(log_file.read_bytes())
        self._reads = (copied, "ro")
        return self._connect_reader()

    def _state_of_files(self) -> tuple[object, ...]:
        state: list[object] = []
        for name in (CATALOG, f"{CATALOG}-wal", SEAL):
            try:
                status = (self.folder / name).stat()
                state.append((status.st_ino, status.st_size, status.st_mtime_ns))
            except OSError:
                state.append(None)
        return tuple(state)

    def _look_again(self) -> None:
        """Open anew if the files of a read-only folder were changed by somebody who may write there."""
        if self._depth == 0 and self._watched is not None and self._watched != self._state_of_files():
            self.close(seal=False)
            self._watched = None
            self._generation += 1
            self._open(True)

    def _migrate(self, connection: sqlite3.Connection) -> None:
        with sqlite_errors(self.path):
            have = schema_number(connection)
            if have in (0, len(MIGRATIONS)) or have > len(MIGRATIONS):
                return
            remove_seal(self.folder)
            connection.execute("BEGIN IMMEDIATE")
            try:
                migrate(connection)
                connection.execute("COMMIT")
            except BaseException:
                _roll_back(connection)
                raise
        self.sealed = False
        failpoint("migrate.done")

    def _check_schema(self, connection: sqlite3.Connection) -> None:
        with sqlite_errors(self.path):
            have, newest = schema_number(connection), len(MIGRATIONS)
            if have == 0 and not schema_of(connection):
                raise StoreError(
                    f"{self.path}: this store was never finished; open it to write once, or delete the folder"
                )
            if have > newest:
                raise StoreError(f"{self.path}: schema {have}, this version knows {newest}; use a newer longmem")
            if have < newest and self._lock is None:
                raise StoreError(f"{self.path}: schema {have}, this version reads {newest}; open it to write once")

    def check_schema(self) -> None:
        """Compare the tables with those of our newest schema.

        Raises:
            StoreDamaged: they differ.
        """
        with self.snapshot() as snapshot:
            found = snapshot.raw(SCHEMA).fetchall()
        if found != expected_schema():
            raise StoreDamaged(f"{self.path}: its tables are not those of schema {len(MIGRATIONS)}; restore a backup")

    def check_commits(self, noted: int) -> None:
        """Compare the number of transactions with the one noted beside the catalog.

        Raises:
            StoreDamaged: some are lost.
        """
        with self.snapshot() as snapshot:
            have = snapshot.commits()
        if have < noted:
            raise StoreDamaged(
                f"{self.path}: {have} transactions where {noted} were committed: the write-ahead log beside it was cut,"
                " damaged or left behind; restore a backup, or accept the older state (what was added since is "
                "lost, what was forgotten since is there again) with `longmem memory verify --repair`"
            )

    def close(self, *, seal: bool = True) -> None:
        """Close; a writer empties the write-ahead log and seals the catalog if no reader holds it back.

        What cannot be sealed (a full disk) stays as it is: whole, but without a seal.
        """
        with self._guard:
            if self._read is not None:
                self._read.close()
                self._read = None
            if self._write is not None:
                try:
                    if seal and self.trusted and not self.sealed and self.empty_log(seconds=1.0):
                        failpoint("close.emptied")
                        write_seal(self.folder, self._file)
                        self.sealed = True
                except LongMemError as error:
                    log.warning("the catalog is left without a seal: %s", error)
                finally:
                    self._write.close()
                    self._write = None
            self._file.close()
            if self._copy is not None:
                self._copy.cleanup()
                self._copy = None

    # reading

    @property
    def layout(self) -> Layout:
        """What is fixed for the whole store."""
        if self._layout is None:
            with self.snapshot() as snapshot:
                self._layout = snapshot.layout
        return self._layout

    @contextmanager
    def snapshot(self, *, own: bool = False) -> Iterator[Snapshot]:
        """One consistent state, as long as the block lasts; inside another one of this thread, the same state.

        Args:
            own: with a connection of its own, so that other threads need not wait for the end of a long block.
        """
        if own:
            with self._guard:
                self._reading()
                connection = self._connect_reader()
            try:
                with sqlite_errors(self.path):
                    connection.execute("BEGIN")
                    connection.execute("SELECT count(*) FROM meta").fetchone()
                    yield Snapshot(connection, self.path, self._layout)
            finally:
                connection.close()
            return
        with self._guard, sqlite_errors(self.path):
            connection = self._reading()
            if self._depth == 0:
                connection.execute("BEGIN")
                connection.execute("SELECT count(*) FROM meta").fetchone()  # the state is fixed at the first read
            self._depth += 1
            try:
                yield Snapshot(connection, self.path, self._layout)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    _roll_back(connection)

    def version(self) -> tuple[int, int]:
        """Another value whenever this or another process has changed the catalog; takes microseconds."""
        with self._guard, sqlite_errors(self.path):
            return self._generation, int(self._reading().execute("PRAGMA data_version").fetchone()[0])

    @property
    def disk_bytes(self) -> int:
        """Of the catalog and its write-ahead log, on disk."""
        log_file = self.folder / f"{CATALOG}-wal"
        with file_errors(log_file, "looking at"):
            return self._file.size + (log_file.stat().st_size if log_file.exists() else 0)

    @property
    def file(self) -> HeldFile:
        """The bytes of the catalog's file."""
        return self._file

    # writing

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Change the catalog: all of the block, or nothing if it raises.

        Raises:
            StoreFull: it could not be written.
            StoreDamaged: what it reads is not what was written.
        """
        with self._guard:
            connection = self._writer()
            if self.sealed or (self.folder / SEAL).exists():
                remove_seal(self.folder)
                self.sealed = False
            with sqlite_errors(self.path):
                connection.execute("BEGIN IMMEDIATE")
                try:
                    tx = Transaction(connection, self.path, self._layout)
                    yield tx
                    commits = tx.write_totals()
                    failpoint("commit.begun")
                    try:
                        connection.execute("COMMIT")
                    except sqlite3.Error as error:
                        self.unsettled = "IOERR" in (error.sqlite_errorname or "")
                        raise
                except BaseException:
                    _roll_back(connection)
                    raise
            self.unsettled = False
            failpoint("commit.done")
            assert self._lock is not None
            with suppress(StoreError):  # it is committed; the note only helps to notice a lost log
                self._lock.committed(commits)

    def settle(self) -> bool:
        """Whether no failed commit can come true any more, not even after a crash."""
        if self.unsettled:
            with suppress(LongMemError):
                self.unsettled = not self.empty_log(seconds=1.0)
        return not self.unsettled

    def empty_log(self, seconds: float = 20.0) -> bool:
        """Bring the write-ahead log into the catalog's file, and cut it; False if a reader's snapshot holds it back."""
        with self._guard, sqlite_errors(self.path):
            connection = self._writer()
            connection.execute(f"PRAGMA busy_timeout = {int(seconds * 1000)}")
            try:
                return bool(connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0)
            finally:
                connection.execute("PRAGMA busy_timeout = 20000")

    def vacuum(self) -> None:
        """Write the catalog anew, without free space."""
        with self._guard:
            connection = self._writer()
            remove_seal(self.folder)
            self.sealed = False
            with sqlite_errors(self.path):
                connection.execute("VACUUM")

    def rebuild(self) -> None:
        """Make the indices and the whole file anew from the tables."""
        with self._guard, sqlite_errors(self.path):
            remove_seal(self.folder)
            self.sealed = False
            self._writer().execute("REINDEX")
        self.vacuum()

    def note_commits(self) -> None:
        """Take the number of transactions that the catalog has for the right one."""
        assert self._lock is not None
        with self.snapshot() as snapshot:
            self._lock.committed(snapshot.commits())

    def seal(self) -> bool:
        """Seal the catalog now; False if a reader's snapshot holds the write-ahead log back."""
        with self._guard:
            self.trusted = True
            if not self.empty_log():
                return False
            write_seal(self.folder, self._file)
            self.sealed = True
            return True

    def _reading(self) -> sqlite3.Connection:
        if self._read is not None:
            self._look_again()
        if self._read is None:
            raise StoreError(f"{self.folder}: the store was closed; open it again")
        return self._read

    def _writer(self) -> sqlite3.Connection:
        if self._write is None:
            reason = "was opened to read; open it with mode='write'" if self._read is not None else "was closed"
            raise StoreError(f"{self.folder}: the store {reason}")
        if self._lock is not None and not self._lock.held:
            raise StoreError(
                f"{self.folder}: the store was opened before this process was forked; open it again in here"
            )
        return self._write


def _roll_back(connection: sqlite3.Connection) -> None:
    with suppress(sqlite3.Error):
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def unfinished(folder: Path) -> bool:
    """Whether the folder has no catalog, or one whose making was interrupted."""
    path = folder / CATALOG
    if not path.exists():
        return True
    connection = connect(path, "ro")
    try:
        with sqlite_errors(path):
            return schema_number(connection) == 0 and not schema_of(connection)
    finally:
        connection.close()
