"""The records that pass between the parts; shapes are in the docstrings.

B rows · T segment tokens · H query heads · Hkv key/value heads · D head_dim · S tokens per chunk ·
N chunks in a bank row · R retrieved chunks per query · K = R*S retrieved tokens · n remembered layers
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from longmem.errors import MemoryBankError


@dataclass(frozen=True)
class AttentionKV:
    """Position-free keys and values of the remembered layers for one segment of every row.

    Attributes:
        keys: (B, n*Hkv, T, D), before any rotary embedding, without gradient: the Hkv heads of the first of n
            remembered layers, then those of the second, ...
        values: (B, n*Hkv, T, D).
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
        storage: (rows, slots, n*Hkv, 2, S, D); [:, :, :, 0] are keys, [:, :, :, 1] values. Only read.
        lengths: (rows, slots) long, real tokens in each chunk (a short chunk ends a document).
        rows: (B,) long, the storage row each batch row reads.
        version: the bank's write counter at search time, compared again in backward.
        live_version: returns the bank's write counter now.
        sources: (rows, slots) long, what ``Memory.provenance`` calls the chunk in every slot, -1 at slots that stand
            for nothing; None where a chunk is called by its slot.
        periods: (rows, slots) long, when the chunk in every slot was said: larger is later, equal is together
            (see ``period``). None: all are equally old.
        memory_rows: (B,) long, the row of that memory which each batch row read; None where it is ``rows``.
        first_head: where in ``storage`` the heads of the layer that was searched begin.
        layer_heads: Hkv of that layer; None: all heads in ``storage`` are its.
    """

    chunk_ids: Tensor
    chunk_mask: Tensor
    scores: Tensor
    storage: Tensor
    lengths: Tensor
    rows: Tensor
    version: int
    live_version: Callable[[], int]
    sources: Tensor | None = None
    periods: Tensor | None = None
    memory_rows: Tensor | None = None
    first_head: int = 0
    layer_heads: int | None = None

    @property
    def chunks(self) -> Tensor:
        """(B, H, T, R) long, what ``Memory.provenance`` calls each chunk; -1 where none was found."""
        found = self.chunk_ids
        if self.sources is not None:
            found = self.sources[self.rows.view(-1, 1, 1, 1), found]
        return found.masked_fill(~self.chunk_mask, -1)

    @property
    def period(self) -> Tensor:
        """(B, H, T, R) long: the period of each chunk that a query found, -1 where none was found."""
        if self.periods is None:
            return torch.zeros_like(self.chunk_ids).masked_fill_(~self.chunk_mask, -1)
        return self.periods[self.rows.view(-1, 1, 1, 1), self.chunk_ids].masked_fill_(~self.chunk_mask, -1)

    @property
    def chunk_size(self) -> int:
        return int(self.storage.shape[4])

    @property
    def lines(self) -> Tensor:
        """(B, H, T, R) long: where each chunk is in ``storage.flatten(0, 2)``, a line per row, slot and head."""
        heads, (_, slots, heads_kv) = self.chunk_ids.shape[1], self.storage.shape[:3]
        # query heads in groups share a key/value head; storage has those of the other memory layers too
        group = heads // (heads_kv if self.layer_heads is None else self.layer_heads)
        head = self.first_head + torch.arange(heads, device=self.chunk_ids.device) // group
        return (self.rows.view(-1, 1, 1, 1) * slots + self.chunk_ids) * heads_kv + head.view(1, -1, 1, 1)

    @property
    def sizes(self) -> Tensor:
        """(B, H, T, R) long: real tokens of each chunk, 0 where none was found."""
        return self.lengths[self.rows.view(-1, 1, 1, 1), self.chunk_ids].masked_fill_(~self.chunk_mask, 0)

    @property
    def keys(self) -> Tensor:
        """(B, H, T, K, D): a copy per query; for inspection and tests, the fast path never makes it."""
        return self.storage.flatten(0, 2)[self.lines, 0].flatten(3, 4)

    @property
    def values(self) -> Tensor:
        """(B, H, T, K, D), see ``keys``."""
        return self.storage.flatten(0, 2)[self.lines, 1].flatten(3, 4)

    @property
    def mask(self) -> Tensor:
        """(B, H, T, K) bool, True at real retrieved tokens."""
        return (torch.arange(self.chunk_size, device=self.lengths.device) < self.sizes[..., None]).flatten(3)


PERIOD_TOKENS = 1024


def period(document: Any, token: Any) -> Any:
    """When something was said, a number that grows: of the ``document``-th document (0-based), its token ``token``.

    What is said together is of one age: that of ten facts told in one conversation one is told last says nothing. So
    a document, or where it is longer each ``PERIOD_TOKENS`` of it, is one period. Of integers, tensors, arrays.
    """
    return (document << 20) + token // PERIOD_TOKENS


@dataclass(frozen=True)
class ChunkOrigin:
    """The provenance of one chunk.

    Attributes:
        document: its document, None where the writer named none.
        start_token: offset of its first token in that document.
        length: real tokens in it.
        number: how many chunks this bank row had been given before it (evicted ones count).
        time: as passed to ``add``, else seconds since the epoch; of a stored document, when it was said or added.
        namespace: whose document it is; None in a bank that belongs to no store.
        document_id: the document's number in its store, never given to another one; None outside of a store.
    """

    document: str | None
    start_token: int
    length: int
    number: int
    time: float
    namespace: str | None = None
    document_id: int | None = None


class Memory(Protocol):
    """Anything ``LongMem.forward(memory=...)`` can read: a ``MemoryBank``, or a store's bank."""

    chunk_size: int

    def search(
        self, queries: Tensor, num_chunks: int, rows: Tensor | None = None, *, layer: int = 0
    ) -> RetrievedMemory:
        """The best chunks for every query, per head, by inner product with the mean key.

        Args:
            queries: (B, H, T, D), position-free and unscaled; H a multiple of Hkv.
            num_chunks: R.
            rows: (B,) the memory's row that each batch row reads; by default its own.
            layer: whose keys are searched, by its place among the remembered layers.
        """
        ...

    def provenance(self, row: int, chunk: int) -> ChunkOrigin:
        """Where a chunk of a row came from; ``chunk`` is numbered as in ``RetrievedMemory.chunks``."""
        ...


def check_memory(memory: object) -> None:
    """Refuse, with a MemoryBankError, what is neither None nor something that can be searched."""
    if memory is not None and not hasattr(memory, "search"):
        raise MemoryBankError(
            f"memory (a {type(memory).__name__}) cannot be searched; give a MemoryBank, a session, or the bank of a "
            "store: store.bank(NAMESPACE)"
        )
