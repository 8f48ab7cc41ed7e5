"""Memory of a long text in which a few segments change from question to question.

A segment's keys and values depend on that segment alone, since the model that writes memory never reads it. So the
text is encoded once; to hide something in it, only the segments that hold it are encoded again, and replace the old
ones for as long as the question takes.

n segments of T tokens · N chunks of S tokens · Hkv key/value heads of all remembered layers · D head_dim
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from longmem.errors import ConfigError, MemoryBankError
from longmem.memory.chunks import Slots, joined, refuse_unfit, split
from longmem.memory.index import ExactIndex, search_chunks
from longmem.types import ChunkOrigin, RetrievedMemory


class EncodedText:
    """What a text leaves in memory, segment by segment, and any run of its segments as a memory.

    It holds exactly what a ``MemoryBank`` of one row would hold after reading the same segments one by one.

    Args:
        model: a ``LongMem`` or another model with ``encode``.
        ids: (n, T) token ids of the text; T a multiple of the model's chunk size.
        progress: called with the number of segments done.

    Raises:
        ConfigError: chunks would straddle segments.
    """

    def __init__(self, model: Any, ids: Tensor, progress: Callable[[int], Any] = lambda done: None) -> None:
        size = model.config.chunk_size
        if ids.shape[1] % size:
            raise ConfigError(
                f"window ({ids.shape[1]}) must be a multiple of chunk_size ({size}), so that segments can be changed "
                f"one by one; try {max(1, ids.shape[1] // size) * size}"
            )
        self.model, self.ids, self.chunk_size = model, ids, size
        self.per_segment = ids.shape[1] // size
        heads, dim = len(model.memory_layers) * model.memory_heads, model.memory_head_dim
        count, device = len(ids) * self.per_segment, model.memory_device
        self.chunks = Slots(1, count, heads, dim, size, model.dtype, device)
        for number, segment in enumerate(ids):
            self._write(number, segment)
            progress(number + 1)

    def run(self, first: int, count: int, most_tokens: int | None = None) -> TextMemory:
        """A memory of ``count`` segments from number ``first`` on, or of their last ``most_tokens`` tokens."""
        start, end = first * self.per_segment, (first + count) * self.per_segment
        if most_tokens is not None:
            start = max(start, end - most_tokens // self.chunk_size)
        return TextMemory(self, slice(start, end))

    @contextmanager
    def holding(
        self, first: int, count: int, changed: Mapping[int, Sequence[int]], most_tokens: int | None = None
    ) -> Iterator[TextMemory]:
        """While open, ``run`` of the same text with some segments of other tokens.

        Args:
            first: number of the first segment.
            count: how many.
            changed: token ids (T,) of changed segments, by their number in the whole text.
            most_tokens: only the last so many tokens are remembered; None is all.
        """
        storage, keys = self.chunks.storage, self.chunks.keys
        places = [slice(number * self.per_segment, (number + 1) * self.per_segment) for number in changed]
        kept = [(where, storage[:, where].clone(), keys[:, :, where].clone()) for where in places]
        try:
            for number, ids in changed.items():
                self._write(number, torch.tensor(ids))
            yield self.run(first, count, most_tokens)
        finally:
            for where, old_storage, old_keys in kept:
                storage[:, where], keys[:, :, where] = old_storage, old_keys

    @torch.no_grad()
    def _write(self, number: int, segment: Tensor) -> None:
        # one at a time: other batch sizes round differently, and changed segments come alone
        kv, storage = self.model.encode(segment[None].to(self.model.device)), self.chunks.storage
        pair = joined(kv, storage.shape[2], storage.shape[5])
        refuse_unfit(pair, None, storage.dtype, self.chunk_size)
        chunks, _ = split(pair[0].to(storage.device, torch.float32), self.chunk_size)
        slots = torch.arange(self.per_segment) + number * self.per_segment
        self.chunks.put(0, slots, chunks, torch.full_like(slots, self.chunk_size))


class TextMemory:
    """See ``Memory``: a run of chunks of an ``EncodedText``, searched exactly, that every batch row reads."""

    def __init__(self, text: EncodedText, where: slice) -> None:
        self.chunk_size, self.heads_kv = text.chunk_size, text.model.memory_heads
        self.fingerprint, self.memory_layers = text.model.fingerprint, text.model.memory_layers
        self.storage, self.lengths = text.chunks.storage[:, where], text.chunks.lengths[:, where]
        self.keys = text.chunks.keys[:, :, where]

    def search(
        self, queries: Tensor, num_chunks: int, rows: Tensor | None = None, *, layer: int = 0
    ) -> RetrievedMemory:
        """The best chunks for every query (B, H, T, D), per head; there is one row only."""
        lines, live = [0] * len(queries), [self.keys.shape[2]] * len(queries)
        return search_chunks(ExactIndex(), queries, num_chunks, self, lines, live, layer=layer, heads_kv=self.heads_kv)

    def provenance(self, row: int, chunk: int) -> ChunkOrigin:
        """Where a chunk stands in this run, counted from the run's first token, not from the text's."""
        if row or not 0 <= chunk < self.keys.shape[2]:
            raise MemoryBankError(f"row {row} has no chunk {chunk}; there is one row of {self.keys.shape[2]} chunks")
        return ChunkOrigin(None, chunk * self.chunk_size, self.chunk_size, chunk, 0.0)
