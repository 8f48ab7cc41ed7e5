"""What a bank has loaded: the chunk keys of each row, and keys and values if they are not left in the map.

N chunks of all rows · n chunks of a row that can be found · H heads of all layers · Hkv heads of one layer ·
S tokens per chunk · D head_dim · Q queries per key/value head · R retrieved chunks · P pairs of a chunk and a head
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longmem.memory.index import Index
from longmem.store.disk import Numbers
from longmem.store.records import DTYPES
from longmem.store.runs import Runs

AT_ONCE = 1 << 14
"""Chunks that are loaded at a time: no second copy of everything."""


class RowKeys:
    """Mean keys of a row's chunks, side by side; what is forgotten is taken out, so that search never sees it.

    Args:
        runs: of the bank.
        row: whose keys.
        indexes: one for each remembered layer, of this row alone.
        before: runs and keys from which what is already loaded is copied.

    Attributes:
        keys: (1, H, n, D).
        numbers: (n,) global chunk number of every key, ascending, on the CPU.
    """

    def __init__(
        self,
        runs: Runs,
        row: int,
        indexes: Sequence[Index],
        device: torch.device,
        dtype: torch.dtype,
        before: tuple[Runs, RowKeys] | None = None,
    ) -> None:
        self.indexes, self._base, self._total = indexes, int(runs.bases[row]), int(np.diff(runs.bases)[row])
        self.numbers = runs.alive(row)
        layout = runs.arrays.layout
        self.keys = torch.empty(1, layout.heads, len(self.numbers), layout.head_dim, dtype=dtype, device=device)
        old = np.full(len(self.numbers), -1)
        if before is not None:  # slots that these chunks have in the old keys
            had = runs.numbers_in(before[0])[self.numbers]
            old = np.where(had < 0, -1, np.searchsorted(before[1].numbers, had))
        had_keys = None if before is None else before[1].keys[0].transpose(0, 1)
        _fill(self.keys[0].transpose(0, 1), old, had_keys, runs.arrays.keys, runs.records(self.numbers))
        same = int((np.append(old, -2) != np.arange(len(old) + 1)).argmax())  # leading slots that are what they were
        if before is None or same < len(before[1].numbers):
            for index in indexes:
                index.cleared(torch.zeros(1, dtype=torch.long))
            same = 0
        slots = torch.arange(same, len(old), device=device)
        for layer, index in enumerate(indexes):
            index.written(self._layer(layer), torch.zeros_like(slots), slots)
        self._renumber()

    def _layer(self, layer: int) -> Tensor:
        """(1, Hkv, n, D), a view."""
        heads = self.keys.shape[1] // len(self.indexes)
        return self.keys[:, layer * heads : (layer + 1) * heads]

    def _renumber(self) -> None:
        # None: slots are numbers in the row, which saves a look-up
        whole = len(self.numbers) == self._total
        self._in_row = None if whole else torch.from_numpy(self.numbers - self._base).to(self.keys.device)

    def search(self, queries: Tensor, num: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best chunks of queries (b, Hkv, Q, D).

        Returns:
            scores (b, Hkv, Q, R) float32, numbers in the row (b, Hkv, Q, R) long, best first, and (R,) bool where there
            is any; elsewhere both are 0.
        """
        lines, live = queries.shape[0], len(self.numbers)
        exists = torch.arange(num, device=queries.device) < live
        if not live:
            nothing = torch.zeros(*queries.shape[:3], num, device=queries.device)
            return nothing, nothing.long(), exists
        scores, slots = self.indexes[layer].search(queries, self._layer(layer), [0] * lines, [live] * lines, num)
        if live < num:
            scores, slots = scores.masked_fill(~exists, 0.0), slots.masked_fill(~exists, 0)
        return scores, slots if self._in_row is None else self._in_row[slots], exists

    def forget(self, runs: Runs, row: int) -> None:
        """Take out what cannot be found any more; the rest moves up, and what is after it is overwritten."""
        stays = torch.from_numpy(np.searchsorted(self.numbers, runs.alive(row))).to(self.keys.device)
        if len(stays) == len(self.numbers):
            return
        for head in self.keys[0]:  # one head at a time: a copy of all keys need not fit beside them
            head[: len(stays)] = head.index_select(0, stays)
            head[len(stays) :] = 0
        self.numbers = runs.alive(row)
        self.keys = self.keys[:, :, : len(stays)]
        for index in self.indexes:
            index.kept(0, stays)
        self._renumber()

    @property
    def nbytes(self) -> int:
        """Of the keys."""
        return self.keys.numel() * self.keys.element_size()


class Held:
    """Keys and values of all chunks in memory or on the device, by global number.

    Args:
        held: where the numbers are.
        device: where they are wanted.
        before: runs and values from which what is already held is copied.

    Attributes:
        kv: (N + 1, H, 2, S, D); the last one is zero, and stands for no chunk.
        lengths: (N + 1,) real tokens of each.
        sources: (N + 1,) number of each in its row; -1 of the last.
    """

    def __init__(
        self, runs: Runs, held: torch.device, device: torch.device, before: tuple[Runs, Held] | None = None
    ) -> None:
        layout = runs.arrays.layout
        self.device = device
        shape = (runs.num_chunks + 1, layout.heads, 2, layout.chunk_size, layout.head_dim)
        pinned = held.type == "cpu" and device.type == "cuda"  # page-locked memory is fetched fast
        self.kv = torch.zeros(shape, dtype=DTYPES[layout.dtype], device=held, pin_memory=pinned)
        self.scales = torch.ones(shape[:3], device=held) if layout.dtype == "int8" else None
        every = np.arange(runs.num_chunks)
        self.lengths = torch.from_numpy(np.append(runs.lengths(every), 0)).to(device)
        self.sources = torch.from_numpy(np.append(runs.in_rows(every), -1)).to(device)
        old = np.full(runs.num_chunks, -1) if before is None else runs.numbers_in(before[0])
        records = runs.records(every)
        _fill(self.kv, old, None if before is None else before[1].kv, runs.arrays.kv, records)
        if self.scales is not None:
            _fill(self.scales, old, None if before is None else before[1].scales, runs.arrays.scales, records)

    @property
    def ready(self) -> bool:
        """Whether all is on the device in the form in which it is read; int8 has to be scaled first."""
        return self.scales is None and self.kv.device.type == self.device.type

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(each.numel() * each.element_size() for each in (self.kv, self.scales) if each is not None)

    def take(self, chunks: Numbers, heads: Numbers) -> Tensor:
        """(P + 1, 2, S, D) on the device, of global chunks (P,) and heads (P,); the last one is zero."""
        count = self.kv.shape[1]
        lines = torch.from_numpy(np.append(chunks * count + heads, (self.kv.shape[0] - 1) * count))
        taken = self._picked(self.kv, lines)
        if self.scales is None:
            return taken
        return taken.to(torch.float32) * self._picked(self.scales, lines)[..., None, None]

    def _picked(self, table: Tensor, lines: Tensor) -> Tensor:
        """Lines of (N + 1, H, ...), heads side by side, on the device."""
        return table.flatten(0, 1).index_select(0, lines.to(table.device)).to(self.device, non_blocking=True)

    def wipe(self, begin: int, end: int) -> None:
        """Overwrite the chunks from ``begin`` to ``end`` with zeros."""
        self.kv[begin:end] = 0


def _fill(target: Tensor, old: Numbers, before: Tensor | None, stored: Any, records: Numbers) -> None:
    """Fill the lines of ``target``: from the lines ``old`` of ``before``, or where these are -1 from the data files."""
    for begin in range(0, len(old), AT_ONCE):
        part = old[begin : begin + AT_ONCE]
        into = target[begin : begin + len(part)]
        known, new = np.flatnonzero(part >= 0), np.flatnonzero(part < 0)
        if len(known) and before is not None:
            into[torch.from_numpy(known).to(into.device)] = before[torch.from_numpy(part[known]).to(before.device)]
        if len(new):
            read = torch.from_numpy(_records(stored, records[begin + new]))
            read = (read.view(torch.bfloat16) if read.dtype == torch.int16 else read).to(into.device, into.dtype)
            if len(known):
                into[torch.from_numpy(new).to(into.device)] = read
            else:
                into.copy_(read)


def _records(array: Any, records: Numbers) -> Any:
    """A copy of some records; those that are one after the other are read in one go."""
    follow = bool((np.diff(records) == 1).all())
    return array[records[0] : records[-1] + 1].copy() if follow else array[records]


def take_mapped(runs: Runs, chunks: Numbers, heads: Numbers, device: torch.device) -> Tensor:
    """As ``Held.take``, from the memory map; of a chunk only the heads that were found are read."""
    layout = runs.arrays.layout
    dtype = torch.float32 if layout.dtype == "int8" else DTYPES[layout.dtype]
    shape = (len(chunks) + 1, 2, layout.chunk_size, layout.head_dim)
    # page-locked, so that a GPU fetches it while the host goes on
    taken = torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
    taken[:-1] = runs.arrays.gather(runs.records(chunks), heads, dtype)
    taken[-1] = 0
    return taken.to(device, non_blocking=True)
