"""Memory of a long text in which a few segments change from question to question.

A segment's keys and values depend on that segment alone, since the model that writes memory never reads it. So the
text is encoded once; to hide something in it, only the segments that hold it are encoded again and written over their
old places for as long as the question takes.

n segments of T tokens · N chunks of S tokens · Hkv key/value heads · D head_dim
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from longmem.errors import ConfigError, MemoryBankError
from longmem.memory.chunking import mean_keys
from longmem.memory.index import ExactIndex
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
        self.model, self.ids = model, ids
        self.per_segment = ids.shape[1] // size
        self.lengths = torch.full((1, len(ids) * self.per_segment), size, dtype=torch.long, device=model.memory_device)
        if encoded is not None:
            self.storage, self.keys = (encoded[name].to(model.memory_device) for name in ("storage", "keys"))
            return
        shape = (1, len(ids) * self.per_segment, model.memory_heads)
        where = {"dtype": model.dtype, "device": model.memory_device}
        self.storage = torch.empty(*shape, 2, size, model.memory_head_dim, **where)
        self.keys = torch.empty(
            1, shape[2], shape[1], model.memory_head_dim, dtype=torch.float32, device=where["device"]
        )
        for number, segment in enumerate(ids):
            self._write(number, segment)
            progress(number + 1)

    def state_dict(self) -> dict[str, Tensor]:
        """What was encoded: ``storage`` and ``keys``, no copies."""
        return {"storage": self.storage, "keys": self.keys}

    @property
    def chunk_size(self) -> int:
        """S."""
        return int(self.storage.shape[4])

    def run(self, first: int, count: int, most_tokens: int | None = None) -> TextMemory:
        """A memory of ``count`` segments from ``first`` on.

        Args:
            first: number of the first segment.
            count: how many.
            most_tokens: only the last so many tokens are remembered; None is all.
        """
        start, end = first * self.per_segment, (first + count) * self.per_segment
        if most_tokens is not None:
            start = max(start, end - most_tokens // self.chunk_size)
        return TextMemory(self, slice(start, end))

    @torch.no_grad()
    def _write(self, number: int, segment: Tensor) -> None:
        # one at a time: other batch sizes round differently, and changed segments come alone
        kv = self.model.encode(segment[None].to(self.model.device))
        pair = torch.stack((kv.keys[0], kv.values[0]), dim=1).to(self.storage.device)
        chunks = pair.unflatten(2, (self.per_segment, -1)).permute(2, 0, 1, 3, 4).float()
        place = self._place(number)
        self.storage[0, place] = chunks.to(self.storage.dtype)
        self.keys[0, :, place] = mean_keys(chunks, self.lengths[0, place]).transpose(0, 1)

    def _place(self, number: int) -> slice:
        return slice(number * self.per_segment, (number + 1) * self.per_segment)

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
        kept = {number: (self.storage[0, self._place(number)].clone(), self.keys[0, :, self._place(number)].clone())
                for number in changed}  # fmt: skip
        try:
            for number, ids in changed.items():
                self._write(number, torch.tensor(ids))
            yield self.run(first, count, most_tokens)
        finally:
            for number, (storage, keys) in kept.items():
                self.storage[0, self._place(number)] = storage
                self.keys[0, :, self._place(number)] = keys


class TextMemory:
    """See ``Memory``: a run of chunks of an ``EncodedText``, searched exactly, that every batch row reads."""

    def __init__(self, text: EncodedText, chunks: slice) -> None:
        self.chunk_size = text.chunk_size
        self.fingerprint = text.model.fingerprint
        self.memory_layer = text.model.memory_layer
        self.storage = text.storage[:, chunks]
        self.keys = text.keys[:, :, chunks]
        self.lengths = text.lengths[:, chunks]
        self._index = ExactIndex()

    @torch.no_grad()
    def search(self, queries: Tensor, num_chunks: int, rows: Tensor | None = None) -> RetrievedMemory:
        """The best chunks for every query (B, H, T, D), per head; there is one row only."""
        batch, heads, length, dim = queries.shape
        read, live = [0] * batch, self.keys.shape[2]
        grouped = queries.detach().reshape(batch, self.keys.shape[1], -1, dim)
        with torch.autocast(queries.device.type, enabled=False):
            scores, slots = self._index.search(grouped, self.keys, read, [live] * batch, num_chunks)
        shape = (batch, heads, length, num_chunks)
        exists = (torch.arange(num_chunks, device=slots.device) < live).expand(shape)
        return RetrievedMemory(
            chunk_ids=slots.reshape(shape).masked_fill_(~exists, 0),
            chunk_mask=exists,
            scores=scores.reshape(shape).masked_fill_(~exists, 0.0),
            storage=self.storage,
            lengths=self.lengths,
            rows=torch.tensor(read, device=slots.device),
            version=0,
            live_version=lambda: 0,
        )

    def provenance(self, row: int, chunk: int) -> ChunkOrigin:
        """Where a chunk stands in the text."""
        if row or not 0 <= chunk < self.keys.shape[2]:
            raise MemoryBankError(f"row {row} has no chunk {chunk}; there is one row of {self.keys.shape[2]} chunks")
        return ChunkOrigin(None, chunk * self.chunk_size, self.chunk_size, chunk, 0.0)
