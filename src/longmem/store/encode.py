"""From token ids to stored chunks: many segments a batch, through the backbone up to its memory layer and no further.

What a segment leaves in memory must not depend on its company, to the last bit: then adding in parts equals adding at
once, equal texts need not be encoded twice, and a lost file can be made again. Matrix products round differently for
different shapes, so a segment always goes through in a batch of the same shape: as long as the next power of two, in a
number of rows that depends on this length alone; rows without a segment are filled up.

T segment tokens · B rows · n chunks · Hkv key/value heads · S tokens per chunk · D head_dim
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from longmem.errors import StoreError
from longmem.store.pieces import Ids
from longmem.store.precision import StoredChunks, joined, pack
from longmem.store.records import Layout
from longmem.types import AttentionKV

CPU_BATCH_TOKENS = 512
GPU_BATCH_TOKENS = 16384
LONGEST_SEGMENT = 1024
"""The paper's; long-context backbones would otherwise get all they can take."""
_SHORTEST = 16


class Encodes(Protocol):
    """What the store needs of a model; ``LongMem`` has it."""

    config: Any

    @property
    def fingerprint(self) -> str: ...

    @property
    def memory_layer(self) -> int: ...

    @property
    def memory_heads(self) -> int: ...

    @property
    def memory_head_dim(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def encode(self, input_ids: Tensor) -> AttentionKV:
        """Position-free keys and values (B, Hkv, T, D) of the segments (B, T)."""
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

    def encode(self, pieces: Sequence[Ids]) -> Iterator[tuple[int, StoredChunks]]:
        """Encode pieces, each a run of whole segments whose last may be short.

        Yields:
            the number of a piece, and its chunks, as soon as its last segment is through.

        Raises:
            StoreError: an id outside of the vocabulary, or numbers that the store's type cannot hold.
        """
        done: list[dict[int, StoredChunks]] = [{} for _ in pieces]
        segments = [-(-len(ids) // self.layout.segment_tokens) for ids in pieces]
        for batch in self._batches(pieces):
            for (piece, segment), chunks in zip(
                batch, self._run([self._segment(pieces, *at) for at in batch]), strict=True
            ):
                done[piece][segment] = chunks
                if len(done[piece]) == segments[piece]:
                    yield piece, joined([done[piece][number] for number in range(segments[piece])])
                    done[piece].clear()

    def _segment(self, pieces: Sequence[Ids], piece: int, segment: int) -> Ids:
        size = self.layout.segment_tokens
        return pieces[piece][segment * size : (segment + 1) * size]

    def _batches(self, pieces: Sequence[Ids]) -> Iterator[list[tuple[int, int]]]:
        """Segments (piece, number) that go through together, the pieces' order kept within a length."""
        waiting: dict[int, list[tuple[int, int]]] = defaultdict(list)
        size = self.layout.segment_tokens
        for piece, ids in enumerate(pieces):
            self._check_ids(ids)
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
        # no mask: a causal model's tokens do not see the filling behind them
        with torch.autocast(self.model.device.type, enabled=False):
            kv = self.model.encode(ids.to(self.model.device))
        pair = torch.stack((kv.keys, kv.values), dim=2)[: len(segments)].to("cpu", torch.float32)
        for row, segment in enumerate(segments):
            yield self._chunks(pair[row], len(segment))

    def _chunks(self, pair: Tensor, tokens: int) -> StoredChunks:
        """Keys and values (Hkv, 2, T, D) of one segment, of which ``tokens`` are real."""
        heads, _, _, dim = pair.shape
        size = self.layout.chunk_size
        count = self.layout.chunks(tokens)
        whole = torch.zeros(heads, 2, count * size, dim)
        whole[:, :, :tokens] = pair[:, :, :tokens]
        chunks = whole.view(heads, 2, count, size, dim).permute(2, 0, 1, 3, 4).contiguous()
        lengths = torch.full((count,), size)
        lengths[-1] = tokens - (count - 1) * size
        return pack(chunks, lengths, self.layout.dtype)

    def _check_ids(self, ids: Ids) -> None:
        if self._vocabulary is not None and len(ids) and int(ids.max()) >= self._vocabulary:
            raise StoreError(
                f"token id {int(ids.max())} is outside of the backbone's vocabulary of {self._vocabulary}; "
                "use the tokenizer that belongs to the backbone"
            )


def window_of(model: Encodes) -> int | None:
    """Tokens that the backbone can see together, where it says so."""
    config = getattr(model.config, "backbone_config", None) or model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "max_position_embeddings", None)
    return int(found) if found else None


def backbone_of(model: Encodes) -> str | None:
    """Where the model's backbone is, as others can find it: a name of the hub or a path; None where nothing says."""
    named = getattr(model.config, "backbone_name_or_path", None)
    inner = getattr(getattr(model, "backbone", None), "model", None)
    loaded = getattr(getattr(inner, "config", None), "_name_or_path", None)
    if loaded and loaded != named and Path(loaded).is_dir():
        # a checkpoint names its backbone from its own folder, which means another place from here, or none
        return str(Path(loaded).resolve())
    return str(named) if named else None


def vocabulary_of(model: Encodes) -> int | None:
    """Token ids that the backbone knows, where it says so."""
    embeddings = getattr(model, "get_input_embeddings", None)
    weight = getattr(embeddings(), "weight", None) if embeddings is not None else None
    return None if weight is None else int(weight.shape[0])


def _routes_tokens(model: Encodes) -> bool:
    """Whether the backbone sends tokens to experts: the shapes of their products depend on a segment's company."""
    config = getattr(model.config, "backbone_config", None) or model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    counts = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(text, name, None) or 0) > 1 for name in counts)
