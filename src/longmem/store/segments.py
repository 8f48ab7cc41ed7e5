"""Data files: immutable, memory-mapped, in the safetensors format, every 64 KiB block with a CRC-32 in the catalog.

A file of n chunks holds ``keys`` (n, Hkv, D) F32, ``lengths`` (n,) I32, with int8 ``scales`` (n, Hkv, 2) F32, and
``kv`` (n, Hkv, 2, S, D), in this order without gaps; its header is a function of its id, n and the layout, padded with
spaces to a multiple of 64 bytes. A block is compared with its CRC the first time that it is read.

n chunks · Hkv key/value heads · S tokens per chunk · D head_dim
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longmem.errors import StoreDamaged, StoreError
from longmem.store.durable import file_errors, placed
from longmem.store.precision import StoredChunks, unpack
from longmem.store.records import DTYPES, Layout
from longmem.store.schema import FileRow

BLOCK = 1 << 16
FILE_BYTES = 64 << 20
"""A data file is closed before it would grow beyond this; a single content may be larger."""
_ALIGNMENT = 64
_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.int16, "I8": np.int8, "I32": np.int32}


class SegmentGone(StoreDamaged):
    """A data file is missing: ``compact`` removed it after the catalog was read (read that again), or it is lost."""


def file_name(name: str) -> str:
    """Of the data file with this id."""
    return f"{name}.safetensors"


class Arrangement:
    """Where everything is in the data file of ``chunks`` chunks with this id.

    Attributes:
        header: its first bytes.
        arrays: name to (first byte, shape, safetensors type).
        bytes: size of the file.
    """

    def __init__(self, name: str, chunks: int, layout: Layout) -> None:
        heads, dim, size = layout.heads_kv, layout.head_dim, layout.chunk_size
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            "keys": ("F32", (chunks, heads, dim)),
            "lengths": ("I32", (chunks,)),
        }
        if layout.dtype == "int8":
            shapes["scales"] = ("F32", (chunks, heads, 2))
        shapes["kv"] = (DTYPES[layout.dtype][2], (chunks, heads, 2, size, dim))
        fields: dict[str, Any] = {"__metadata__": {"format": "longmem-segment-1", "id": name}}
        offset, begins = 0, {}
        for array, (kind, shape) in shapes.items():
            end = offset + math.prod(shape) * np.dtype(_NUMPY[kind]).itemsize
            fields[array] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
            begins[array], offset = offset, end
        text = json.dumps(fields, separators=(",", ":")).encode()
        text = text.ljust(-(-(len(text) + 8) // _ALIGNMENT) * _ALIGNMENT - 8)
        self.header = struct.pack("<Q", len(text)) + text
        self.arrays = {
            array: (len(self.header) + begins[array], shape, kind) for array, (kind, shape) in shapes.items()
        }
        self.bytes = len(self.header) + offset


class BlockSums:
    """CRC-32 of every 64 KiB of a stream of bytes."""

    def __init__(self) -> None:
        self._done: list[int] = []
        self._current, self._filled = 0, 0
        self.bytes = 0

    def update(self, data: memoryview) -> None:
        """The next bytes."""
        self.bytes += len(data)
        start = 0
        while start < len(data):
            part = data[start : start + BLOCK - self._filled]
            self._current = zlib.crc32(part, self._current)
            self._filled += len(part)
            start += len(part)
            if self._filled == BLOCK:
                self._done.append(self._current)
                self._current, self._filled = 0, 0

    def packed(self) -> bytes:
        """All of them, 4 bytes each, little-endian; the last block may be short."""
        sums = [*self._done, self._current] if self._filled else self._done
        return struct.pack(f"<{len(sums)}I", *sums)


class OtherBits(StoreError):
    """What was to be written again did not come out as it was."""


def write_file(
    staging: Path,
    folder: Path,
    name: str,
    parts: Iterable[StoredChunks],
    layout: Layout,
    *,
    expected: bytes | None = None,
) -> FileRow:
    """Write a data file durably; it is at its place when this returns.

    Args:
        expected: block sums that the file must have.

    Raises:
        StoreFull: no room; nothing is left behind.
        OtherBits: it has not the block sums expected; nothing was changed.
    """
    runs = list(parts)
    arrangement = Arrangement(name, sum(len(run) for run in runs), layout)
    sums = BlockSums()
    with placed(staging, folder / file_name(name)) as stream:

        def put(data: memoryview) -> None:
            stream.write(data)
            sums.update(data)

        put(memoryview(arrangement.header))
        for array in arrangement.arrays:
            for run in runs:
                values = getattr(run, array)
                if len(values):
                    put(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        if expected is not None and sums.packed() != expected:
            raise OtherBits(f"{folder / file_name(name)}: comes out with other bits than it had")
    assert sums.bytes == arrangement.bytes, "the runs do not have the layout of the store"
    return FileRow(name, arrangement.bytes, arrangement.arrays["lengths"][1][0], sums.packed())


class DataFile:
    """A data file, mapped; nothing is read before it is asked for.

    Thread-safe: reading changes nothing but which blocks are known to be good.
    """

    def __init__(self, path: Path, row: FileRow, layout: Layout) -> None:
        self.path = path
        self.row = row
        self.layout = layout
        self.arrangement = Arrangement(row.id, row.chunks, layout)
        try:
            with file_errors(path, "opening"):
                size = path.stat().st_size
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise SegmentGone(f"{path}: this data file is missing; {_REPAIR}") from error
            raise
        if not size == row.size == self.arrangement.bytes or len(row.blocks) != 4 * -(-size // BLOCK):
            raise StoreDamaged(f"{path}: {size} bytes where {row.size} were written; {_REPAIR}")
        try:
            # torch maps privately (nothing can write through) and keeps no descriptor: many files may be open
            self._bytes: NDArray[np.uint8] = torch.from_file(str(path), False, size, dtype=torch.uint8).numpy()
        except RuntimeError as error:
            if not path.exists():
                raise SegmentGone(f"{path}: this data file is missing; {_REPAIR}") from error
            raise StoreError(f"{path}: cannot be mapped ({str(error).splitlines()[0]}); check its rights") from error
        self._sums = np.frombuffer(row.blocks, dtype="<u4")
        self._good = np.zeros(len(self._sums), dtype=bool)
        self._all_good = False
        self._arrays = {
            name: self._bytes[begin : begin + math.prod(shape) * np.dtype(_NUMPY[kind]).itemsize]
            .view(_NUMPY[kind])
            .reshape(shape)
            for name, (begin, shape, kind) in self.arrangement.arrays.items()
        }

    @classmethod
    def open(cls, path: Path, row: FileRow, layout: Layout) -> DataFile:
        """Map a data file.

        Args:
            row: its record in the catalog: size, chunks, block sums.
            layout: of the store.

        Raises:
            SegmentGone: it is not there; with a fresh snapshot either it is not asked for, or it is lost.
            StoreDamaged: it has another size.
        """
        return cls(path, row, layout)

    def __len__(self) -> int:
        return self.row.chunks

    def keys(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Mean keys of a range of chunks, (n, Hkv, D) float32: a view of the map, not to be written to."""
        return torch.from_numpy(self._range("keys", start, stop))

    def lengths(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Real tokens of a range of chunks, (n,) int32: a view of the map."""
        return torch.from_numpy(self._range("lengths", start, stop))

    def chunks(self, start: int = 0, stop: int | None = None) -> StoredChunks:
        """A range of chunks as stored: views of the map."""
        scales = self._range("scales", start, stop) if "scales" in self._arrays else None
        kv, keys, lengths = (self._range(name, start, stop) for name in ("kv", "keys", "lengths"))
        return StoredChunks(kv, keys, lengths, scales)

    def gather(
        self,
        indices: Tensor | NDArray[np.int64],
        dtype: torch.dtype | None = None,
        heads: Tensor | NDArray[np.int64] | None = None,
    ) -> Tensor:
        """Keys and values of some chunks, or of single key/value heads of them.

        Args:
            indices: (n,) chunks of this file.
            dtype: to compute in; None is the stored one, float16 for int8.
            heads: (n,) the key/value head wanted of each; None is all. Only their bytes are read.

        Returns:
            (n, Hkv, 2, S, D), or with ``heads`` (n, 2, S, D), a copy on the CPU.

        Raises:
            StoreDamaged: a block of them is not what was written; names file and block.
        """
        where = np.asarray(indices, dtype=np.int64)
        if len(where) and (where.min() < 0 or where.max() >= self.row.chunks):
            raise StoreDamaged(f"{self.path}: chunks up to {where.max()} of {self.row.chunks} were asked for")
        depth = 1
        if heads is not None:
            where, depth = where * self.layout.heads_kv + np.asarray(heads, dtype=np.int64), 2
        kv = self._rows("kv", where, depth)
        scales = self._rows("scales", where, depth) if "scales" in self._arrays else None
        return unpack(kv, scales, self.layout.dtype, dtype)

    def blocks_of(self, start: int, stop: int) -> set[int]:
        """The blocks that chunks ``start`` to ``stop`` lie in."""
        found: set[int] = set()
        for name in self._arrays:
            first, last = self._span(name, start, stop)
            found.update(range(first // BLOCK, -(-last // BLOCK)))
        return found

    # blocks

    def _range(self, name: str, start: int, stop: int | None) -> NDArray[Any]:
        end = self.row.chunks if stop is None else stop
        if not 0 <= start <= end <= self.row.chunks:
            raise StoreDamaged(f"{self.path}: chunks {start} to {end} of {self.row.chunks} were asked for")
        if not self._all_good and end > start:
            first, last = self._span(name, start, end)
            self._check(np.arange(first // BLOCK, -(-last // BLOCK)))
        return self._arrays[name][start:end]

    def _rows(self, name: str, where: NDArray[np.int64], depth: int) -> NDArray[Any]:
        """Lines of an array whose first ``depth`` dimensions are seen as one."""
        begin, shape, kind = self.arrangement.arrays[name]
        lines = self._arrays[name].reshape(-1, *shape[depth:])
        if not self._all_good and len(where):
            size = math.prod(shape[depth:]) * np.dtype(_NUMPY[kind]).itemsize
            first, last = (begin + where * size) // BLOCK, (begin + (where + 1) * size - 1) // BLOCK
            for step in range(int((last - first).max()) + 1):
                self._check(np.minimum(first + step, last))
        return lines[where]

    def _span(self, name: str, start: int, stop: int) -> tuple[int, int]:
        begin, shape, kind = self.arrangement.arrays[name]
        size = math.prod(shape[1:]) * np.dtype(_NUMPY[kind]).itemsize
        return begin + start * size, begin + stop * size

    def _check(self, blocks: NDArray[np.int64]) -> None:
        unknown = blocks[~self._good[blocks]]
        if not len(unknown):
            return
        for number in np.unique(unknown):
            if not self._compare(int(number)):
                end = min((int(number) + 1) * BLOCK, self.row.size)
                raise StoreDamaged(
                    f"{self.path}: block {number} (bytes {number * BLOCK} to {end}) is not what was written; {_REPAIR}"
                )
            self._good[number] = True
        if self._good.all():
            self._all_good = True

    def _compare(self, number: int) -> bool:
        block = self._bytes[number * BLOCK : (number + 1) * BLOCK]
        return zlib.crc32(block.data) == int(self._sums[number])


def bad_blocks(path: Path, row: FileRow, read: Callable[[int], None] = lambda size: None) -> list[int]:
    """Numbers of all blocks of a data file that are not what was written, read from the disk and not from a map.

    Args:
        read: told the bytes of every block.

    Raises:
        FileNotFoundError: there is no such file.
        StoreDamaged: the device cannot read it.
    """
    sums = np.frombuffer(row.blocks, dtype="<u4").tolist()
    bad = []
    with file_errors(path, "reading"), path.open("rb", buffering=0) as stream:
        for number, expected in enumerate(sums):
            data = stream.read(BLOCK)
            if zlib.crc32(data) != expected:
                bad.append(number)
            read(len(data))
    return bad


_REPAIR = "`longmem memory verify --repair` makes it again from the token ids"
