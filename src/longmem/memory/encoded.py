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
from longmem.memory.chunking import joined, mean_keys, refuse_unfit, split
from longmem.memory.index import ExactIndex, search_chunks
from longmem.types import ChunkOrigin, RetrievedMemory


class EncodedText:
    """What a text leaves in memory, segment by segment, and any run of its segments as a memory.

    It holds exactly what a ``MemoryBank`` of one row would hold after reading the same segments one by one.

    Args:
        model: a ``LongMem`` or another model with ``encode``.
        ids: (n, T) token ids of the text; T a multiple of the model's chunk size.
        progress: called with the number of segments done.
        encoded: ``state_dict`` of the same text, encoded by the same backbone; None encodes it.

    Raises:
        ConfigError: chunks would straddle segments.
    """

    def __init__(
        self,
        model: Any,
        ids: Tensor,
        progress: Callable[[int], Any] = lambda done: None,
        encoded: Mapping[str, Tensor] | None = None,
    ) -> None:
        size = model.config.chunk_size
        if ids.shape[1] % size:
            raise ConfigError(
                f"window ({ids.shape[1]}) must be a multiple of chunk_size ({size}), so that segments can be changed "
                f"one by one; try {max(1, ids.shape[1] // size) * size}"
            )
        self.model, self.ids, self.chunk_size = model, ids, size
        self.per_segment = ids.shape[1] // size
        self.memory_layers: tuple[int, ...] = model.memory_layers
        device, count = model.memory_device, len(ids) * self.per_segment
        self.lengths = torch.full((1, count), size, dtype=torch.long, device=device)
        if encoded is not None:
            self.storage, self.keys = (encoded[name].to(device) for name in ("storage", "keys"))
            return
        heads, dim = len(self.memory_layers) * model.memory_heads, model.memory_head_dim
        self.storage = torch.empty(1, count, heads, 2, size, dim, dtype=model.dtype, device=device)
        self.keys = torch.empty(1, heads, count, dim, dtype=torch.float32, device=device)
        for number, segment in enumerate(ids):
            self._write(number, segment)
            progress(number + 1)

    def state_dict(self) -> dict[str, Tensor]:
        """What was encoded: ``storage`` and ``keys``, no copies."""
        return {"storage": self.storage, "keys": self.keys}

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
        kept = [(where := self._chunks(number), self.storage[:, where].clone(), self.keys[:, :, where].clone())
                for number in changed]  # fmt: skip
        try:
            for number, ids in changed.items():
                self._write(number, torch.tensor(ids))
            yield self.run(first, count, most_tokens)
        finally:
            for where, storage, keys in kept:
                self.storage[:, where], self.keys[:, :, where] = storage, keys

    def _chunks(self, segment: int) -> slice:
        return slice(segment * self.per_segment, (segment + 1) * self.per_segment)

    @torch.no_grad()
    def _write(self, number: int, segment: Tensor) -> None:
        # one at a time: other batch sizes round differently, and changed segments come alone
        kv = self.model.encode(segment[None].to(self.model.device))
        pair = joined(kv, self.storage.shape[2], self.storage.shape[5])
        refuse_unfit(pair, None, self.storage.dtype, self.keys.dtype, self.chunk_size)
        chunks = split(pair.to(self.storage.device, torch.float32), self.chunk_size)[0][0]
        where = self._chunks(number)
        self.storage[0, where] = chunks.to(self.storage.dtype)
        self.keys[0, :, where] = mean_keys(chunks, self.lengths[0, where]).transpose(0, 1)


class TextMemory:
    """See ``Memory``: a run of chunks of an ``EncodedText``, searched exactly, that every batch row reads."""

    def __init__(self, text: EncodedText, chunks: slice) -> None:
        self.chunk_size, self.heads_kv = text.chunk_size, text.model.memory_heads
        self.fingerprint, self.memory_layers = text.model.fingerprint, text.memory_layers
        self.storage = text.storage[:, chunks]
        self.keys = text.keys[:, :, chunks]
        self.lengths = text.lengths[:, chunks]

    def search(
        self, queries: Tensor, num_chunks: int, rows: Tensor | None = None, *, layer: int = 0
    ) -> RetrievedMemory:
        """The best chunks for every query (B, H, T, D), per head; there is one row only."""
        lines, live = [0] * len(queries), [self.keys.shape[2]] * len(queries)
        return search_chunks(
            ExactIndex(), queries, num_chunks, self, lines, live, layer=layer, heads_kv=self.heads_kv, null=0
        )

    def provenance(self, row: int, chunk: int) -> ChunkOrigin:
        """Where a chunk stands in the text."""
        if row or not 0 <= chunk < self.keys.shape[2]:
            raise MemoryBankError(f"row {row} has no chunk {chunk}; there is one row of {self.keys.shape[2]} chunks")
        return ChunkOrigin(None, chunk * self.chunk_size, self.chunk_size, chunk, 0.0)
