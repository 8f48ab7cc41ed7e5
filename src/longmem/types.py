"""The records that pass between the parts; shapes are in the docstrings.

B rows · T segment tokens · H query heads · Hkv key/value heads · D head_dim · S tokens per chunk ·
N chunks in a bank row · R retrieved chunks per query · K = R*S retrieved tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionKV:
    """Position-free keys and values of the memory layer for one segment of every row.

    Attributes:
        keys: (B, Hkv, T, D), before any rotary embedding, without gradient.
        values: (B, Hkv, T, D).
        mask: (B, T) bool, True at real tokens; None where every token is real.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class RetrievedMemory:
    """What a search found, by reference: chunk slots in the bank's storage, not copies.

    Emptiness is a value: a query that found nothing has an all-False ``chunk_mask`` row.

    Attributes:
        chunk_ids: (B, H, T, R) long, slot of each chunk in ``storage``, best first.
        chunk_mask: (B, H, T, R) bool, False where fewer than R chunks exist.
        scores: (B, H, T, R) float32 inner products of query and chunk key; 0 where masked.
        storage: (rows, slots, Hkv, 2, S, D); [:, :, :, 0] are keys, [:, :, :, 1] values. Only read.
        lengths: (rows, slots) long, real tokens in each chunk (a short chunk ends a document).
        rows: (B,) long, the storage row each batch row reads.
        version: the bank's write counter at search time, compared again in backward.
        live_version: returns the bank's write counter now.
    """

    chunk_ids: Tensor
    chunk_mask: Tensor
    scores: Tensor
    storage: Tensor
    lengths: Tensor
    rows: Tensor
    version: int
    live_version: _Counter

    @property
    def chunk_size(self) -> int:
        return int(self.storage.shape[4])

    @property
    def keys(self) -> Tensor:
        """(B, H, T, K, D): a copy per query; for inspection and tests, the fast path never makes it."""
        return self._gather(0)

    @property
    def values(self) -> Tensor:
        """(B, H, T, K, D), see ``keys``."""
        return self._gather(1)

    @property
    def mask(self) -> Tensor:
        """(B, H, T, K) bool, True at real retrieved tokens."""
        rows = self.rows.view(-1, 1, 1, 1)
        inside = (
            torch.arange(self.chunk_size, device=self.chunk_ids.device) < self.lengths[rows, self.chunk_ids][..., None]
        )
        return (inside & self.chunk_mask[..., None]).flatten(3)

    def _gather(self, which: int) -> Tensor:
        heads, heads_kv = self.chunk_ids.shape[1], self.storage.shape[2]
        head = (torch.arange(heads, device=self.chunk_ids.device) // (heads // heads_kv)).view(1, -1, 1, 1)
        rows = self.rows.view(-1, 1, 1, 1)
        return self.storage[rows, self.chunk_ids, head, which].flatten(3, 4)


class _Counter(Protocol):
    def __call__(self) -> int: ...


class Retriever(Protocol):
    """How SideNet asks for memory: position-free queries in, references out."""

    def __call__(self, queries: Tensor) -> RetrievedMemory:
        """Search for queries (B, H, T, D) that carry no position and no scale."""
        ...


class Memory(Protocol):
    """Anything ``LongMem.forward(memory=...)`` can read: a ``MemoryBank``, or a store's bank."""

    chunk_size: int

    def search(self, queries: Tensor, num_chunks: int, rows: Tensor | None = None) -> RetrievedMemory:
        """The ``num_chunks`` best chunks for every query (B, H, T, D), per head, in the given bank rows."""
        ...
