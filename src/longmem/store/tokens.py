"""From a text or token ids to pieces: runs of whole segments, the unit of deduplication and of resuming."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from longmem.errors import StoreError

Ids = NDArray[np.uint32]


@dataclass(frozen=True)
class Tokens:
    """A run of tokens, with its text if it was made from one.

    Attributes:
        ids: (t,) uint32.
        text: that they were made from; None where only ids were given.
        starts: (t,) uint32, where in ``text`` each token begins, never falling; None without text.
    """

    ids: Ids
    text: str | None = None
    starts: NDArray[np.uint32] | None = None

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

    def columns(self) -> tuple[bytes, str | None, bytes | None]:
        """As the catalog keeps them."""
        starts = None if self.starts is None else self.starts.astype("<u4").tobytes()
        return self.ids.astype("<u4").tobytes(), self.text, starts

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


def joined(runs: Sequence[Tokens]) -> Tokens:
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
