"""One writer at a time: ``writer.lock`` is locked (``flock``) by the process that writes, and says which one that is.

It also holds how many transactions were committed: a catalog that has fewer has lost some (a write-ahead log that was
cut, damaged or left behind when copying), which SQLite by itself would not notice.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
import zlib
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from weakref import WeakSet

from longmem.errors import StoreLocked
from longmem.store.durable import failpoint, file_errors

LOCK = "writer.lock"
_BYTES = 2048  # the record is written in one piece of this size


@dataclass(frozen=True)
class Holder:
    """Who writes, or wrote last.

    Attributes:
        pid: process id.
        host: its machine.
        command: what it runs.
        since: seconds since the epoch.
        commits: transactions of the store that are committed for certain.
    """

    pid: int
    host: str
    command: str
    since: float
    commits: int


_locks: WeakSet[WriterLock] = WeakSet()


def _let_go_in_child() -> None:
    """A forked child must not keep the lock of its parent beyond the parent's end."""
    for lock in list(_locks):
        lock.release()


os.register_at_fork(after_in_child=_let_go_in_child)


class WriterLock:
    """The right to write, until ``release`` or the end of the process."""

    def __init__(self, handle: int, path: Path, holder: Holder) -> None:
        self._handle = handle
        self._path = path
        self.holder = holder
        _locks.add(self)

    @property
    def held(self) -> bool:
        """Whether this process may write; a forked child of it may not."""
        return self._handle >= 0

    @classmethod
    def acquire(cls, folder: Path) -> WriterLock:
        """Take the lock.

        Raises:
            StoreLocked: another process, or another object in this one, has it; names it.
            StoreFull: the folder cannot be written.
        """
        path = folder / LOCK
        with file_errors(path, "opening to write"):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                taken = _take(handle)
            except BaseException:
                os.close(handle)
                raise
        if not taken:
            os.close(handle)
            raise StoreLocked(_who(folder))
        before = read_holder(folder)
        holder = Holder(
            os.getpid(), socket.gethostname()[:100], _command(), time.time(), before.commits if before else 0
        )
        lock = cls(handle, path, holder)
        try:
            lock._write(holder)
        except BaseException:
            lock.release()
            raise
        failpoint("lock.taken")
        return lock

    def committed(self, commits: int) -> None:
        """Note that so many transactions are committed for certain."""
        self._write(replace(self.holder, commits=commits))

    def release(self) -> None:
        """Let others write."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _write(self, holder: Holder) -> None:
        fields = json.dumps(asdict(holder))
        record = json.dumps({**asdict(holder), "check": zlib.crc32(fields.encode())}).encode()
        with file_errors(self._path, "writing"):
            os.pwrite(self._handle, record.ljust(_BYTES - 1) + b"\n", 0)
        self.holder = holder


def _take(handle: int) -> bool:
    for attempt in range(5):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if attempt < 4:
                time.sleep(0.05)  # a reader that looks whether somebody writes has it for a moment
        else:
            return True
    return False


def _command() -> str:
    words = [Path(sys.argv[0]).name, *sys.argv[1:]] if sys.argv else []
    return " ".join(words).encode("ascii", "replace").decode().strip()[:400] or "python"


def read_holder(folder: Path) -> Holder | None:
    """Who writes or wrote last; None where that cannot be told."""
    try:
        fields = json.loads((folder / LOCK).read_bytes())
        check = fields.pop("check")
        holder = Holder(**fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return holder if zlib.crc32(json.dumps(asdict(holder)).encode()) == check else None


def is_locked(folder: Path) -> bool:
    """Whether somebody writes now."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    else:
        return False
    finally:
        os.close(handle)


def _who(folder: Path) -> str:
    holder = read_holder(folder)
    if holder is None:
        return f"{folder}: another process is writing to this store; wait for it, or open the store with mode='read'"
    since = datetime.fromtimestamp(holder.since).astimezone().isoformat(sep=" ", timespec="seconds")
    return (
        f"{folder}: process {holder.pid} on {holder.host} (`{holder.command}`) has been writing to this store since "
        f"{since}; wait for it, or open the store with mode='read'"
    )
