"""Reading the bytes of the catalog's file beside SQLite.

SQLite keeps POSIX locks on the file, and POSIX drops all locks that a process has on a file as soon as the process
closes *any* descriptor of it. A descriptor of ours therefore stays open until the last catalog on that file in this
process is closed. (For the same reason no program should open ``catalog.sqlite`` while it has the store open.)
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from longmem.store.durable import file_errors

_lock = threading.Lock()
_open: dict[tuple[int, int], tuple[list[int], int]] = {}  # of a file (device, inode): descriptors, and users
_SLAB = 1 << 22


class HeldFile:
    """The bytes of a file that SQLite has open, too. Open before SQLite does, close after."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with file_errors(path, "opening"):
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self._handle)
        self._key = (status.st_dev, status.st_ino)
        with _lock:
            handles, users = _open.get(self._key, ([], 0))
            _open[self._key] = ([*handles, self._handle], users + 1)
        self._closed = False

    def close(self) -> None:
        """No more reading; the descriptors go with the last user of the file."""
        if self._closed:
            return
        self._closed = True
        with _lock:
            handles, users = _open.pop(self._key)
            if users > 1:
                _open[self._key] = (handles, users - 1)
                return
            for handle in handles:
                os.close(handle)

    @property
    def size(self) -> int:
        """Size now."""
        return os.fstat(self._handle).st_size

    def slabs(self, overlap: int = 0) -> Iterator[tuple[int, bytes]]:
        """The file in parts of some MiB, each with its offset, and with the last ``overlap`` bytes before it."""
        offset = 0
        while True:
            with file_errors(self.path, "reading"):
                data = os.pread(self._handle, _SLAB + overlap, offset)
            if not data:
                return
            yield offset, data
            if len(data) <= overlap:
                return
            offset += len(data) - overlap

    def sha256(self) -> tuple[int, str]:
        """Bytes read and their SHA-256, hex."""
        digest, size = hashlib.sha256(), 0
        for _, data in self.slabs():
            digest.update(data)
            size += len(data)
        return size, digest.hexdigest()
