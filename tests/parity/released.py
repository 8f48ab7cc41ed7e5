"""The released code's memory, rule by rule (OFFICIAL.md 1.4), for comparison alone.

Rows are flattened one after the other, so a chunk may straddle rows; a call's tail and its padding mask are dropped.
Before n chunks are added to a store that would then be full, twice the call's chunks are dropped from the front and the
rest moves up. The store's last slot is never written; its zeros answer for missing chunks and take part in attention,
unless memory is empty.
"""

from dataclasses import replace

import torch
from torch import Tensor

from longmem.errors import MemoryBankError
from longmem.memory import ExactIndex
from longmem.memory.index import joined, mean_keys, search_chunks
from longmem.types import AttentionKV, ChunkOrigin, RetrievedMemory


class ReleasedBank:
    """One memory for all rows of a batch, as the released code keeps it; settings as of ``MemoryBank``."""

    fingerprint = memory_layers = None

    def __init__(
        self,
        rows: int,
        capacity_tokens: int,
        heads_kv: int,
        head_dim: int,
        chunk_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rows, self.chunk_size, self.heads_kv, self.head_dim = rows, chunk_size, heads_kv, head_dim
        slots = capacity_tokens // chunk_size
        self.storage = torch.zeros(1, slots, heads_kv, 2, chunk_size, head_dim, dtype=dtype, device=device)
        self.keys = torch.zeros(1, heads_kv, slots - 1, head_dim, device=device)
        self.lengths = torch.zeros(1, slots, dtype=torch.long, device=device)
        self.reset()

    def reset(self) -> None:
        self.fill = self.evicted = 0
        self.version = getattr(self, "version", -1) + 1
        self.storage.zero_()
        self.lengths.zero_()
        self.lengths[:, -1] = self.chunk_size

    @property
    def chunks(self) -> Tensor:
        return torch.tensor([self.fill] * self.rows)

    @torch.no_grad()
    def add(self, kv: AttentionKV) -> None:
        tokens = joined(kv, self.heads_kv, self.head_dim).float()
        flat = tokens.permute(1, 2, 0, 3, 4).flatten(2, 3)
        count = flat.shape[2] // self.chunk_size
        chunks = flat[:, :, : count * self.chunk_size].unflatten(2, (count, self.chunk_size)).movedim(2, 0)
        self._make_room(count, 2 * tokens.shape[0] * tokens.shape[3] // self.chunk_size)
        new = slice(self.fill, self.fill + count)
        self.lengths[0, new] = self.chunk_size
        self.storage[0, new] = chunks.to(self.storage)
        self.keys[0, :, new] = mean_keys(chunks, self.lengths[0, new]).transpose(0, 1)
        self.fill += count
        self.version += 1

    def _make_room(self, count: int, evict: int) -> None:
        if self.fill + count < self.storage.shape[1]:
            return
        if evict > self.fill:
            raise MemoryBankError(f"adding {count} chunks to {self.fill} drops {evict} first: too small a store")
        left = self.fill - evict
        for array in (self.storage[0], self.lengths[0], self.keys[0].transpose(0, 1)):
            array[:left] = array[evict : self.fill].clone()
            array[left : self.fill] = 0
        self.fill, self.evicted = left, self.evicted + evict

    def search(
        self, queries: Tensor, num_chunks: int, rows: Tensor | None = None, *, layer: int = 0
    ) -> RetrievedMemory:
        batch, null = len(queries), self.storage.shape[1] - 1
        found = search_chunks(
            [ExactIndex()], queries, num_chunks, self, [0] * batch, [self.fill] * batch, layer=layer,
            live_version=lambda: self.version,
        )  # fmt: skip
        numbers = torch.arange(null + 1, device=queries.device)
        taking_part = torch.full_like(found.chunk_mask, self.fill > 0)
        return replace(found, chunk_mask=taking_part, sources=numbers.masked_fill(numbers == null, -1)[None])

    def provenance(self, row: int, slot: int) -> ChunkOrigin:
        return ChunkOrigin(None, 0, self.chunk_size, self.evicted + slot, 0.0)
