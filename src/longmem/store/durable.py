"""Files that are there whole or not at all, errors of the file system in one line, and named points to die at.

A file is written under another name in ``staging/``, made durable (``fsync``), renamed, and its folder made durable.
What is promised: after a crash or a power loss a file is there as it was written, or not at all. Not promised: that a
disk which lies about ``fsync`` keeps it.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from longmem.errors import StoreDamaged, StoreError, StoreFull

FAILPOINTS = (
    "create.folder",  # the store's folder and its sub-folders exist, no catalog
    "create.catalog",  # the catalog file exists, without tables
    "create.done",
    "lock.taken",
    "sweep.unlinked",  # after each left-over that was removed
    "seal.removed",  # before the first transaction of a writer
    "seal.staged",
    "seal.placed",
    "commit.begun",  # all rows are written, the transaction is open
    "commit.done",
    "file.begun",  # an empty file stands in staging/
    "file.written",  # all bytes handed to the system, none forced to the disk
    "file.synced",
    "file.renamed",  # it has its name, the folder is not durable yet
    "file.placed",
    "add.encoded",  # after each batch
    "add.placed",  # a data file is in place, the catalog does not know it
    "add.committed",  # a part of a document, or some documents, are in the catalog
    "append.committed",
    "forget.committed",
    "compact.placed",
    "compact.committed",  # the catalog knows the new data file, the old ones are still there
    "compact.unlinked",  # after each old data file
    "compact.vacuumed",
    "compact.emptied",  # the write-ahead log is empty
    "migrate.begun",
    "migrate.step",  # after each numbered step, inside the transaction
    "migrate.done",
    "export.written",
    "import.placed",  # after each data file
    "import.committed",
    "repair.placed",
    "repair.committed",
    "close.emptied",
)
"""Where a test can make the process die, or the system call fail; see ``failpoint``."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


class _Armed:
    """The failpoint of ``LONGMEM_FAILPOINT=name[:n][=ERROR]``."""

    def __init__(self, setting: str) -> None:
        place, _, code = setting.partition("=")
        self.name, _, count = place.partition(":")
        self.left = int(count or 1)
        self.errno = getattr(errno, code) if code else None
        if self.name not in FAILPOINTS:
            raise StoreError(f"LONGMEM_FAILPOINT ({setting}) names no failpoint; there are: {', '.join(FAILPOINTS)}")

    def reached(self) -> None:
        self.left -= 1
        if self.left == 0:
            if self.errno is None:
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                raise OSError(self.errno, os.strerror(self.errno))


_armed = (
    {armed.name: armed for armed in [_Armed(os.environ["LONGMEM_FAILPOINT"])]}
    if ("LONGMEM_FAILPOINT" in os.environ)
    else {}
)


def failpoint(name: str) -> None:
    """Die here if the environment says so.

    ``LONGMEM_FAILPOINT=add.placed:3`` kills this process (SIGKILL) the third time it comes here;
    ``LONGMEM_FAILPOINT=file.written=ENOSPC`` raises that ``OSError`` instead. Read once, when this module is imported.
    """
    if name in _armed:
        _armed[name].reached()


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
        reason = os.strerror(error.errno) if error.errno else str(error)
        line = f"{path}: {reason} while {doing}"
        if error.errno in _NO_ROOM:
            raise StoreFull(
                f"{line}; nothing was changed: make room (`longmem memory compact` may help), then go on"
            ) from error
        if error.errno in _READ_ONLY:
            raise StoreFull(f"{line}; nothing was changed: allow writing there, or open the store to read") from error
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


@contextmanager
def placed(staging: Path, final: Path, *, fsync: bool = True) -> Iterator[BinaryIO]:
    """A binary file to write; it stands at ``final``, durable, once the block has ended without an exception.

    Args:
        staging: a folder on the same file system; holds the unfinished file, which is removed if anything fails.
        final: where it goes; what was there is replaced.

    Raises:
        StoreFull, StoreDamaged, StoreError: see ``file_errors``.
    """
    unfinished = staging / (final.name if staging != final.parent else f".{final.name}.partial")
    with file_errors(final, "writing"):
        try:
            with unfinished.open("wb") as stream:
                failpoint("file.begun")
                yield stream
                stream.flush()
                failpoint("file.written")
                if fsync:
                    os.fsync(stream.fileno())
            failpoint("file.synced")
            os.replace(unfinished, final)
        except BaseException:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise
        failpoint("file.renamed")
        sync_folder(final.parent)
        failpoint("file.placed")


def remove(path: Path) -> None:
    """Unlink a file if it is there, durably.

    Raises:
        StoreFull, StoreDamaged, StoreError: see ``file_errors``.
    """
    with file_errors(path, "removing"):
        path.unlink(missing_ok=True)
        sync_folder(path.parent)


def new_id() -> str:
    """16 random hex digits."""
    return os.urandom(8).hex()
