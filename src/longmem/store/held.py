"""What a bank holds of a store: which chunks, where they are stored, and what has been read of them.

A chunk's number stays what it is until the bank is refreshed, also when other chunks are forgotten.

N chunks · n chunks that can be found · H heads of all layers · S tokens per chunk · D head_dim ·
M pairs of a slot and a head
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longmem.memory.index import Index
from longmem.store.catalog import Catalog, DocumentInfo, Selection
from longmem.store.disk import Numbers, StoredChunks
from longmem.types import ChunkOrigin

_PARTS = """
SELECT document.id, first_token, piece.id, piece.first, part.tokens, expires
FROM document JOIN part ON part.document = document.id JOIN piece ON piece.id = part.piece
WHERE namespace = ? ORDER BY added, document.id, ordinal
"""


@dataclass(frozen=True)
class Held:
    """The chunks of a bank at one moment, document after document; chunk i of one begins at its token i * S."""

    size: int  # S
    documents: list[DocumentInfo]
    begins: Numbers  # number of each document's first chunk, and N
    parts: list[tuple[int, int, int]]  # document, first token there, and piece of each part, in the chunks' order
    counts: Numbers  # chunks of each part
    lengths: Numbers  # (N,) real tokens of each chunk; only the last of a document may be short
    ids: Numbers  # (N,) its piece and its place in that, which stay the same when it gets another number or place
    records: Numbers  # (N,) where it is in the data files; -1 if it cannot be found any more
    stored: StoredChunks  # the data files
    expires: float  # the first moment at which a document expires; infinity if none does

    def __len__(self) -> int:
        return len(self.ids)

    def alive(self) -> Numbers:
        """(n,) the chunks that can be found."""
        return np.flatnonzero(self.records >= 0)

    def origin(self, chunk: int) -> ChunkOrigin:
        """Where a chunk came from."""
        at = int(np.searchsorted(self.begins, chunk, side="right")) - 1
        document = self.documents[at]
        return ChunkOrigin(
            document=document.name,
            start_token=int(chunk - self.begins[at]) * self.size,
            length=int(self.lengths[chunk]),
            number=chunk,
            time=document.added,
            namespace=document.namespace,
            document_id=document.id,
        )

    def now(self, catalog: Catalog, namespace: str) -> Held:
        """The same chunks where they are stored now, without those that were forgotten, replaced or cut back.

        What was once gone stays gone, whatever becomes of its document. Documents are not read again: this is what the
        first search after any commit waits for.
        """
        moment = time.time()
        with catalog.read() as db:
            rows = {tuple(row[:3]): row[3:] for row in db.execute(_PARTS, (namespace,))}
            stored = catalog.chunks()
        found = [rows.get(part, (0, 0, None)) for part in self.parts]
        found = [each if each[2] is None or each[2] > moment else (0, 0, None) for each in found]
        first, tokens = np.array([each[:2] for each in found], dtype=np.int64).reshape(-1, 2).T
        inside = self.ids & _PLACE
        there = (inside < np.repeat(-(-tokens // self.size), self.counts)) & (self.records >= 0)
        records = np.where(there, np.repeat(first, self.counts) + inside, -1)
        expires = min((each[2] for each in found if each[2] is not None), default=math.inf)
        return replace(self, records=records, stored=stored, expires=expires)


_PLACE = (1 << 32) - 1


def read_held(catalog: Catalog, namespace: str, selection: Selection) -> Held:
    """The chunks of a selection's documents, in the order of the documents' times.

    Raises:
        StoreError: a document that was named is not there.
        GenerationGone: see ``Catalog.chunks``.
    """
    size = catalog.layout.chunk_size
    with catalog.read() as db:
        documents = catalog.documents(namespace, selection)
        wanted = {each.id for each in documents}
        rows = [row for row in db.execute(_PARTS, (namespace,)) if row[0] in wanted]
        stored = catalog.chunks()
    piece, first, tokens = np.array([row[2:5] for row in rows], dtype=np.int64).reshape(-1, 3).T
    counts = -(-tokens // size)
    ends = np.cumsum(counts)
    inside = np.arange(counts.sum()) - np.repeat(ends - counts, counts)
    lengths = np.full(len(inside), size)
    lengths[ends - 1] = tokens - (counts - 1) * size
    return Held(
        size,
        documents,
        begins=np.cumsum([0, *(each.chunks for each in documents)]),
        parts=[row[:3] for row in rows],
        counts=counts,
        lengths=lengths,
        ids=np.repeat(piece << 32, counts) + inside,
        records=np.repeat(first, counts) + inside,
        stored=stored,
        expires=min((each.expires for each in documents if each.expires is not None), default=math.inf),
    )


AT_ONCE = 1 << 10
"""Chunks that are read at a time: few enough to stay in a processor's cache between their two copies."""


class Loaded:
    """The mean keys of the chunks that can be found, next to each other in n slots; see ``memory.index.Chunks``.

    Args:
        held: the chunks of the bank.
        indexes: one for each remembered layer.
        before: what was loaded until now; keys before the first change are not read again.

    Attributes:
        storage: (1, n + 1, H, 2, S, D), a shape only; keys and values are read from the data files by ``take``.
        keys: (1, H, n, D).
        lengths: (1, n + 1), real tokens of each chunk, and 0.
    """

    def __init__(self, held: Held, indexes: Sequence[Index], device: torch.device, before: Loaded | None) -> None:
        self.keys: Tensor
        self.held, stored = held, held.stored
        self.chunks = held.alive()  # (n,) number of the chunk in each slot, ascending
        self.ids, had = held.ids[self.chunks], np.zeros(0) if before is None else before.ids
        shared, count = min(len(had), len(self.ids)), len(self.ids)
        self.storage = torch.zeros(()).expand(1, count + 1, *stored.kv.shape[1:])
        self.lengths = torch.from_numpy(np.append(held.lengths[self.chunks], 0)).to(device)[None]
        same = int(np.append(had[:shared] != self.ids[:shared], True).argmax())  # leading slots that are what they were
        if before is not None and same == len(had) == count:
            self.keys = before.keys
            return
        self.keys = torch.empty(1, stored.keys.shape[1], count, stored.keys.shape[2], device=device)
        if before is not None:
            self.keys[:, :, :same] = before.keys[:, :, :same]
        read_into(self.keys[0].transpose(0, 1)[same:], stored.keys, held.records[self.chunks][same:])
        if same < len(had) or before is None:
            for index in indexes:
                index.cleared(0)
            same = 0
        slots = torch.arange(same, count, device=device)
        for index in indexes:
            index.written(0, slots)

    def take(self, slots: Numbers, heads: Numbers) -> Tensor:
        """Keys and values (M + 1, 2, S, D) on the device, of slots (M,) and heads (M,); the last is zero."""
        records, stored = self.held.records[self.chunks[slots]], self.held.stored
        kv = torch.from_numpy(stored.kv[records, heads])
        if kv.dtype == torch.int16:  # the bits of bfloat16
            kv = kv.view(torch.bfloat16)
        if stored.scales is not None:
            kv = kv.to(torch.float32) * torch.from_numpy(stored.scales[records, heads])[..., None, None]
        device = self.keys.device
        # page-locked, so that a GPU fetches it while the host goes on
        taken = torch.zeros(len(kv) + 1, *kv.shape[1:], dtype=kv.dtype, pin_memory=device.type == "cuda")
        taken[:-1] = kv
        return taken.to(device, non_blocking=True)


def read_into(target: Tensor, stored: NDArray[Any], records: Numbers) -> None:
    """Fill ``target`` with records of an array of the data files, in their order."""
    for begin in range(0, len(records), AT_ONCE):
        target[begin : begin + AT_ONCE] = torch.from_numpy(stored[records[begin : begin + AT_ONCE]])
