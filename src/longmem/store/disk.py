"""Files of a store: their layout, records of chunks, read by map; the writer's lock; errors of the system in one line.

A generation is two files of records of a fixed size, only ever appended. ``kv-NNNNNN.bin`` holds for every chunk its
keys and values (H, 2, S, D); ``keys-NNNNNN.bin`` its mean keys (H, D) float32 and, with int8, its scales (H, 2)
float32: a search reads all mean keys and few values. The catalog says how many records there are; bytes beyond them
were never committed and are overwritten.

c chunks · n remembered layers · Hkv key/value heads of one layer · H = n * Hkv · S tokens per chunk · D head_dim
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import socket
import sqlite3
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from longmem.errors import StoreDamaged, StoreError, StoreFull, StoreLocked
from longmem.files import to_disk
from longmem.memory.index import mean_keys

Dtype = Literal["float32", "float16", "bfloat16", "int8"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
FORMAT = 2
PIECE_SEGMENTS = 16
"""Of one piece, at most: the unit of deduplication, of check sums and of resuming an add."""


@dataclass(frozen=True)
class Layout:
    """What is fixed when a store is made; equal token ids in equal layouts leave equal tensors."""

    store_id: str  # 16 random hex digits
    fingerprint: str  # of the backbone whose keys and values are kept
    backbone: str  # its name
    memory_layers: tuple[int, ...]  # the remembered layers, 0-based, ascending
    heads_kv: int  # Hkv
    head_dim: int  # D
    chunk_size: int  # S
    segment_tokens: int  # T, tokens that the backbone sees together; a multiple of S
    dtype: Dtype  # of the stored keys and values
    created: float  # seconds since the epoch
    format: int = FORMAT  # of the files

    @property
    def heads(self) -> int:
        """H: the heads of a stored chunk, those of the first layer first."""
        return len(self.memory_layers) * self.heads_kv

    @property
    def piece_tokens(self) -> int:
        """Tokens of a whole piece."""
        return PIECE_SEGMENTS * self.segment_tokens

    @property
    def record_bytes(self) -> int:
        """Bytes of one chunk's keys and values, (H, 2, S, D)."""
        return self.heads * 2 * self.chunk_size * self.head_dim * DTYPES[self.dtype].itemsize

    @property
    def key_bytes(self) -> int:
        """Bytes of one chunk's mean keys, (H, D) float32, and with int8 its scales, (H, 2) float32."""
        return 4 * self.heads * (self.head_dim + (2 if self.dtype == "int8" else 0))

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk in the data files."""
        return self.record_bytes + self.key_bytes

    def chunks(self, tokens: int) -> int:
        """Chunks of a run of tokens; the last one may be short."""
        return -(-tokens // self.chunk_size)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Layout:
        """The inverse of ``asdict``, also of a layout of format 1, which names one ``memory_layer``."""
        known = {**fields}
        if "memory_layer" in known:
            known["memory_layers"] = (known.pop("memory_layer"),)
        return cls(**{**known, "memory_layers": tuple(known["memory_layers"]), "format": FORMAT})


def token_bytes(heads_kv: int, head_dim: int, dtype: Dtype) -> dict[str, float]:
    """Bytes that a token of one remembered layer takes, in chunks of four tokens.

    Returns:
        ``keys_values`` in the data files; ``chunk_keys``, float32: what a search reads, and what an open bank holds;
        and ``disk``, all of it, with token ids and text in the catalog (an estimate of 12 bytes).
    """
    layout = Layout("", "", "", (0,), heads_kv, head_dim, 4, 4, dtype, created=0.0)
    disk = layout.chunk_bytes / 4 + 12
    return {"keys_values": layout.record_bytes / 4, "chunk_keys": float(heads_kv * head_dim), "disk": disk}


@dataclass(frozen=True)
class Progress:
    """How far a long piece of work is."""

    step: str  # ``encode``, ``check``, ``rewrite`` or ``copy``
    done: int  # so far, in ``unit``
    total: int | None  # None where it is not known (a stream)
    unit: str  # ``tokens``, ``bytes`` or ``pieces``
    name: str  # the document or file at hand


Report = Callable[[Progress], object]
"""Called with the progress of long work; an exception that it raises ends the work with everything as before."""

LOCK = "writer.lock"
BUSY_SECONDS = 20.0
"""How long SQLite waits for another program."""
reached: Callable[[str], object] = lambda name: None  # noqa: E731


def failpoint(name: str) -> None:
    """A place where tests let the process die, or a call of the system fail, by their own ``reached``."""
    reached(name)


@contextmanager
def file_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn an ``OSError`` of the block into a StoreError of one clear line."""
    try:
        yield
    except OSError as error:
        line = f"{path}: {os.strerror(error.errno) if error.errno else error} while {doing}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            way_out = "nothing was changed: make room (`longmem memory compact` may help), then go on"
            raise StoreFull(f"{line}; {way_out}") from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise StoreFull(f"{line}; nothing was changed: allow writing there, or open with mode='read'") from error
        raise StoreError(f"{line}; nothing was changed") from error


_NO_ROOM = ("SQLITE_FULL", *(f"SQLITE_IOERR_{what}" for what in ("WRITE", "FSYNC", "TRUNCATE", "SHM", "DIR_FSYNC")))
_WAYS_OUT: tuple[tuple[str | tuple[str, ...], type[StoreError], str], ...] = (
    (_NO_ROOM, StoreFull, "nothing was changed: make room, then go on"),
    (("SQLITE_READONLY", "SQLITE_PERM"), StoreFull, "nothing was changed: allow writing, or open with mode='read'"),
    (("SQLITE_BUSY", "SQLITE_LOCKED"), StoreError, f"another program held it for {BUSY_SECONDS:.0f} s: try again"),
    ("SQLITE_CANTOPEN", StoreError, "check that it may be read; a log beside it must first be brought in by a writer"),
    ("SQLITE_", StoreDamaged, "restore a backup, or run `longmem memory verify`"),
)


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Turn an error of SQLite into a StoreError of one clear line."""
    try:
        yield
    except sqlite3.ProgrammingError as error:
        raise StoreError(f"{path}: {error}; the store was closed: open it again") from error
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", None) or "SQLITE_ERROR"
        kind, way_out = next((kind, way_out) for names, kind, way_out in _WAYS_OUT if name.startswith(names))
        said = " ".join(str(error).split())[:200]  # SQLite quotes what it cannot read, of any length
        raise kind(f"{path}: {said} ({name}); {way_out}") from error


@contextmanager
def writer_lock(folder: Path) -> Iterator[None]:
    """The right to write (``flock``), held while the block lasts or until the process ends.

    Raises StoreLocked where another process, or another object in this one, has it, and names it.
    """
    pid, (program, *arguments) = os.getpid(), sys.argv or [""]
    command = " ".join([Path(program).name or "python", *arguments]).encode("ascii", "replace").decode()[:400]
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    with ExitStack() as ends:
        with file_errors(folder / LOCK, "opening to write"):
            file = ends.enter_context((folder / LOCK).open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                who = " ".join((folder / LOCK).read_text(errors="replace").split()) or "another process writes to it"
                raise StoreLocked(f"{folder}: {who}; wait for it; meanwhile it can be read (mode='read')") from error
            file.truncate(0)
            file.write(f"process {pid} on {socket.gethostname()} (`{command}`) has been writing since {since}")
            file.flush()
        try:
            yield
        finally:
            if os.getpid() == pid:  # a forked child has the same lock: its parent keeps it
                fcntl.flock(file, fcntl.LOCK_UN)


Numbers = NDArray[np.int64]
_STORED = {"float32": "<f4", "float16": "<f2", "bfloat16": "<i2", "int8": "<i1"}  # bfloat16 as its bits
Found = TypeVar("Found")
REPAIR = "`longmem memory verify --repair` makes it again from the token ids"


class GenerationGone(StoreDamaged):
    """The data files are missing: ``compact`` removed them after the catalog was read (read it again), or lost."""


def until_found(read: Callable[[], Found]) -> Found:
    """What a reading of catalog and data files gives, again where ``compact`` has replaced the files meanwhile.

    Raises StoreDamaged where the same files are missing twice: they are lost.
    """
    missed = ""
    while True:
        try:
            return read()
        except GenerationGone as gone:
            if str(gone) == missed:
                raise
            missed = str(gone)


@dataclass(frozen=True)
class StoredChunks:
    """Chunks in the number format of the store; bfloat16 as the 16-bit integers of its bits."""

    kv: NDArray[Any]  # (c, H, 2, S, D), zeros behind the real tokens of a short chunk
    keys: NDArray[np.float32]  # (c, H, D), mean of the unrounded keys
    scales: NDArray[np.float32] | None = None  # (c, H, 2) with int8: number = integer * scale

    def __len__(self) -> int:
        return len(self.kv)

    def run(self, first: int, count: int) -> StoredChunks:
        """Chunks that follow one another: views."""
        some = slice(first, first + count)
        return StoredChunks(self.kv[some], self.keys[some], None if self.scales is None else self.scales[some])

    def numbers(self, records: Numbers, heads: Numbers) -> Tensor:
        """Keys and values (M, 2, S, D) of chunks (M,) and heads (M,), copied, as the numbers that they stand for."""
        kv = torch.from_numpy(self.kv[records, heads])
        if kv.dtype == torch.int16:  # the bits of bfloat16
            return kv.view(torch.bfloat16)
        if self.scales is None:
            return kv
        return kv.to(torch.float32) * torch.from_numpy(self.scales[records, heads])[..., None, None]

    def raw(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Records of the two files, (c, bytes) each."""
        small = [each.reshape(len(self), -1) for each in (self.keys, self.scales) if each is not None]
        keys = np.ascontiguousarray(np.concatenate(small, axis=1))
        return np.ascontiguousarray(self.kv).reshape(len(self), -1).view(np.uint8), keys.view(np.uint8)

    def crc(self) -> int:
        """CRC-32 of the records, those of the first file first."""
        kv, keys = self.raw()
        return zlib.crc32(keys.data, zlib.crc32(kv.data))


def pack(pair: Tensor, layout: Layout) -> StoredChunks:
    """Keys and values (H, 2, t, D) float32 of a piece as chunks, rounded for the store; only the last may be short.

    Raises StoreError where a number is not finite, or too large for this format.
    """
    size, dtype = layout.chunk_size, layout.dtype
    count = layout.chunks(pair.shape[2])
    lengths = torch.full((count,), size)
    lengths[-1] = pair.shape[2] - (count - 1) * size
    whole = functional.pad(pair, (0, 0, 0, count * size - pair.shape[2]))
    chunks = whole.unflatten(2, (count, size)).permute(2, 0, 1, 3, 4).contiguous()
    largest = torch.stack(torch.aminmax(chunks)).abs().amax()
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
    small = _mapped(keys, "<f4", count, layout.key_bytes // 4)
    return StoredChunks(
        _mapped(kv, _STORED[layout.dtype], count, heads, 2, size, dim),
        small[:, : heads * dim].reshape(count, heads, dim),
        small[:, heads * dim :].reshape(count, heads, 2) if layout.dtype == "int8" else None,
    )


def _mapped(path: Path, dtype: str, *shape: int) -> NDArray[Any]:
    if not shape[0]:
        return np.zeros(shape, dtype)
    wanted = math.prod(shape) * np.dtype(dtype).itemsize
    with file_errors(path, "opening"):
        try:
            if (length := path.stat().st_size) < wanted:
                raise StoreDamaged(f"{path}: {length} bytes where {wanted} were written; {REPAIR}")
            return np.asarray(np.memmap(path, dtype, "r", shape=shape))
        except FileNotFoundError as error:
            raise GenerationGone(f"{path}: this data file is missing; {REPAIR}") from error


def append_chunks(folder: Path, layout: Layout, generation: int, first: int, runs: Iterable[StoredChunks]) -> int:
    """Write chunks as the records from ``first`` on; durable when this returns, known once the catalog counts them.

    Returns:
        the first record after them.

    Raises:
        StoreFull: no room; both files are as they were.
    """
    coming = iter(runs)
    if (head := next(coming, None)) is None:
        return first
    paths, sizes = paths_of(folder, generation), (layout.record_bytes, layout.key_bytes)
    made, end = not all(path.exists() for path in paths), first
    with ExitStack() as ends:
        handles = []
        for path in paths:
            with file_errors(path, "writing"):
                handles.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
                ends.callback(os.close, handles[-1])
        try:
            for run in chain([head], coming):
                for path, handle, size, data in zip(paths, handles, sizes, run.raw(), strict=True):
                    place, rest = end * size, data.reshape(-1).data
                    with file_errors(path, "writing"):
                        while rest:  # a full disk may take a part first and refuse the rest
                            done = os.pwrite(handle, rest, place)
                            rest, place = rest[done:], place + done
                end += len(run)
            with file_errors(folder, "writing"):
                failpoint("append.written")
                for handle in handles:
                    os.fsync(handle)
        except BaseException:
            for handle, size in zip(handles, sizes, strict=True):
                with suppress(OSError):
                    os.ftruncate(handle, first * size)
            raise
    if made:
        to_disk(folder)
    failpoint("append.synced")
    return end
