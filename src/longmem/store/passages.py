"""From chunks back to text: what is written at a place of a document, and what a query's heads find.

H heads · T tokens
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longmem.errors import StoreError
from longmem.store.encode import Tokens, tokens_of
from longmem.store.room import Room
from longmem.types import ChunkOrigin, Memory


@dataclass(frozen=True)
class Passage:
    """The text of a chunk, between what comes before it and after it."""

    before: str
    text: str
    after: str


@dataclass(frozen=True)
class SearchHit:
    """A chunk that the heads found for a query text."""

    origin: ChunkOrigin  # its document, offset, length and time
    passage: Passage  # its text, with some more on either side
    share: float  # part of the heads' output that came from it, the mean over the query's tokens and heads
    score: float  # largest inner product of a query with its mean key
    heads: dict[int, float]  # for every head that found it, its part (the mean over the tokens), largest first


def read_passage(room: Room, origin: ChunkOrigin, around: int) -> Passage:
    """The text of a stored chunk, with ``around`` tokens on either side, inside of its document.

    Raises:
        StoreError: the document was forgotten, replaced or has expired, or is no document of this store.
    """
    tokenizer, catalog = room.find_tokenizer(), room.catalog
    with catalog.read():
        document = None if origin.namespace is None else catalog.find(origin.namespace, origin.document or "")
        if document is None or document.id != origin.document_id:
            raise StoreError(
                f"document {origin.document!r} of namespace {origin.namespace!r} is not there any more; "
                "what was read from it cannot be shown"
            )
        last = origin.start_token + origin.length
        edges = (max(0, origin.start_token - around), origin.start_token, last, min(document.tokens, last + around))
        parts: list[list[Tokens]] = [[], [], []]
        for part in catalog.parts(document.id):
            begin, end = part.first_token, part.first_token + part.tokens
            if end <= edges[0] or begin >= edges[-1]:
                continue
            tokens = catalog.tokens(part.piece)
            for run, first, stop in zip(parts, edges, edges[1:], strict=False):
                if max(first, begin) < min(stop, end):
                    run.append(tokens.slice(max(first, begin) - begin, min(stop, end) - begin))
    return Passage(*("".join(each.spelled(tokenizer) for each in run) for run in parts))


def search_text(bank: Any, query: str, room: Room, *, top: int, row: int, around: int) -> list[SearchHit]:
    """Which chunks of a row the model's heads find for a text, the largest share first.

    Args:
        bank: a ``StoreBank`` or ``SessionBank``.
        query: read segment by segment where it is longer than one.

    Raises:
        StoreError: the store has no model or tokenizer, or the text is empty.
    """
    if room.encoder is None:
        raise StoreError("searching for a text needs the model: MemoryStore.open(path, model=...)")
    tokens = tokens_of("the query", query, None, room.find_tokenizer(needed=True), begin=True)
    ids = torch.from_numpy(tokens.ids.astype(np.int64))
    found: dict[int, list[tuple[float, Any]]] = defaultdict(list)
    for segment in ids.split(room.layout.segment_tokens):
        for reading in _readings(room.encoder.model, segment, bank, row):
            found[reading.chunk].append((len(segment) / len(ids), reading))
    shares = {chunk: sum(part * each.share for part, each in found[chunk]) for chunk in found}
    hits = []
    for chunk in sorted(found, key=lambda chunk: -shares[chunk])[:top]:
        heads: dict[int, float] = defaultdict(float)
        for part, reading in found[chunk]:
            for head, share in reading.heads.items():
                heads[head] += part * share
        origin, score = found[chunk][0][1].origin, max(each.score for _, each in found[chunk])
        ordered = dict(sorted(heads.items(), key=lambda pair: -pair[1]))
        passage = bank.passage(origin, around, row=row)
        hits.append(SearchHit(origin, passage, shares[chunk], score, ordered))
    return hits


@torch.no_grad()
def _readings(model: Any, segment: Tensor, bank: Memory, row: int) -> list[Any]:
    training, rows = model.training, torch.tensor([row])
    model.train(False)
    try:
        given = segment[None].to(model.device)
        out = model(given, memory=bank, memory_rows=rows, explain=True, logits_to_keep=1, use_cache=False)
    finally:
        model.train(training)
    found: list[Any] = out.explanation.over()
    return found
