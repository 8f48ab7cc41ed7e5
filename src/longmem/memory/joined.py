"""Several searches as one: the best of them for every query, or the rows of a batch that read different memories.

What a search found lies in the storage of its own memory. Here the chunks that were really found are copied into one
small storage, a key/value head at a time, because a head reads only its own part of a chunk.

B batch rows · H query heads · Hkv key/value heads · T tokens · R retrieved chunks · S tokens per chunk · D head_dim ·
P pairs of a chunk and a key/value head
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longmem.types import RetrievedMemory


def best_of(parts: Sequence[RetrievedMemory], num_chunks: int) -> RetrievedMemory:
    """For every query the best chunks of several searches, exact; of equal ones those of the first search.

    Args:
        parts: what the same queries (B, H, T, D) found in several memories, with chunk numbers that tell the memories
            apart; each part is the best ``num_chunks`` of its memory, or all there is.
        num_chunks: R.
    """
    tables = _Tables.of(parts)
    picked = [_Picked.of(part, first) for part, first in zip(parts, tables.first, strict=True)]
    scores = torch.cat([pick.scores.masked_fill(~pick.mask, -torch.inf) for pick in picked], dim=-1)
    # a stable order, so that equal scores are taken from the first part
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :num_chunks]
    return tables.pack(_Picked.cat(picked, dim=-1).take(order), parts)


def side_by_side(parts: Sequence[RetrievedMemory], lines: Sequence[Sequence[int]]) -> RetrievedMemory:
    """One answer for a batch whose rows searched different memories.

    Args:
        parts: each for some of the batch rows, with equal H, T and R.
        lines: for each part, the batch rows it answers; together every row once.
    """
    tables = _Tables.of(parts)
    together = _Picked.cat([_Picked.of(part, first) for part, first in zip(parts, tables.first, strict=True)], dim=0)
    order = torch.tensor([line for some in lines for line in some], device=together.scores.device)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return tables.pack(together.rows(back), parts)


def nothing(queries: Tensor, num_chunks: int, chunk_size: int, heads_kv: int = 1) -> RetrievedMemory:
    """What queries (B, H, T, D) find where there is no memory at all."""
    batch, heads, length, dim = queries.shape
    shape, device = (batch, heads, length, num_chunks), queries.device
    return RetrievedMemory(
        chunk_ids=torch.zeros(shape, dtype=torch.long, device=device),
        chunk_mask=torch.zeros(shape, dtype=torch.bool, device=device),
        scores=torch.zeros(shape, device=device),
        storage=torch.zeros(1, 1, heads_kv, 2, chunk_size, dim, dtype=queries.dtype, device=device),
        lengths=torch.zeros(1, 1, dtype=torch.long, device=device),
        rows=torch.zeros(batch, dtype=torch.long, device=device),
        version=0,
        live_version=lambda: 0,
    )


@dataclass(frozen=True)
class _Picked:
    """Chunks by reference, (B, H, T, R) each.

    Attributes:
        pairs: line of each chunk and head in all tables, one after the other.
        scores: as in ``RetrievedMemory``.
        mask: as in ``RetrievedMemory``.
        lengths: real tokens of each chunk.
        numbers: what its memory's ``provenance`` calls it.
    """

    pairs: Tensor
    scores: Tensor
    mask: Tensor
    lengths: Tensor
    numbers: Tensor

    @classmethod
    def of(cls, found: RetrievedMemory, first: int) -> _Picked:
        """``first``: where the part's table begins."""
        heads, (_, slots, heads_kv) = found.chunk_ids.shape[1], found.storage.shape[:3]
        head = torch.arange(heads, device=found.chunk_ids.device) // (heads // heads_kv)
        rows = found.rows.view(-1, 1, 1, 1)
        line = (rows * slots + found.chunk_ids) * heads_kv + head.view(1, -1, 1, 1)
        return cls(line + first, found.scores, found.chunk_mask, found.lengths[rows, found.chunk_ids], found.chunks)

    @classmethod
    def cat(cls, some: Sequence[_Picked], dim: int) -> _Picked:
        return cls(*(torch.cat([getattr(each, name) for each in some], dim) for name in cls.__dataclass_fields__))

    def take(self, order: Tensor) -> _Picked:
        """Along R."""
        return _Picked(*(getattr(self, name).gather(-1, order) for name in self.__dataclass_fields__))

    def rows(self, order: Tensor) -> _Picked:
        """Along B."""
        return _Picked(*(getattr(self, name)[order] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class _Tables:
    """The storages of all parts as tables of (chunk, head) lines, and the line each begins at."""

    tables: list[Tensor]
    first: list[int]
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, parts: Sequence[RetrievedMemory]) -> _Tables:
        shape = (2, int(parts[0].storage.shape[4]), int(parts[0].storage.shape[5]))
        tables = [part.storage.reshape(-1, *shape) for part in parts]
        first, total = [], 0
        for table in tables:
            first.append(total)
            total += table.shape[0]
        return cls(tables, first, shape)

    def pack(self, picked: _Picked, parts: Sequence[RetrievedMemory]) -> RetrievedMemory:
        """The picked chunks in a storage of their own, (1, P + 1, 1, 2, S, D); behind them the null chunk."""
        mask, device = picked.mask, picked.scores.device
        pairs, slots = torch.unique(picked.pairs[mask], return_inverse=True)
        ends = torch.searchsorted(pairs, torch.tensor([*self.first[1:], 1 << 62], device=device)).tolist()
        dtype = self.tables[0].dtype
        for table in self.tables[1:]:
            dtype = torch.promote_types(dtype, table.dtype)
        storage = torch.zeros(1, len(pairs) + 1, 1, *self.shape, dtype=dtype, device=device)
        begin = 0
        for table, first, end in zip(self.tables, self.first, ends, strict=True):
            wanted = (pairs[begin:end] - first).to(table.device)
            storage[0, begin:end, 0] = table.index_select(0, wanted).to(storage)
            begin = end
        chunk_ids = torch.full(mask.shape, len(pairs), device=device).masked_scatter_(mask, slots)
        lengths = torch.zeros(1, len(pairs) + 1, dtype=torch.long, device=device)
        numbers = torch.full_like(lengths, -1)
        lengths[0, slots], numbers[0, slots] = picked.lengths[mask], picked.numbers[mask]
        return RetrievedMemory(
            chunk_ids=chunk_ids,
            chunk_mask=mask,
            scores=picked.scores.masked_fill(~mask, 0.0),
            storage=storage,
            lengths=lengths,
            rows=torch.zeros(mask.shape[0], dtype=torch.long, device=device),
            version=sum(part.version for part in parts),
            live_version=lambda: sum(part.live_version() for part in parts),
            sources=numbers,
        )
