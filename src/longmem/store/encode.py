"""From a text to tokens, and from token ids to stored chunks: many segments in a batch, through the backbone.

What a segment leaves in memory must not depend on its company, to the last bit: then adding in parts equals adding at
once, equal texts need not be encoded twice, and a lost file can be made again. Matrix products round differently for
different shapes, so a segment always goes through in a batch of the same shape: as long as the next power of two, in a
number of rows that depends on this length alone; rows without a segment are filled up.

T segment tokens · B rows · n chunks · H heads of all layers · S tokens per chunk · D head_dim
"""

from __future__ import annotations

import hashlib
import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longmem.errors import StoreError
from longmem.store.disk import StoredChunks, joined, pack
from longmem.store.records import Layout
from longmem.types import AttentionKV

Ids = NDArray[np.uint32]


@dataclass(frozen=True)
class Tokens:
    """A run of tokens, with its text if it was made from one."""

    ids: Ids  # (t,)
    text: str | None = None  # that they were made from; None where only ids were given
    starts: Ids | None = None  # (t,) where in ``text`` each token begins, never falling; None without text

    def __len__(self) -> int:
        return len(self.ids)

    def slice(self, start: int, stop: int) -> Tokens:
        """Tokens ``start`` to ``stop`` with their part of the text; the parts of all slices make the whole text."""
        ids = self.ids[start:stop]
        if self.text is None or self.starts is None:
            return Tokens(ids)
        begin = 0 if start == 0 else int(self.starts[start])
        end = len(self.text) if stop >= len(self.ids) else int(self.starts[stop])
        starts = np.maximum(self.starts[start:stop].astype(np.int64) - begin, 0).astype(np.uint32)
        return Tokens(ids, self.text[begin:end], starts)

    def digest(self) -> bytes:
        """16 bytes of BLAKE2b over ids and text."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(struct.pack("<Q", len(self.ids)))
        digest.update(self.ids.astype("<u4").tobytes())
        if self.text is not None:
            digest.update(b"t" + self.text.encode())
        return digest.digest()

    def columns(self) -> dict[str, bytes | str | None]:
        """As the catalog keeps them."""
        starts = None if self.starts is None else self.starts.astype("<u4").tobytes()
        return {"token_ids": self.ids.astype("<u4").tobytes(), "text": self.text, "starts": starts}

    @classmethod
    def from_columns(cls, ids: bytes, text: str | None, starts: bytes | None) -> Tokens:
        """The inverse of ``columns``."""
        return cls(np.frombuffer(ids, "<u4"), text, None if starts is None else np.frombuffer(starts, "<u4"))

    def spelled(self, tokenizer: Any) -> str:
        """The text; of ids without one, what they decode to, or without a tokenizer the ids themselves."""
        if self.text is not None:
            return self.text
        if tokenizer is None:
            return " ".join(map(str, self.ids.tolist()))
        return str(tokenizer.decode(self.ids.tolist()))


def joined_tokens(runs: Sequence[Tokens]) -> Tokens:
    """Runs of tokens, one after the other; a text only where all have one."""
    if len(runs) == 1:
        return runs[0]
    ids = np.concatenate([np.zeros(0, np.uint32), *(run.ids for run in runs)]).astype(np.uint32)
    if not runs or any(run.text is None for run in runs):
        return Tokens(ids)
    starts, begin = [], 0
    for run in runs:
        assert run.text is not None and run.starts is not None
        starts.append(run.starts + np.uint32(begin))
        begin += len(run.text)
    return Tokens(ids, "".join(run.text or "" for run in runs), np.concatenate(starts))


def cut(tokens: Tokens, piece_tokens: int) -> Iterator[Tokens]:
    """Pieces of ``piece_tokens`` tokens; the last one may be shorter."""
    for start in range(0, len(tokens), piece_tokens):
        yield tokens.slice(start, min(start + piece_tokens, len(tokens)))


def tokens_of(name: str, text: str | None, ids: Any, tokenizer: Any, *, begin: bool) -> Tokens:
    """The tokens of a new text, or of ids.

    Args:
        name: of the document, for messages.
        text: to be tokenised, whole.
        ids: tokens as they are; exactly one of the two is given.
        tokenizer: a fast one of transformers; only needed for text.
        begin: whether a document begins here: what the tokenizer puts before a text (``<s>``) then comes first, as in
            training. What it puts at the end (``</s>``) is left out: memory goes on.

    Raises:
        StoreError: nothing to remember, both or neither given, or a tokenizer that gives no offsets.
    """
    if (text is None) == (ids is None):
        given = "both" if ids is not None else "neither"
        raise StoreError(f"document {name!r}: give either a text or ids=, not {given}")
    tokens = _of_ids(name, ids) if text is None else _of_text(name, text, tokenizer, begin)
    if not len(tokens):
        raise StoreError(f"document {name!r} has no tokens; there is nothing to remember")
    return tokens


def _of_ids(name: str, ids: Any) -> Tokens:
    given = ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)
    flat = given.reshape(-1) if given.ndim != 2 or given.shape[0] == 1 else given
    if flat.ndim != 1 or (flat.size and flat.dtype.kind not in "iu"):
        raise StoreError(
            f"document {name!r}: ids of shape {given.shape} and type {given.dtype} must be integers, (tokens,)"
        )
    if flat.size and not 0 <= int(flat.min()) <= int(flat.max()) < 1 << 32:
        raise StoreError(f"document {name!r}: token ids {int(flat.min())}..{int(flat.max())} must lie in 0..2^32-1")
    return Tokens(flat.astype(np.uint32))


def _of_text(name: str, text: str, tokenizer: Any, begin: bool) -> Tokens:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise StoreError(
            f"document {name!r} is no valid Unicode (character {error.start}); read it with errors='replace'"
        ) from error
    if tokenizer is None:
        raise StoreError(
            f"document {name!r}: the store has no tokenizer; open it with tokenizer=, or give token ids with ids="
        )
    if not getattr(tokenizer, "is_fast", False):
        raise StoreError(
            f"document {name!r}: {type(tokenizer).__name__} does not say where in the text its tokens begin; "
            "use a fast tokenizer, or give token ids with ids="
        )
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
    prefix = _prefix(tokenizer) if begin and found["input_ids"] else []
    offsets = np.array(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:, 0]
    # offsets of some tokenizers step back at composed characters; text is cut at them, so they must not
    starts = np.concatenate([np.zeros(len(prefix), dtype=np.int64), np.maximum.accumulate(offsets)])
    return Tokens(np.array([*prefix, *found["input_ids"]], dtype=np.uint32), text, starts.astype(np.uint32))


def _prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text (``<s>`` of Llama, nothing of GPT-2)."""
    ids: list[int] = tokenizer("")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


CPU_BATCH_TOKENS = 512
GPU_BATCH_TOKENS = 16384
LONGEST_SEGMENT = 1024
"""The paper's; long-context backbones would otherwise get all they can take."""
_SHORTEST = 16


class Encodes(Protocol):
    """What the store needs of a model; ``LongMem``, ``MemTRM`` and ``TrainingFree`` have it."""

    config: Any

    @property
    def memory_layers(self) -> tuple[int, ...]: ...

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
