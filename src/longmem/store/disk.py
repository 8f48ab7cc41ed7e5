"""Files of a store: errors of the system in one line, the writer's lock, and named points for tests to die at."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from longmem.errors import StoreDamaged, StoreError, StoreFull, StoreLocked

FAILPOINTS = (
    "create.folder",  # the folder and the lock exist, no catalog
    "append.written",  # chunks are in the data files, not durable, unknown to the catalog
    "append.synced",
    "commit.begun",  # all rows are written, the transaction is open
    "commit.done",
    "compact.copied",  # the new generation is complete, the catalog still names the old one
    "compact.committed",  # the catalog names the new generation, the old files are still there
    "compact.unlinked",
    "compact.vacuumed",
    "export.written",
)
"""Where a test can make the process die, or a call of the system fail; see ``failpoint``."""

LOCK = "writer.lock"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
_reached: dict[str, int] = {}


def failpoint(name: str) -> None:
    """Die or fail here if the environment says so.

    ``LONGMEM_FAILPOINT=commit.begun:3`` kills this process (SIGKILL) the third time that it comes here;
    ``LONGMEM_FAILPOINT=append.written=ENOSPC`` raises that ``OSError`` instead.
    """
    place, _, code = os.environ.get("LONGMEM_FAILPOINT", "").partition("=")
    wanted, _, count = place.partition(":")
    if wanted == name:
        _reached[name] = _reached.get(name, 0) + 1
        if _reached[name] == int(count or 1):
            if not code:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))


@contextmanager
def file_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn an ``OSError`` of the block into one clear line.

    Raises:
        StoreFull: no room, a quota, a size limit, or a read-only place.
        StoreDamaged: the device cannot read.
        StoreError: any other failure.
    """
    try:
        yield
    except OSError as error:
        line = f"{path}: {os.strerror(error.errno) if error.errno else error} while {doing}"
        if error.errno in _NO_ROOM:
            raise StoreFull(
                f"{line}; nothing was changed: make room (`longmem memory compact` may help), then go on"
            ) from error
        if error.errno in _READ_ONLY:
            raise StoreFull(f"{line}; nothing was changed: allow writing there, or open with mode='read'") from error
        if error.errno == errno.EIO:
            raise StoreDamaged(f"{line}; the device fails: save what can be read and restore a backup") from error
        raise StoreError(f"{line}; nothing was changed") from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class WriterLock:
    """The right to write, held (``flock``) until ``release`` or the end of the process.

    Raises:
        StoreLocked: another process, or another object in this one, has it; names it.
        StoreFull: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.pid = os.getpid()
        with file_errors(folder / LOCK, "opening to write"):
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(_me()).encode(), 0)
            except BlockingIOError as error:
                os.close(handle)
                raise StoreLocked(_who(folder)) from error
            except BaseException:
                os.close(handle)
                raise
        self._handle = handle

    def release(self) -> None:
        """Let others write."""
        if self._handle >= 0:
            if os.getpid() == self.pid:  # a forked child has the same lock: its parent keeps it
                fcntl.flock(self._handle, fcntl.LOCK_UN)
            os.close(self._handle)
            self._handle = -1


def _me() -> dict[str, object]:
    words = [Path(sys.argv[0]).name, *sys.argv[1:]] if sys.argv else []
    command = " ".join(words).encode("ascii", "replace").decode().strip()[:400] or "python"
    return {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "since": time.time()}


def _who(folder: Path) -> str:
    try:
        holder = json.loads((folder / LOCK).read_bytes())
        since = datetime.fromtimestamp(holder["since"]).astimezone().isoformat(sep=" ", timespec="seconds")
        who = f"process {holder['pid']} on {holder['host']} (`{holder['command']}`) has been writing since {since}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process is writing to this store"
    return f"{folder}: {who}; wait for it, or open the store with mode='read'"
