"""Keys and values of a bank's chunks: left in the memory map, or held in memory or on the device.

N chunks of all rows · P pairs of a chunk and a key/value head · Hkv key/value heads · S tokens per chunk · D head_dim
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from longmem.store.places import Copy, Numbers, Places, copies
from longmem.store.precision import StoredChunks
from longmem.store.records import DTYPES

Keep = Literal["map", "memory", "device"]


class Whole(NamedTuple):
    """Every chunk, on the device, and the null chunk behind them.

    Attributes:
        kv: (N + 1, Hkv, 2, S, D).
        lengths: (N + 1,) long, real tokens; 0 of the null chunk.
        sources: (N + 1,) long, number of the chunk in its row; -1 of the null chunk.
    """

    kv: Tensor
    lengths: Tensor
    sources: Tensor


class Values(Protocol):
    """Gives the keys and values of single heads of chunks."""

    @property
    def whole(self) -> Whole | None:
        """All of them, if they lie ready on the device."""
        ...

    @property
    def nbytes(self) -> int:
        """Held in memory or on the device."""
        ...

    def take(self, chunks: Numbers, heads: Numbers) -> Tensor:
        """(P + 1, 2, S, D) on the device, of global chunks (P,), ascending, and heads (P,); the last one is zero."""
        ...


class MappedValues:
    """Read from the data files at every search; a block is compared with its checksum the first time."""

    whole: Whole | None = None
    nbytes = 0

    def __init__(self, places: Places, device: torch.device) -> None:
        self.places = places
        self.device = device

    def take(self, chunks: Numbers, heads: Numbers) -> Tensor:
        """See ``Values.take``."""
        layout = self.places.layout
        shape = (len(chunks) + 1, 2, layout.chunk_size, layout.head_dim)
        dtype = torch.float32 if layout.dtype == "int8" else DTYPES[layout.dtype][0]
        # page-locked, so that a GPU fetches it while the host goes on
        taken = torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        taken[-1] = 0
        file, inside = self.places.spots(chunks)
        order = np.argsort(file, kind="stable")
        used, begins = np.unique(file[order], return_index=True)
        for number, at in zip(used, np.split(order, begins[1:]) if len(used) else [], strict=True):
            found = self.places.files[number].gather(inside[at], dtype, heads[at])
            if at[-1] - at[0] == len(at) - 1:  # the usual case: the order of the files is that of the chunks
                taken[at[0] : at[-1] + 1] = found
            else:
                taken[torch.from_numpy(at)] = found
        return taken.to(self.device, non_blocking=True)


class HeldValues:
    """Everything read once.

    Args:
        places: whose chunks.
        held: where the numbers lie.
        device: where they are wanted.
        before: places and values from which what is already held is copied.
    """

    def __init__(
        self, places: Places, held: torch.device, device: torch.device, before: tuple[Places, HeldValues] | None = None
    ) -> None:
        layout = places.layout
        self.device = device
        self._stored = layout.dtype
        shape = (places.num_chunks + 1, layout.heads_kv, 2, layout.chunk_size, layout.head_dim)
        dtype = DTYPES[layout.dtype][0]
        # what a GPU fetches from the host has to be page-locked to be fetched fast
        pinned = held.type == "cpu" and device.type == "cuda"
        self._kv = torch.zeros(shape, dtype=dtype, device=held, pin_memory=pinned)
        self._scales = torch.ones(shape[:3], device=held) if layout.dtype == "int8" else None
        for copy in copies(places, None if before is None else before[0]):
            if copy.old is not None and before is not None:
                self._copy(copy, before[1])
            else:
                self._put(copy.begin, places.files[copy.file].chunks(copy.chunk, copy.chunk + copy.count))

        self._whole: Whole | None = None
        if self._scales is None and held.type == device.type:  # int8 has to be scaled first
            every = np.arange(places.num_chunks)
            lengths = torch.from_numpy(np.append(places.lengths(every), 0)).to(held)
            self._whole = Whole(self._kv, lengths, torch.from_numpy(np.append(places.in_rows(every), -1)).to(held))

    @property
    def whole(self) -> Whole | None:
        """See ``Values.whole``."""
        return self._whole

    @property
    def nbytes(self) -> int:
        """See ``Values.nbytes``."""
        return sum(each.numel() * each.element_size() for each in (self._kv, self._scales) if each is not None)

    def take(self, chunks: Numbers, heads: Numbers) -> Tensor:
        """See ``Values.take``."""
        null = (self._kv.shape[0] - 1) * self._kv.shape[1]
        lines = torch.from_numpy(np.append(chunks * self._kv.shape[1] + heads, null)).to(self._kv.device)
        taken = self._picked(self._kv, lines)
        if self._scales is None:
            return taken
        return taken.to(torch.float32) * self._picked(self._scales, lines)[..., None, None]

    def wipe(self, begin: int, end: int) -> None:
        """Overwrite the chunks from ``begin`` to ``end`` with zeros."""
        self._kv[begin:end] = 0

    def _picked(self, table: Tensor, lines: Tensor) -> Tensor:
        """Lines of (N + 1, Hkv, ...), heads side by side, on the device."""
        table = table.flatten(0, 1)
        if table.device.type == self.device.type:
            return table.index_select(0, lines)
        # picked into page-locked memory, which a GPU fetches while the host goes on; the allocator of such memory gives
        # it to nobody else before it has been fetched
        picked = torch.empty(len(lines), *table.shape[1:], dtype=table.dtype, pin_memory=self.device.type == "cuda")
        torch.index_select(table, 0, lines, out=picked)
        return picked.to(self.device, non_blocking=True)

    def _put(self, begin: int, chunks: StoredChunks) -> None:
        kv = torch.from_numpy(chunks.kv)
        if self._stored == "bfloat16":
            kv = kv.view(torch.bfloat16)
        self._kv[begin : begin + len(chunks)].copy_(kv)
        if self._scales is not None and chunks.scales is not None:
            self._scales[begin : begin + len(chunks)].copy_(torch.from_numpy(chunks.scales))

    def _copy(self, copy: Copy, old: HeldValues) -> None:
        assert copy.old is not None
        mine, theirs = slice(copy.begin, copy.begin + copy.count), slice(copy.old, copy.old + copy.count)
        self._kv[mine] = old._kv[theirs]
        if self._scales is not None and old._scales is not None:
            self._scales[mine] = old._scales[theirs]
