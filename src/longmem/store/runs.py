"""Which chunks a bank has and where they are: runs of records of the data files; and what is loaded of them.

A chunk's number stays what it is until the bank is refreshed, also when other chunks are forgotten.

P runs · N chunks · n chunks that can be found · H heads of all layers · Hkv heads of one layer · S tokens per chunk ·
D head_dim · Q queries per key/value head · R retrieved chunks · M pairs of a slot and a head
"""

from __future__ import annotations

import math
import time as clock
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longmem.memory.index import Index
from longmem.store.catalog import Catalog, DocumentInfo, Selection
from longmem.store.disk import Numbers, StoredChunks
from longmem.types import ChunkOrigin

_QUERY = """
SELECT document.id, part.piece, part.first_token, part.tokens, piece.first
FROM document JOIN part ON part.document = document.id JOIN piece ON piece.id = part.piece
WHERE namespace = ? AND (expires IS NULL OR expires > ?) ORDER BY added, document.id, ordinal
"""


@dataclass(frozen=True)
class Runs:
    """The chunks of a bank at one moment."""

    size: int  # S
    documents: list[DocumentInfo]
    stored: StoredChunks  # the data files
    begins: Numbers  # (P + 1,) number of each run's first chunk, and N
    document: Numbers  # (P,) index into ``documents``
    piece: Numbers  # (P,) the piece that the run is a part of
    first: Numbers  # (P,) record of the run's first chunk in the data files
    first_token: Numbers  # (P,) offset of the run's first token in its document
    tokens: Numbers  # (P,) real tokens of the run; only its last chunk may be short
    left: Numbers  # (P,) chunks of the run that can still be found, its first ones

    def __len__(self) -> int:
        return int(self.begins[-1])

    def places(self, chunks: Numbers) -> tuple[Numbers, Numbers]:
        """The run of each chunk, and its place in it."""
        runs = np.searchsorted(self.begins, chunks, side="right") - 1
        return runs, chunks - self.begins[runs]

    def lengths(self, chunks: Numbers) -> Numbers:
        """Real tokens of each chunk."""
        runs, inside = self.places(chunks)
        found: Numbers = np.minimum(self.size, self.tokens[runs] - inside * self.size)
        return found

    def records(self, chunks: Numbers) -> Numbers:
        """Where each chunk is in the data files."""
        runs, inside = self.places(chunks)
        return self.first[runs] + inside

    def ids(self, chunks: Numbers) -> Numbers:
        """What stays the same when a chunk gets another number or place: its piece, and its place in that."""
        runs, inside = self.places(chunks)
        found: Numbers = (self.piece[runs] << 32) + inside
        return found

    def alive(self) -> Numbers:
        """(n,) the chunks that can be found."""
        inside = np.arange(self.left.sum()) - np.repeat(np.cumsum(self.left) - self.left, self.left)
        found: Numbers = np.repeat(self.begins[:-1], self.left) + inside
        return found

    def origin(self, chunk: int) -> ChunkOrigin:
        """Where a chunk came from."""
        (run,), (inside,) = self.places(np.array([chunk]))
        document = self.documents[int(self.document[run])]
        return ChunkOrigin(
            document=document.name,
            start_token=int(self.first_token[run] + inside * self.size),
            length=int(self.lengths(np.array([chunk]))[0]),
            number=chunk,
            time=document.added,
            namespace=document.namespace,
            document_id=document.id,
        )

    def expires(self) -> float:
        """The first moment at which a document that is left expires; infinity if none does."""
        left = {int(number) for number in self.document[self.left > 0]}
        return min((self.documents[each].expires or math.inf for each in left), default=math.inf)

    def now(self, catalog: Catalog, namespace: str) -> Runs:
        """The same chunks where they are stored now, fewer left of those that were forgotten, replaced or cut back.

        What was once gone stays gone, whatever becomes of its document.
        """
        with catalog.read() as db:
            rows = db.execute(_QUERY, (namespace, clock.time()))
            there = {(row[0], row[1], row[2]): (row[3], row[4]) for row in rows}
            expires = dict(db.execute("SELECT id, expires FROM document WHERE namespace = ?", (namespace,)))
            stored = catalog.chunks()
        left, first = self.left.copy(), self.first.copy()
        for run in np.flatnonzero(left).tolist():
            document, piece = self.documents[self.document[run]].id, int(self.piece[run])
            tokens, first[run] = there.get((document, piece, int(self.first_token[run])), (0, 0))
            if tokens < self.tokens[run]:  # a part that was cut back ends with a whole chunk
                left[run] = min(int(left[run]), tokens // self.size)
        documents = [replace(each, expires=expires.get(each.id)) for each in self.documents]
        return replace(self, documents=documents, stored=stored, left=left, first=first)


def read_runs(catalog: Catalog, namespace: str, selection: Selection) -> Runs:
    """The chunks of a selection's documents, in the order of the documents' times.

    Raises:
        StoreError: a document that was named is not there.
        GenerationGone: see ``Catalog.chunks``.
    """
    size = catalog.layout.chunk_size
    with catalog.read() as db:
        documents = catalog.documents(namespace, selection)
        number = {each.id: at for at, each in enumerate(documents)}
        runs = [
            [number[document], piece, first, first_token, tokens]  # in the order of the fields of Runs
            for document, piece, first_token, tokens, first in db.execute(_QUERY, (namespace, clock.time()))
            if document in number
        ]
        stored = catalog.chunks()
    table = np.array(runs, dtype=np.int64).reshape(-1, 5)
    counts = -(-table[:, 4] // size)
    columns: list[Numbers] = [*table.T, counts]
    return Runs(size, documents, stored, np.concatenate([[0], np.cumsum(counts)]), *columns)


AT_ONCE = 1 << 14
"""Chunks that are read at a time: no second copy of everything."""


class Loaded:
    """What was read of the chunks that can be found, side by side in n slots.

    Args:
        runs: of the bank.
        indexes: one for each remembered layer.
        keep: whether keys and values are read too; else they stay in the map.
        before: what was loaded until now; keys before the first change are not read again.
    """

    keys: Tensor  # (1, H, n, D), mean keys
    kv: Tensor | None = None  # (n, H, 2, S, D)
    scales: Tensor | None = None  # (n, H, 2)

    def __init__(
        self, runs: Runs, indexes: Sequence[Index], device: torch.device, keep: bool, before: Loaded | None
    ) -> None:
        self.runs, self.indexes = runs, indexes
        self.chunks = runs.alive()  # (n,) number of the chunk in each slot, ascending
        self.ids, had = runs.ids(self.chunks), np.zeros(0) if before is None else before.ids
        shared, count = min(len(had), len(self.ids)), len(self.ids)
        same = int(np.append(had[:shared] != self.ids[:shared], True).argmax())  # leading slots that are what they were
        if before is not None and same == len(had) == count:
            self.keys, self.kv, self.scales = before.keys, before.kv, before.scales
            return
        stored, records = runs.stored, runs.records(self.chunks)
        self.keys = torch.empty(1, stored.keys.shape[1], count, stored.keys.shape[2], device=device)
        if before is not None:
            self.keys[:, :, :same] = before.keys[:, :, :same]
            before.kv = before.scales = None  # no two copies of them
        read_into(self.keys[0].transpose(0, 1)[same:], stored.keys, records[same:])
        if keep:
            dtype = as_tensor(stored.kv[:0].copy()).dtype
            self.kv = torch.empty(count, *stored.kv.shape[1:], dtype=dtype, device=device)
            read_into(self.kv, stored.kv, records)
            if stored.scales is not None:
                self.scales = torch.empty(count, *stored.scales.shape[1:], device=device)
                read_into(self.scales, stored.scales, records)
        if same < len(had) or before is None:
            for index in indexes:
                index.cleared(0)
            same = 0
        slots = torch.arange(same, count, device=device)
        for index in indexes:
            index.written(0, slots)

    @property
    def nbytes(self) -> int:
        """Bytes of all that was read."""
        return sum(each.nbytes for each in (self.keys, self.kv, self.scales) if each is not None)

    def search(self, queries: Tensor, num: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best chunks of queries (b, Hkv, Q, D).

        Returns:
            scores (b, Hkv, Q, R) float32, slots (b, Hkv, Q, R) long, best first, and (R,) bool where there is any;
            elsewhere both are 0.
        """
        lines, live = queries.shape[0], len(self.chunks)
        exists = torch.arange(num, device=queries.device) < live
        if not live:
            nothing = torch.zeros(*queries.shape[:3], num, device=queries.device)
            return nothing, nothing.long(), exists
        keys = self.keys.tensor_split(len(self.indexes), dim=1)[layer]
        scores, slots = self.indexes[layer].search(queries, keys, [0] * lines, [live] * lines, num)
        return scores.masked_fill(~exists, 0.0), slots.masked_fill(~exists, 0), exists

    def take(self, slots: Numbers, heads: Numbers) -> Tensor:
        """Keys and values (M + 1, 2, S, D) on the device, of slots (M,) and heads (M,); the last is zero."""
        kv: Any = self.kv
        scales: Any = self.scales
        if kv is not None:
            kv, scales = kv[slots, heads], scales if scales is None else scales[slots, heads]
        else:
            records, stored = self.runs.records(self.chunks[slots]), self.runs.stored
            kv = as_tensor(stored.kv[records, heads])
            scales = None if stored.scales is None else torch.from_numpy(stored.scales[records, heads])
        if scales is not None:
            kv = kv.to(torch.float32) * scales[..., None, None]
        device = self.keys.device
        # page-locked, so that a GPU fetches it while the host goes on
        pinned = kv.device.type == "cpu" and device.type == "cuda"
        taken: Tensor = torch.zeros(len(kv) + 1, *kv.shape[1:], dtype=kv.dtype, device=kv.device, pin_memory=pinned)
        taken[:-1] = kv
        return taken.to(device, non_blocking=True)


def read_into(target: Tensor, stored: Any, records: Numbers) -> None:
    """Fill ``target`` with records of an array of the data files, in their order."""
    for begin in range(0, len(records), AT_ONCE):
        some = records[begin : begin + AT_ONCE]
        follow = bool((np.diff(some) == 1).all())
        target[begin : begin + len(some)] = as_tensor(stored[some[0] : some[-1] + 1].copy() if follow else stored[some])


def as_tensor(stored: Any) -> Tensor:
    """A copy of numbers of the data files; 16-bit integers are the bits of bfloat16."""
    read = torch.from_numpy(stored)
    return read.view(torch.bfloat16) if read.dtype == torch.int16 else read
