"""Files of a store: records of chunks, read by map; the writer's lock; errors of the system in one line.

A generation is two files of records of a fixed size, only ever appended. ``kv-NNNNNN.bin`` holds for every chunk its
keys and values (H, 2, S, D); ``keys-NNNNNN.bin`` its mean keys (H, D) float32 and, with int8, its scales (H, 2)
float32: a search reads all mean keys and few values. The catalog says how many records there are; bytes beyond them
were never committed and are overwritten.

n chunks · H heads of all layers · S tokens per chunk · D head_dim
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import socket
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longmem.errors import StoreDamaged, StoreError, StoreFull, StoreLocked
from longmem.files import to_disk
from longmem.memory.chunks import mean_keys
from longmem.store.records import DTYPES, Dtype, Layout

LOCK = "writer.lock"
reached: Callable[[str], object] = lambda name: None  # noqa: E731


def failpoint(name: str) -> None:
    """A place where tests let the process die, or a call of the system fail, by their own ``reached``."""
    reached(name)


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
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            way_out = "nothing was changed: make room (`longmem memory compact` may help), then go on"
            raise StoreFull(f"{line}; {way_out}") from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise StoreFull(f"{line}; nothing was changed: allow writing there, or open with mode='read'") from error
        if error.errno == errno.EIO:
            raise StoreDamaged(f"{line}; the device fails: save what can be read and restore a backup") from error
        raise StoreError(f"{line}; nothing was changed") from error


class WriterLock:
    """The right to write, held (``flock``) until ``release`` or the end of the process.

    Raises:
        StoreLocked: another process, or another object in this one, has it; names it.
        StoreFull: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.pid = os.getpid()
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv else ""
        me = {
            "pid": self.pid,
            "host": socket.gethostname(),
            "command": command.encode("ascii", "replace").decode().strip()[:400] or "python",
            "since": time.time(),
        }
        with file_errors(folder / LOCK, "opening to write"):
            self._file = (folder / LOCK).open("a")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._file.truncate(0)
                self._file.write(json.dumps(me))
                self._file.flush()
            except BaseException as error:
                self._file.close()
                if isinstance(error, BlockingIOError):
                    raise StoreLocked(_holder(folder)) from error
                raise

    def release(self) -> None:
        """Let others write."""
        if not self._file.closed:
            if os.getpid() == self.pid:  # a forked child has the same lock: its parent keeps it
                fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / LOCK).read_bytes())
        since = datetime.fromtimestamp(holder["since"]).astimezone().isoformat(sep=" ", timespec="seconds")
        who = f"process {holder['pid']} on {holder['host']} (`{holder['command']}`) has been writing since {since}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process is writing to this store"
    return f"{folder}: {who}; wait for it, or open the store with mode='read'"


Numbers = NDArray[np.int64]
_STORED = {"float32": "<f4", "float16": "<f2", "bfloat16": "<i2", "int8": "<i1"}  # bfloat16 as its bits
REPAIR = "`longmem memory verify --repair` makes it again from the token ids"


class GenerationGone(StoreDamaged):
    """The data files are missing: ``compact`` removed them after the catalog was read (read it again), or lost."""


@dataclass(frozen=True)
class StoredChunks:
    """Chunks in the number format of the store; bfloat16 as the 16-bit integers of its bits."""

    kv: NDArray[Any]  # (n, H, 2, S, D), zeros behind the real tokens of a short chunk
    keys: NDArray[np.float32]  # (n, H, D), mean of the unrounded keys
    scales: NDArray[np.float32] | None = None  # (n, H, 2) with int8: number = integer * scale

    def __len__(self) -> int:
        return len(self.kv)

    def run(self, first: int, count: int) -> StoredChunks:
        """Chunks that follow one another: views."""
        some = slice(first, first + count)
        return StoredChunks(self.kv[some], self.keys[some], None if self.scales is None else self.scales[some])

    def raw(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Records of the two files, (n, bytes) each."""
        small = [each.reshape(len(self), -1) for each in (self.keys, self.scales) if each is not None]
        keys = np.ascontiguousarray(np.concatenate(small, axis=1))
        return np.ascontiguousarray(self.kv).reshape(len(self), -1).view(np.uint8), keys.view(np.uint8)

    def crc(self) -> int:
        """CRC-32 of the records, those of the first file first."""
        kv, keys = self.raw()
        return zlib.crc32(keys.data, zlib.crc32(kv.data))


def pack(chunks: Tensor, lengths: Tensor, dtype: Dtype) -> StoredChunks:
    """Chunks of the backbone's keys and values, rounded for the store.

    Args:
        chunks: (n, H, 2, S, D) float32, zeros behind the real tokens.
        lengths: (n,) real tokens, at least 1.

    Raises:
        StoreError: a number that this format cannot hold, or one that is not finite.
    """
    largest = torch.stack(torch.aminmax(chunks)).abs().amax() if len(chunks) else chunks.new_zeros(())
    if not bool(torch.isfinite(largest if dtype == "int8" else largest.to(DTYPES[dtype]))):
        raise StoreError(
            f"keys or values up to {float(largest):g} cannot be stored as {dtype}; "
            "make the store with dtype='bfloat16', which has the range of float32"
        )
    keys = mean_keys(chunks, lengths).contiguous().numpy()
    if dtype == "int8":  # integers in -127..127, and a scale for each chunk, head, and key or value
        most = chunks.abs().amax(dim=(3, 4))
        scales = torch.where(most > 0, most / 127.0, torch.ones_like(most))
        integers = torch.round(chunks / scales[..., None, None]).clamp_(-127, 127).to(torch.int8)
        return StoredChunks(integers.contiguous().numpy(), keys, scales.contiguous().numpy())
    rounded = chunks.to(DTYPES[dtype])
    return StoredChunks((rounded.view(torch.int16) if dtype == "bfloat16" else rounded).contiguous().numpy(), keys)


def paths_of(folder: Path, generation: int) -> tuple[Path, Path]:
    """The two files of a generation."""
    return folder / f"kv-{generation:06d}.bin", folder / f"keys-{generation:06d}.bin"


def mapped(folder: Path, layout: Layout, generation: int, count: int) -> StoredChunks:
    """The first ``count`` records of a generation, to read; they stay readable after the files were removed.

    Raises:
        GenerationGone: a file is missing.
        StoreDamaged: a file is shorter than ``count`` records.
    """
    heads, size, dim = layout.heads, layout.chunk_size, layout.head_dim
    kv, keys = paths_of(folder, generation)
    small = _mapped(keys, count, layout.key_bytes).view("<f4").reshape(count, layout.key_bytes // 4)
    return StoredChunks(
        _mapped(kv, count, layout.record_bytes).view(_STORED[layout.dtype]).reshape(count, heads, 2, size, dim),
        small[:, : heads * dim].reshape(count, heads, dim),
        small[:, heads * dim :].reshape(count, heads, 2) if layout.dtype == "int8" else None,
    )


def _mapped(path: Path, count: int, size: int) -> NDArray[np.uint8]:
    if not count:
        return np.zeros(0, np.uint8)
    try:
        with file_errors(path, "opening"), path.open("rb") as stream:
            length = os.fstat(stream.fileno()).st_size
            if length < count * size:
                raise StoreDamaged(f"{path}: {length} bytes where {count * size} were written; {REPAIR}")
            # a private, writable map of more than the machine's memory would be refused
            return np.frombuffer(mmap.mmap(stream.fileno(), count * size, access=mmap.ACCESS_READ), np.uint8)
    except StoreError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise GenerationGone(f"{path}: this data file is missing; {REPAIR}") from error
        raise


def append(folder: Path, layout: Layout, generation: int, first: int, runs: Sequence[StoredChunks]) -> None:
    """Write chunks as the records from ``first`` on; durable when this returns, known once the catalog counts them.

    Raises:
        StoreFull: no room; both files are as they were.
    """
    made = False
    sizes = (layout.record_bytes, layout.key_bytes)
    raw = zip(*(run.raw() for run in runs), strict=True)
    for path, size, parts in zip(paths_of(folder, generation), sizes, raw, strict=True):
        with file_errors(path, "writing"):
            made |= not path.exists()
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.ftruncate(handle, first * size)
                place = first * size
                for part in parts:
                    rest = part.reshape(-1).data
                    while rest:  # a full disk may take a part first and refuse the rest
                        done = os.pwrite(handle, rest, place)
                        rest, place = rest[done:], place + done
                failpoint("append.written")
                os.fsync(handle)
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(handle, first * size)
                raise
            finally:
                os.close(handle)
    if made:
        to_disk(folder)
    failpoint("append.synced")
