"""``StoreBank``: the documents of a store as a memory that a model searches.

What a bank holds (``Held``) are the numbers of its chunks, where they are from and where they are stored; once it is
searched, also their mean keys.

B batch rows · T tokens · H query heads, or in storage the heads of all layers · Hkv key/value heads of a layer ·
D head_dim · S tokens per chunk · R retrieved chunks · N chunks of a bank · n of them that can be found ·
M pairs of a chunk and a key/value head
"""

from __future__ import annotations

import math
import threading
import time as clock
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longmem.errors import MemoryBankError, StoreError
from longmem.memory.bank import MemoryBank
from longmem.memory.index import Index, make_indexes, rows_of, search_chunks
from longmem.memory.session import SessionMemory
from longmem.store.catalog import Catalog, DocumentInfo, Selection
from longmem.store.disk import Numbers, StoredChunks, until_found
from longmem.store.encode import NewDocument, composed
from longmem.types import ChunkOrigin, RetrievedMemory, period


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


class StoreBank:
    """Documents of a namespace, read-only: one row, which every row of a batch reads.

    For a batch of several namespaces ``generate`` takes a list of banks, and the model a ``JoinedMemory`` of them.

    Opening reads the catalog alone. Chunk keys are read at the first search (or by ``load``); keys and values stay in
    the memory map, and of them only the heads and chunks that were found are read.

    A bank holds the documents of the moment when it was opened. What is added, appended or replaced later it finds
    after ``refresh``; what is forgotten, replaced or expired, by any process, it misses from the next search on.
    Chunk numbers stay what they are until ``refresh``. Threads may share a bank: their searches wait for each other.

    Args:
        store: an open ``MemoryStore``; closing it closes the bank.
        namespace: whose documents.
        device: where to search.
        index: how keys are searched: "exact", "faiss", or an index that was never used.
        **selection: ``documents``, ``where``, ``after``, ``before``, see ``Selection``.

    Attributes:
        memory_layers: whose keys and values it holds; ``search`` takes the place of one of them as ``layer``.
        heads_kv: Hkv.
        keys: (1, H, n, D), mean keys of the chunks that can be found, next to each other in n slots; None until they
            are read.
        lengths: (1, n + 1), real tokens of the chunk in each slot, and 0.
        storage: (1, n + 1, H, 2, S, D), a shape only; keys and values are read from the data files by ``_take``.

    Raises:
        StoreError: a document that was named is not there, or the store is closed.
        StoreDamaged: catalog or files are not what was written.
        ConfigError: a setting that breaks a rule.
    """

    def __init__(
        self,
        store: Any,
        namespace: str,
        *,
        device: torch.device | str = "cpu",
        index: str | Index = "exact",
        **selection: Any,
    ) -> None:
        self.selection = Selection(**selection)
        self.store, self._catalog = store, store.catalog
        self.namespace, self.rows = composed(namespace), 1
        self.device = torch.device(device)
        layout = self._catalog.layout
        self.chunk_size, self.heads_kv, self.head_dim = layout.chunk_size, layout.heads_kv, layout.head_dim
        self.fingerprint, self.memory_layers = layout.fingerprint, layout.memory_layers
        self._indexes = make_indexes(index, len(self.memory_layers))
        self._lock = threading.RLock()
        self.keys: Any = None
        self.lengths = self.storage = torch.zeros(0)
        self._slots = self._ids = np.zeros(0, dtype=np.int64)  # (n,) number of the chunk in each slot, and its id
        self._read()

    # what it holds

    @property
    def chunks(self) -> Tensor:
        """(1,) chunks that can be found, as of the last search."""
        return torch.tensor([len(self._held.alive())])

    @property
    def tokens(self) -> Tensor:
        """(1,) tokens that can be found, as of the last search."""
        held = self._held  # another thread may refresh the bank meanwhile
        return torch.tensor([int(held.lengths[held.alive()].sum())])

    @property
    def nbytes(self) -> int:
        """Bytes of the chunk keys, where they have been read."""
        with self._lock:
            return 0 if self.keys is None else int(self.keys.nbytes)

    def load(self) -> StoreBank:
        """Read now the chunk keys, which the first search would read."""
        with self._lock:
            if self.keys is None:
                self._load()
        return self

    def refresh(self) -> None:
        """Take up the documents that the selection has now. Chunks are numbered anew.

        Chunk keys are read only from the first change on. Microseconds where the store is what it was.
        """
        with self._lock:
            if self._catalog.version() == self._read_at:
                return
            self._read()
            if self.keys is not None:
                self._load()

    # reading

    @torch.no_grad()
    def search(
        self, queries: Tensor, num_chunks: int, rows: Tensor | None = None, *, layer: int = 0
    ) -> RetrievedMemory:
        """The best chunks for every query, per head, by inner product with the mean key.

        Args:
            queries: (B, H, T, D), position-free and unscaled; H a multiple of Hkv.
            num_chunks: R.
            rows: (B,) zeros; as of other banks.
            layer: whose keys are searched, by its place in ``memory_layers``.

        Raises:
            MemoryBankError: queries or rows that do not fit the bank.
            StoreError: the store was closed.
        """
        lines = rows_of([0] * len(queries) if rows is None else rows, len(queries), 1, "queries")
        with self._lock:
            self._notice()
            if self.keys is None:
                self._load()
            live = [len(self._slots)] * len(lines)
            return self._retrieved(search_chunks(self._indexes, queries, num_chunks, self, lines, live, layer=layer))

    def _retrieved(self, found: RetrievedMemory) -> RetrievedMemory:
        """Each pair of a chunk and a head once, as storage (1, M + 1, 1, 2, S, D) with the null chunk last.

        A head reads only its own part of a chunk: storing heads apart takes Hkv times fewer bytes from disk.
        """
        mask, heads_in_all = found.chunk_mask, self.storage.shape[2]
        pairs, places = torch.unique(found.lines[mask], return_inverse=True)
        slots, heads = (each.cpu().numpy() for each in (pairs // heads_in_all, pairs % heads_in_all))
        chunks, device = self._slots[slots], mask.device
        return replace(
            found,
            chunk_ids=torch.full_like(found.chunk_ids, len(pairs)).masked_scatter_(mask, places),
            storage=self._take(slots, heads)[None, :, None],
            lengths=torch.from_numpy(np.append(self._held.lengths[chunks], 0)).to(device)[None],
            sources=torch.from_numpy(np.append(chunks, -1)).to(device)[None],
            periods=torch.from_numpy(np.append(self._held.periods(chunks), -1)).to(device)[None],
            memory_rows=found.rows,
            first_head=0,
            layer_heads=None,
        )

    def _take(self, slots: Numbers, heads: Numbers) -> Tensor:
        """Keys and values (M + 1, 2, S, D) on the device, of slots (M,) and heads (M,); the last is zero."""
        kv = self._held.stored.numbers(self._held.records[self._slots[slots]], heads)
        # page-locked, so that a GPU fetches it while the host goes on
        taken = torch.zeros(len(kv) + 1, *kv.shape[1:], dtype=kv.dtype, pin_memory=self.device.type == "cuda")
        taken[:-1] = kv
        return taken.to(self.device, non_blocking=True)

    # where something is from

    def provenance(self, row: int, chunk: int) -> ChunkOrigin:
        """Where a chunk came from; chunks are numbered as in ``RetrievedMemory.chunks``."""
        with self._lock:
            if not 0 <= chunk < len(self._held):
                raise MemoryBankError(f"chunk ({chunk}) is not there; the bank has {len(self._held)}, counted from 0")
            return self._held.origin(chunk)

    def passage(self, origin: ChunkOrigin, around: int = 12) -> Passage:
        """The text of a chunk, with ``around`` tokens on either side, inside of its document.

        Raises:
            StoreError: its document was forgotten, replaced or has expired, or is no document of this store.
        """
        with self._catalog.read():
            document = None if origin.namespace is None else self._catalog.find(origin.namespace, origin.document or "")
            if document is None or document.id != origin.document_id:
                raise StoreError(
                    f"document {origin.document!r} of namespace {origin.namespace!r} is not there any more; "
                    "what was read from it cannot be shown"
                )
            first, last = origin.start_token, origin.start_token + origin.length
            runs = ((first - around, first), (first, last), (last, last + around))
            return Passage(*(self._catalog.whole(document, *run).spelled(self.store.tokenizer) for run in runs))

    @torch.no_grad()
    def search_text(self, query: str, *, top: int = 10, around: int = 12) -> list[SearchHit]:
        """Which chunks the model's heads find for a text, the largest share of their output first.

        Args:
            query: read segment by segment where it is longer than one.

        Raises:
            StoreError: the store was opened without a model or a tokenizer, or the text is empty.
        """
        encoder = self.store.encoder
        model = encoder.needed()
        ids = torch.from_numpy(encoder.tokens(NewDocument("the query", query)).ids.astype(np.int64)).to(model.device)
        shares, best = defaultdict[int, float](float), dict[int, Any]()
        training = model.training
        model.train(False)
        try:
            for segment in ids.split(encoder.layout.segment_tokens):
                out = model(segment[None], memory=self, explain=True, logits_to_keep=1, use_cache=False)
                for reading in out.explanation.over():
                    shares[reading.chunk] += len(segment) / len(ids) * reading.share
                    best[reading.chunk] = max(reading, best.get(reading.chunk, reading), key=lambda each: each.score)
        finally:
            model.train(training)
        chosen = [(best[chunk], shares[chunk]) for chunk in sorted(shares, key=lambda chunk: -shares[chunk])[:top]]
        return [SearchHit(each.origin, self.passage(each.origin, around), share, each.score) for each, share in chosen]

    def session(self, *, capacity_tokens: int = 65536, rows: int = 1) -> SessionMemory:
        """A memory over this one that takes what a running conversation adds, to be committed or dropped.

        Args:
            capacity_tokens: what each row of the session holds at most; the newest stay. ``commit`` writes all of it.
            rows: conversations over the same documents.

        Raises:
            ConfigError: a capacity that is no multiple of the chunk size.
        """
        sizes = (capacity_tokens, self.heads_kv, self.head_dim, self.chunk_size)
        about = {"device": self.device, "fingerprint": self.fingerprint, "memory_layers": self.memory_layers}
        return SessionMemory(self, MemoryBank(rows, *sizes, **about))

    # keeping up with the store

    def _read(self) -> None:
        # the version before the chunks, so that no change between is missed
        seen = self._catalog.version()
        self._held: Held = until_found(lambda: read_held(self._catalog, self.namespace, self.selection))
        self._read_at = self._seen = seen

    def _notice(self) -> None:
        """Let go of what was forgotten or has expired since the last search; microseconds where nothing happened."""
        seen = self._catalog.version()
        if seen == self._seen and clock.time() < self._held.expires:
            return
        self._held = until_found(lambda: self._held.now(self._catalog, self.namespace))
        self._seen = seen
        if self.keys is not None:
            self._load()

    def _load(self) -> None:
        """Read the mean keys of the chunks that can be found; those before the first change are not read again."""
        held, stored = self._held, self._held.stored
        # where this fails, the next search loads anew: what was loaded has what is forgotten
        before, self.keys = self.keys, None
        had = self._ids[:0] if before is None else self._ids
        self._slots = held.alive()
        self._ids = held.ids[self._slots]
        shared, count = min(len(had), len(self._ids)), len(self._ids)
        self.storage = torch.zeros(()).expand(1, count + 1, *stored.kv.shape[1:])
        self.lengths = torch.from_numpy(np.append(held.lengths[self._slots], 0)).to(self.device)[None]
        # leading slots that are what they were
        same = int(np.append(had[:shared] != self._ids[:shared], True).argmax())
        if before is not None and same == len(had) == count:
            self.keys = before
            return
        keys = torch.empty(1, stored.keys.shape[1], count, stored.keys.shape[2], device=self.device)
        if before is not None:
            keys[:, :, :same] = before[:, :, :same]
        read_into(keys[0].transpose(0, 1)[same:], stored.keys, held.records[self._slots][same:])
        if same < len(had) or before is None:
            for index in self._indexes:
                index.cleared(0)
            same = 0
        slots = torch.arange(same, count, device=self.device)
        for index in self._indexes:
            index.written(0, slots)
        self.keys = keys


# what a bank holds

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

    def periods(self, chunks: Numbers) -> Numbers:
        """When chunks were said, see ``longmem.types.period``."""
        at = np.searchsorted(self.begins, chunks, side="right") - 1
        said: Numbers = period(at, (chunks - self.begins[at]) * self.size)
        return said

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
        moment = clock.time()
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


def read_into(target: Tensor, stored: NDArray[Any], records: Numbers) -> None:
    """Fill ``target`` with records of an array of the data files, in their order."""
    for begin in range(0, len(records), AT_ONCE):
        target[begin : begin + AT_ONCE] = torch.from_numpy(stored[records[begin : begin + AT_ONCE]])
