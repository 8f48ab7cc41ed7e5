"""From a text or token ids to pieces: runs of whole segments, the unit of deduplication and of going on."""

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
from longmem.store.schema import TextRow

Ids = NDArray[np.uint32]


@dataclass(frozen=True)
class Tokens:
    """A run of tokens, with its text if it was made from one.

    Attributes:
        ids: (n,) uint32.
        text: that they were made from; None where only ids were given.
        starts: (n,) uint32, where in ``text`` each token begins, never falling; None without text.
    """

    ids: Ids
    text: str | None = None
    starts: NDArray[np.uint32] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def slice(self, start: int, stop: int) -> Tokens:
        """Tokens ``start`` to ``stop`` and the text from the first one's start to that of the token behind them.

        The first run of a text begins where the text does, the last one ends where the text does.
        """
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

    def row(self, content: int, records: bytes) -> TextRow:
        """As the catalog keeps it."""
        starts = None if self.starts is None else self.starts.astype("<u4").tobytes()
        return TextRow(content, self.ids.astype("<u4").tobytes(), self.text, starts, records)

    @classmethod
    def from_row(cls, row: TextRow) -> Tokens:
        """As the catalog kept it."""
        starts = None if row.starts is None else np.frombuffer(row.starts, dtype="<u4")
        return cls(np.frombuffer(row.token_ids, dtype="<u4"), row.text, starts)


def joined(runs: Sequence[Tokens]) -> Tokens:
    """Runs of tokens one behind the other; all have text, or none."""
    if len(runs) == 1:
        return runs[0]
    ids = np.concatenate([run.ids for run in runs]) if runs else np.zeros(0, dtype=np.uint32)
    if not runs or any(run.text is None for run in runs):
        return Tokens(ids.astype(np.uint32))
    starts, begin = [], 0
    for run in runs:
        assert run.text is not None and run.starts is not None
        starts.append(run.starts + np.uint32(begin))
        begin += len(run.text)
    return Tokens(ids.astype(np.uint32), "".join(run.text or "" for run in runs), np.concatenate(starts))


def cut(tokens: Tokens, piece_tokens: int) -> Iterator[Tokens]:
    """Pieces of ``piece_tokens`` tokens; the last one may be shorter."""
    for start in range(0, len(tokens), piece_tokens):
        yield tokens.slice(start, min(start + piece_tokens, len(tokens)))


def tokens_of(
    name: str, text: str | None, ids: Sequence[int] | NDArray[Any] | torch.Tensor | None, tokenizer: Any, *, begin: bool
) -> Tokens:
    """The tokens of a new text, or of ids.

    Args:
        name: of the document, for messages.
        text: to be tokenised, whole.
        ids: tokens as they are; the one or the other is given.
        tokenizer: a fast one of transformers; only needed for text.
        begin: whether this is the beginning of a document: then what the tokenizer puts before a text (``<s>``) comes
            first, as in training.

    Raises:
        StoreError: nothing to remember, both or neither given, or a tokenizer that gives no offsets.
    """
    if (text is None) == (ids is None):
        raise StoreError(
            f"document {name!r}: give either a text or ids=, not {'both' if ids is not None else 'neither'}"
        )
    tokens = _of_ids(name, ids) if ids is not None else _of_text(name, text or "", tokenizer, begin)
    if not len(tokens):
        raise StoreError(f"document {name!r} has no tokens; there is nothing to remember")
    return tokens


def _of_ids(name: str, ids: Sequence[int] | NDArray[Any] | torch.Tensor) -> Tokens:
    given = ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)
    flat = given.reshape(-1) if given.ndim != 2 or given.shape[0] == 1 else given
    if flat.ndim != 1 or (flat.size and flat.dtype.kind not in "iu"):
        raise StoreError(
            f"document {name!r}: ids of shape {given.shape} and type {given.dtype} must be integers, (tokens,)"
        )
    if flat.size and (int(flat.min()) < 0 or int(flat.max()) >= 1 << 32):
        raise StoreError(f"document {name!r}: token id {int(flat.min())}..{int(flat.max())} must lie in 0..2^32-1")
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
    ids = np.array([*prefix, *found["input_ids"]], dtype=np.uint32)
    offsets = np.array(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:, 0]
    starts = np.concatenate([np.zeros(len(prefix), dtype=np.int64), np.maximum.accumulate(offsets)])
    return Tokens(ids, text, starts.astype(np.uint32))


def _prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts in front of a text (``<s>`` of Llama, nothing of GPT-2)."""
    ids: list[int] = tokenizer("")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
