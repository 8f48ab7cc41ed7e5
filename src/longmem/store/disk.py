"""Files of a store: records of chunks, read by map; errors of the system in one line; the writer's lock.

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
import signal
import socket
import sys
import time
import zlib
from collections.abc import Iterator
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
from longmem.memory.chunks import mean_keys
from longmem.store.records import DTYPES, Dtype, Layout

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

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return self.kv.nbytes + self.keys.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def raw(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Records of the two files, (n, bytes) each."""
        small = [self.keys.reshape(len(self), -1)]
        if self.scales is not None:
            small.append(self.scales.reshape(len(self), -1))
        keys = np.ascontiguousarray(np.concatenate(small, axis=1) if len(small) > 1 else small[0])
        return np.ascontiguousarray(self.kv).reshape(len(self), -1).view(np.uint8), keys.view(np.uint8)

    def crc(self) -> int:
        """CRC-32 of the records, those of the first file first."""
        kv, keys = self.raw()
        return zlib.crc32(keys.data, zlib.crc32(kv.data))


def joined(parts: list[StoredChunks]) -> StoredChunks:
    """Runs of chunks, one after the other."""
    scales = [part.scales for part in parts if part.scales is not None]
    return StoredChunks(
        np.concatenate([part.kv for part in parts]),
        np.concatenate([part.keys for part in parts]),
        np.concatenate(scales) if scales else None,
    )


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


class Arrays:
    """The first ``count`` records of a generation, mapped to read; stays readable after its files were removed.

    Raises:
        GenerationGone: a file is missing.
        StoreDamaged: a file is shorter than ``count`` records.
    """

    def __init__(self, folder: Path, layout: Layout, generation: int, count: int) -> None:
        self.layout, self.generation, self.count = layout, generation, count
        heads, size, dim = layout.heads, layout.chunk_size, layout.head_dim
        kv, keys = paths_of(folder, generation)
        self.kv: NDArray[Any] = _mapped(kv, count, layout.record_bytes).view(_STORED[layout.dtype])
        self.kv = self.kv.reshape(count, heads, 2, size, dim)
        small = _mapped(keys, count, layout.key_bytes).view("<f4").reshape(count, layout.key_bytes // 4)
        self.keys: NDArray[np.float32] = small[:, : heads * dim].reshape(count, heads, dim)
        self.scales: NDArray[np.float32] | None = None
        if layout.dtype == "int8":
            self.scales = small[:, heads * dim :].reshape(count, heads, 2)

    def chunks(self, first: int, count: int) -> StoredChunks:
        """A run of chunks: views of the map."""
        run = slice(first, first + count)
        return StoredChunks(self.kv[run], self.keys[run], None if self.scales is None else self.scales[run])

    def gather(self, chunks: Numbers, heads: Numbers, dtype: torch.dtype) -> Tensor:
        """Single heads of chunks, a copy (p, 2, S, D) on the CPU; only their bytes are read from disk.

        Args:
            chunks: (p,) records.
            heads: (p,) the head wanted of each.
            dtype: to compute in.
        """
        kv = torch.from_numpy(self.kv.reshape(-1, *self.kv.shape[2:])[chunks * self.layout.heads + heads])
        if self.scales is not None:
            scales = torch.from_numpy(self.scales[chunks, heads])
            return (kv.to(torch.float32) * scales[..., None, None]).to(dtype)
        return (kv.view(torch.bfloat16) if self.layout.dtype == "bfloat16" else kv).to(dtype)


def paths_of(folder: Path, generation: int) -> tuple[Path, Path]:
    """The two files of a generation."""
    return folder / f"kv-{generation:06d}.bin", folder / f"keys-{generation:06d}.bin"


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


def append(folder: Path, layout: Layout, generation: int, first: int, runs: list[StoredChunks]) -> None:
    """Write chunks as the records from ``first`` on; durable when this returns, known once the catalog counts them.

    Raises:
        StoreFull: no room; both files are as they were.
    """
    raw = [run.raw() for run in runs]
    made = False
    for path, size, parts in zip(
        paths_of(folder, generation), (layout.record_bytes, layout.key_bytes), zip(*raw, strict=True), strict=True
    ):
        with file_errors(path, "writing"):
            made |= not path.exists()
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.ftruncate(handle, first * size)
                place = first * size
                for part in parts:
                    place = _write(handle, part, place)
                failpoint("append.written")
                os.fsync(handle)
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(handle, first * size)
                raise
            finally:
                os.close(handle)
    if made:
        sync_folder(folder)
    failpoint("append.synced")


def _write(handle: int, data: NDArray[np.uint8], place: int) -> int:
    """Write all of it at ``place``; where it ends. A full disk may take a part first and refuse the rest."""
    rest = data.reshape(-1).data
    while rest:
        done = os.pwrite(handle, rest, place)
        rest, place = rest[done:], place + done
    return place
