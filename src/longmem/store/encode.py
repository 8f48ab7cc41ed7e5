"""From token ids to stored chunks: many segments in a batch, through the backbone to its last remembered layer.

What a segment leaves in memory must not depend on its company, to the last bit: then adding in parts equals adding at
once, equal texts need not be encoded twice, and a lost file can be made again. Matrix products round differently for
different shapes, so a segment always goes through in a batch of the same shape: as long as the next power of two, in a
number of rows that depends on this length alone; rows without a segment are filled up.

T segment tokens · B rows · n chunks · H heads of all layers · S tokens per chunk · D head_dim
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from longmem.errors import StoreError
from longmem.store.arrays import StoredChunks, joined, pack
from longmem.store.records import Layout
from longmem.store.tokens import Ids
from longmem.types import AttentionKV

CPU_BATCH_TOKENS = 512
GPU_BATCH_TOKENS = 16384
LONGEST_SEGMENT = 1024
"""The paper's; long-context backbones would otherwise get all they can take."""
_SHORTEST = 16


class Encodes(Protocol):
    """What the store needs of a model; ``LongMem``, ``MemTRM`` and ``TrainingFree`` have it."""

    config: Any

    @property
    def fingerprint(self) -> str: ...

    @property
    def memory_heads(self) -> int: ...

    @property
    def memory_head_dim(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def encode(self, input_ids: Tensor) -> AttentionKV:
        """Position-free keys and values (B, H, T, D) of the segments (B, T)."""
        ...


class Encoder:
    """Encodes segments for a store.

    Args:
        model: whose backbone is that of the layout.
        batch_tokens: of one batch, about; by default by device. Another number, as another device or number of threads,
            may round the last bit differently.
    """

    def __init__(self, model: Encodes, layout: Layout, batch_tokens: int | None = None) -> None:
        self.model = model
        self.layout = layout
        by_device = CPU_BATCH_TOKENS if model.device.type == "cpu" else GPU_BATCH_TOKENS
        self.batch_tokens = by_device if batch_tokens is None else batch_tokens
        self._alone = _routes_tokens(model)
        self._vocabulary = vocabulary_of(model)

    def encode(self, pieces: Sequence[Ids]) -> list[StoredChunks]:
        """Encode pieces, each a run of whole segments whose last may be short.

        Raises:
            StoreError: an id outside of the vocabulary, or numbers that the store's type cannot hold.
        """
        done: list[dict[int, StoredChunks]] = [{} for _ in pieces]
        for batch in self._batches(pieces):
            chunks = self._run([self._segment(pieces, *at) for at in batch])
            for (piece, segment), made in zip(batch, chunks, strict=True):
                done[piece][segment] = made
        return [joined([segments[number] for number in range(len(segments))]) for segments in done]

    def check_ids(self, name: str, ids: Ids) -> None:
        """Refuse token ids that the backbone does not know, before any work.

        Raises:
            StoreError: names the document.
        """
        if self._vocabulary is not None and len(ids) and int(ids.max()) >= self._vocabulary:
            raise StoreError(
                f"document {name!r}: token id {int(ids.max())} is outside of the backbone's vocabulary of "
                f"{self._vocabulary}; use the tokenizer that belongs to the backbone"
            )

    def _segment(self, pieces: Sequence[Ids], piece: int, segment: int) -> Ids:
        size = self.layout.segment_tokens
        return pieces[piece][segment * size : (segment + 1) * size]

    def _batches(self, pieces: Sequence[Ids]) -> Iterator[list[tuple[int, int]]]:
        """Segments (piece, number) that go through together, the pieces' order kept within a length."""
        waiting: dict[int, list[tuple[int, int]]] = defaultdict(list)
        size = self.layout.segment_tokens
        for piece, ids in enumerate(pieces):
            for segment in range(-(-len(ids) // size)):
                length = self.padded(min(size, len(ids) - segment * size))
                waiting[length].append((piece, segment))
                if len(waiting[length]) == self.rows(length):
                    yield waiting.pop(length)
        for length in sorted(waiting, reverse=True):
            yield waiting[length]

    def padded(self, length: int) -> int:
        """The length at which a segment of so many tokens goes through."""
        longer = max(_SHORTEST, 1 << (length - 1).bit_length())
        return min(longer, max(length, self.layout.segment_tokens))

    def rows(self, length: int) -> int:
        """B of a batch of segments padded to this length."""
        return 1 if self._alone else max(1, self.batch_tokens // length)

    @torch.no_grad()
    def _run(self, segments: list[Ids]) -> Iterator[StoredChunks]:
        length = self.padded(len(segments[0]))
        ids = torch.zeros(self.rows(length), length, dtype=torch.long)
        for row, segment in enumerate(segments):
            ids[row, : len(segment)] = torch.from_numpy(segment.astype("int64"))
        # no mask: a causal model's tokens do not see the filling after them
        with torch.autocast(self.model.device.type, enabled=False):
            kv = self.model.encode(ids.to(self.model.device))
        pair = torch.stack((kv.keys, kv.values), dim=2)[: len(segments)].to("cpu", torch.float32)
        for row, segment in enumerate(segments):
            yield self._chunks(pair[row], len(segment))

    def _chunks(self, pair: Tensor, tokens: int) -> StoredChunks:
        """Keys and values (H, 2, T, D) of one segment, of which ``tokens`` are real."""
        heads, _, _, dim = pair.shape
        size, count = self.layout.chunk_size, self.layout.chunks(tokens)
        whole = torch.zeros(heads, 2, count * size, dim)
        whole[:, :, :tokens] = pair[:, :, :tokens]
        chunks = whole.view(heads, 2, count, size, dim).permute(2, 0, 1, 3, 4).contiguous()
        lengths = torch.full((count,), size)
        lengths[-1] = tokens - (count - 1) * size
        return pack(chunks, lengths, self.layout.dtype)


def layers_of(model: Any) -> tuple[int, ...]:
    """The layers whose keys and values a model remembers."""
    layers = getattr(model, "memory_layers", None)
    return (int(model.memory_layer),) if layers is None else tuple(int(layer) for layer in layers)


def accepts(model: Any, fingerprint: str) -> bool:
    """Whether a model's backbone is the one of this fingerprint."""
    same = getattr(model, "accepts", None)
    return bool(same(fingerprint)) if same is not None else fingerprint == model.fingerprint


def window_of(model: Encodes) -> int | None:
    """Tokens that the backbone can see together, where it says so."""
    found = getattr(_text_config(model), "max_position_embeddings", None)
    return int(found) if found else None


def vocabulary_of(model: Encodes) -> int | None:
    """Token ids that the backbone knows, where it says so."""
    embeddings = getattr(model, "get_input_embeddings", None)
    weight = getattr(embeddings(), "weight", None) if embeddings is not None else None
    return None if weight is None else int(weight.shape[0])


def _routes_tokens(model: Encodes) -> bool:
    """Whether the backbone sends tokens to experts: the shapes of their products depend on a segment's company."""
    counts = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(_text_config(model), name, None) or 0) > 1 for name in counts)


def _text_config(model: Encodes) -> Any:
    config = getattr(model.config, "backbone_config", None) or model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config
