"""From chunks back to text: what stands at a place of a document, and what a query's heads find.

H heads · T tokens
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from longmem.errors import StoreError
from longmem.store.pieces import Tokens, tokens_of
from longmem.store.places import ReadsStore
from longmem.store.rows import find_live
from longmem.store.schema import DocumentRow
from longmem.store.snapshot import Snapshot
from longmem.types import ChunkOrigin, Memory


@dataclass(frozen=True)
class Passage:
    """The text of a chunk between what stands before and behind it."""

    before: str
    text: str
    after: str


@dataclass(frozen=True)
class SearchHit:
    """A chunk that the heads found for a query text.

    Attributes:
        origin: its document, offset, length and time.
        passage: its text, with some more on either side.
        share: part of the heads' output that came from it, the mean over the query's tokens and heads.
        score: largest inner product of a query with its mean key.
        heads: for every head that found it, its part (the mean over the query's tokens), largest first.
    """

    origin: ChunkOrigin
    passage: Passage
    share: float
    score: float
    heads: dict[int, float]


class Searched(Memory, Protocol):
    """A memory on a store."""

    @property
    def store(self) -> ReadsStore: ...

    def passage_in(self, row: int, origin: ChunkOrigin, around: int) -> Passage:
        """The text of a chunk of a row."""
        ...


def read_passage(store: ReadsStore, origin: ChunkOrigin, around: int) -> Passage:
    """The text of a stored chunk, with ``around`` tokens on either side, inside of its document.

    Raises:
        StoreError: the document was forgotten, replaced or has expired, or is no document of this store.
    """
    with store.snapshot() as snapshot:
        document = None
        if origin.namespace is not None and origin.document is not None:
            document = find_live(snapshot, origin.namespace, origin.document)
        if document is None or document.id != origin.document_id:
            raise StoreError(
                f"document {origin.document!r} of namespace {origin.namespace!r} is not there any more; "
                "what was read from it cannot be shown"
            )
        last = origin.start_token + origin.length
        tokens = (max(0, origin.start_token - around), origin.start_token, last, min(document.tokens, last + around))
        parts = _texts(snapshot, document, tokens, store.tokenizer)
    return Passage(*parts)


def search_text(bank: Searched, query: str, *, top: int, row: int, around: int) -> list[SearchHit]:
    """Which chunks of a row the model's heads find for a text, the largest share first.

    A query longer than a segment is read segment by segment.

    Raises:
        StoreError: the store has no model or tokenizer, or the text is empty.
    """
    store = bank.store
    if store.model is None:
        raise StoreError("searching for a text needs the model: MemoryStore.open(path, model=...)")
    ids = torch.from_numpy(tokens_of("the query", query, None, store.tokenizer, begin=True).ids.astype(np.int64))
    shares: dict[int, float] = defaultdict(float)
    scores: dict[int, float] = {}
    heads: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    origins: dict[int, ChunkOrigin] = {}
    for segment in ids.split(store.layout.segment_tokens):
        part = len(segment) / len(ids)
        for reading in _readings(store.model, segment, bank, row):
            shares[reading.chunk] += part * reading.share
            scores[reading.chunk] = max(reading.score, scores.get(reading.chunk, reading.score))
            origins[reading.chunk] = reading.origin
            for head, share in reading.heads.items():
                heads[reading.chunk][head] += part * share
    best = sorted(shares, key=lambda chunk: -shares[chunk])[:top]
    return [
        SearchHit(
            origins[chunk],
            bank.passage_in(row, origins[chunk], around),
            shares[chunk],
            scores[chunk],
            dict(sorted(heads[chunk].items(), key=lambda pair: -pair[1])),
        )
        for chunk in best
    ]


@torch.no_grad()
def _readings(model: Any, segment: Tensor, bank: Memory, row: int) -> list[Any]:
    training = model.training
    model.train(False)
    try:
        out = model(
            segment[None].to(model.device),
            memory=bank,
            memory_rows=torch.tensor([row]),
            explain=True,
            logits_to_keep=1,
            use_cache=False,
        )
    finally:
        model.train(training)
    found: list[Any] = out.explanation.over()
    return found


def spelled(tokens: Tokens, tokenizer: Any) -> str:
    """The text of some tokens; without a text and a tokenizer, their ids."""
    if tokens.text is not None:
        return tokens.text
    if tokenizer is None:
        return " ".join(map(str, tokens.ids.tolist()))
    return str(tokenizer.decode(tokens.ids.tolist()))


def _texts(snapshot: Snapshot, document: DocumentRow, edges: tuple[int, ...], tokenizer: Any) -> list[str]:
    """The text between each two neighbouring edges, token offsets in the document."""
    parts: list[list[Tokens]] = [[] for _ in edges[1:]]
    for piece in snapshot.pieces(document):
        begin, end = piece.first_token, piece.first_token + piece.tokens
        if end <= edges[0] or begin >= edges[-1]:
            continue
        tokens = Tokens.from_row(snapshot.text(piece.content))
        for part, first, last in zip(parts, edges, edges[1:], strict=False):
            if max(first, begin) < min(last, end):
                part.append(tokens.slice(max(first, begin) - begin, min(last, end) - begin))
    return ["".join(spelled(run, tokenizer) for run in part) for part in parts]
