"""What was read from memory for every generated token, with the text of what was read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from longmem.errors import StoreError
from longmem.generation.pieces import Pieces
from longmem.types import ChunkOrigin

AROUND = 12
"""Tokens of context shown on either side of a chunk."""
MOST_CHUNKS = 6
"""Chunks shown for a token."""


class Readings(list[Any]):
    """Give this to ``generate(..., explain=Readings())``: of every call it keeps what chose the new token, no more.

    Holds for each new token of the first row its share given to memory and its chunks, largest share first.
    """

    def __init__(self, most_chunks: int = MOST_CHUNKS) -> None:
        super().__init__()
        self._most = most_chunks

    def append(self, explanation: Any) -> None:
        share = float(explanation.share[0, :, -1].mean())
        super().append((share, [each for each in explanation.token(-1, top=self._most) if each.share > 0]))


@dataclass(frozen=True)
class FoundChunk:
    """A chunk that was read.

    Attributes:
        document: its name; None where nobody gave one.
        start_token: its place in the document.
        share: part of the heads' output that came from it.
        score: largest inner product of a query with its mean key.
        before: text before it.
        text: its own.
        after: text behind it.
    """

    document: str | None
    start_token: int
    share: float
    score: float
    before: str
    text: str
    after: str


@dataclass(frozen=True)
class ExplainedToken:
    """A generated token and what was read to choose it.

    Attributes:
        token: its id.
        text: what it adds to the text.
        share: given to memory, the mean over heads.
        found: the chunks of the largest shares.
    """

    token: int
    text: str
    share: float
    found: list[FoundChunk]


def explained(
    readings: Readings, tokens: Sequence[int], prompt: Sequence[int], spell: Speller, tokenizer: Any
) -> list[ExplainedToken]:
    """Every new token with its readings, spelled.

    Args:
        readings: filled by ``generate``.
        tokens: the new token ids.
        prompt: the ids before them.
        spell: knows the texts.
        tokenizer: of transformers.
    """
    pieces, told = Pieces(tokenizer, prompt, skip_special_tokens=False), []
    for token, (share, chunks) in zip(tokens, readings, strict=False):
        told.append(ExplainedToken(token, pieces.push(token), share, [spell.found(chunk) for chunk in chunks]))
    return told


class Speller:
    """The text of chunks, wherever they come from.

    Args:
        tokenizer: of transformers.
        texts: by document name, the token ids of what the session holds.
        memory: of a store, which knows its own documents; or None.
        around: tokens on either side.
    """

    def __init__(
        self, tokenizer: Any, texts: Mapping[str, Sequence[int] | Tensor], memory: Any = None, around: int = AROUND
    ) -> None:
        self._tokenizer = tokenizer
        self._texts = texts
        self._memory = memory
        self._around = around
        self._known: dict[ChunkOrigin, tuple[str, str, str]] = {}

    def found(self, chunk: Any) -> FoundChunk:
        """With the chunk's own text and some more on either side."""
        origin = chunk.origin
        if origin not in self._known:
            self._known[origin] = self._spelled(origin)
        return FoundChunk(origin.document, origin.start_token, chunk.share, chunk.score, *self._known[origin])

    def _spelled(self, origin: ChunkOrigin) -> tuple[str, str, str]:
        ids = self._texts.get(origin.document or "") if origin.namespace is None else None
        if ids is not None:
            first, last = origin.start_token, origin.start_token + origin.length
            spans = ((max(0, first - self._around), first), (first, last), (last, last + self._around))
            before, text, after = (self._decode(ids[begin:end]) for begin, end in spans)
            return before, text, after
        if not hasattr(self._memory, "passage"):
            return "", "", ""
        try:
            passage = self._memory.passage(origin, self._around)
        except StoreError:  # forgotten since it was read
            return "", "", ""
        return passage.before, passage.text, passage.after

    def _decode(self, ids: Sequence[int] | Tensor) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
