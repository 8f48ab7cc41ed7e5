"""``StoreBank``: the documents of a store as a memory that a model searches.

B batch rows · T tokens · H query heads · Hkv key/value heads of a layer · D head_dim · S tokens per chunk ·
R retrieved chunks · M pairs of a chunk and a key/value head
"""

from __future__ import annotations

import threading
import time as clock
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from longmem.errors import ConfigError, MemoryBankError, StoreError
from longmem.memory.bank import MemoryBank
from longmem.memory.index import Index, make_indexes, rows_of, search_chunks
from longmem.memory.session import SessionMemory
from longmem.store.catalog import Selection, composed
from longmem.store.disk import until_found
from longmem.store.encode import NewDocument
from longmem.store.held import Held, Loaded, read_held
from longmem.types import ChunkOrigin, RetrievedMemory


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
        _check(namespace, self.selection)
        self.store, self._catalog = store, store.catalog
        self.namespace, self.rows = composed(namespace), 1
        self.device = torch.device(device)
        layout = self._catalog.layout
        self.chunk_size, self.heads_kv, self.head_dim = layout.chunk_size, layout.heads_kv, layout.head_dim
        self.fingerprint, self.memory_layers = layout.fingerprint, layout.memory_layers
        self.layers = len(self.memory_layers)
        self._indexes = make_indexes(index, self.layers)
        self._lock = threading.RLock()
        self._loaded: Loaded | None = None
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
            return 0 if self._loaded is None else self._loaded.keys.nbytes

    def load(self) -> StoreBank:
        """Read now the chunk keys, which the first search would read."""
        with self._lock:
            if self._loaded is None:
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
            if self._loaded is not None:
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
            loaded = self._load() if self._loaded is None else self._loaded
            found = search_chunks(
                self._indexes[layer if 0 <= layer < self.layers else 0],
                queries,
                num_chunks,
                loaded,
                lines,
                [len(loaded.chunks)] * len(lines),
                layer=layer,
                heads_kv=self.heads_kv,
            )
            return self._retrieved(found, loaded)

    def _retrieved(self, found: RetrievedMemory, loaded: Loaded) -> RetrievedMemory:
        """Each pair of a chunk and a head once, as storage (1, M + 1, 1, 2, S, D) with the null chunk last.

        A head reads only its own part of a chunk: storing heads apart takes Hkv times fewer bytes from disk.
        """
        mask, heads_in_all = found.chunk_mask, loaded.storage.shape[2]
        pairs, places = torch.unique(found.lines[mask], return_inverse=True)
        slots, heads = (each.cpu().numpy() for each in (pairs // heads_in_all, pairs % heads_in_all))
        chunks, device = loaded.chunks[slots], mask.device
        return replace(
            found,
            chunk_ids=torch.full_like(found.chunk_ids, len(pairs)).masked_scatter_(mask, places),
            storage=loaded.take(slots, heads)[None, :, None],
            lengths=torch.from_numpy(np.append(loaded.held.lengths[chunks], 0)).to(device)[None],
            sources=torch.from_numpy(np.append(chunks, -1)).to(device)[None],
            memory_rows=found.rows,
            first_head=0,
            layer_heads=None,
        )

    # where something is from

    def provenance(self, row: int, chunk: int) -> ChunkOrigin:
        """Where a chunk came from; chunks are numbered as in ``RetrievedMemory.chunks``."""
        with self._lock:
            if row != 0:
                raise MemoryBankError(f"row ({row}) must be 0, the row of this bank")
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
            runs = ((max(0, first - around), first), (first, last), (last, last + around))
            return Passage(*(self._catalog.whole(document, *run).spelled(self.store.tokenizer) for run in runs))

    @torch.no_grad()
    def search_text(self, query: str, *, top: int = 10, around: int = 12) -> list[SearchHit]:
        """Which chunks the model's heads find for a text, the largest share of their output first.

        Args:
            query: read segment by segment where it is longer than one.

        Raises:
            StoreError: the store was opened without a model or a tokenizer, or the text is empty.
        """
        model, encoder = self.store.model, self.store.encoder
        if model is None:
            raise StoreError("searching for a text needs the model: MemoryStore.open(path, model=...)")
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

    def add(self, *_: object, **__: object) -> NoReturn:
        """A bank on a store is read-only.

        Raises:
            StoreError: always.
        """
        raise StoreError(
            "a bank on a store is read-only; add to bank.session(), whose commit(name) writes a document, "
            "or use store.add_document"
        )

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
        if self._loaded is not None:
            self._load()

    def _load(self) -> Loaded:
        # where this fails, the next search loads anew: what was loaded has what is forgotten
        before, self._loaded = self._loaded, None
        self._loaded = Loaded(self._held, self._indexes, self.device, before)
        return self._loaded


def _check(namespace: object, selection: Selection) -> None:
    problems, documents = [], selection.documents
    if not isinstance(namespace, str):
        problems.append(f"namespace ({namespace!r}) must be a name; for several, make a bank of each")
    if isinstance(documents, str):
        problems.append(f"documents ({documents!r}) must be a list of names; write [{documents!r}]")
    if problems:
        raise ConfigError(problems)
