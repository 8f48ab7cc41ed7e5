"""``StoreBank``: the documents of a store as a memory that a model searches.

B batch rows · T tokens · H query heads · Hkv key/value heads of a layer · D head_dim · S tokens per chunk ·
R retrieved chunks · N chunks of all rows · P pairs of a chunk and a key/value head
"""

from __future__ import annotations

import copy
import threading
import time as clock
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

from longmem.errors import ConfigError, MemoryBankError, StoreError
from longmem.memory.index import Index, make_index, refuse_queries, rows_of
from longmem.store.overlay import SessionBank
from longmem.store.passages import Passage, SearchHit, read_passage, search_text
from longmem.store.room import Room, composed, until_found
from longmem.store.runs import Held, RowKeys, Runs, Selection, read_runs, take_mapped
from longmem.types import ChunkOrigin, RetrievedMemory

Keep = Literal["map", "memory", "device"]


class StoreBank:
    """Documents of one or several namespaces, read-only, one row for each namespace.

    Opening reads the catalog alone. Chunk keys are read at the first search (or by ``load``); keys and values stay in
    the memory map unless ``keep`` says otherwise, and of them only the heads and chunks that were found are read.

    A bank holds the documents of the moment when it was opened. What is added, appended or replaced later it finds
    after ``refresh``; what is forgotten, replaced or expired, by any process, it misses from the next search on.
    Chunk numbers stay what they are until ``refresh``. Threads may share a bank: their searches wait for each other.

    Args:
        store: an open ``MemoryStore``; closing it closes the bank.
        namespaces: of the rows.
        device: where to search.
        keep: where keys and values are: ``map`` on disk, in the memory map; ``memory`` of the host; ``device``.
        index: how keys are searched: a name (see ``memory.INDEXES``) or an index that was never used.
        key_dtype: of the chunk keys on the device.
        **selection: ``documents``, ``where``, ``after``, ``before``, ``max_tokens``, see ``Selection``.

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
        namespaces: Sequence[str],
        *,
        device: torch.device | str = "cpu",
        keep: Keep = "map",
        index: str | Index = "exact",
        key_dtype: torch.dtype = torch.float32,
        **selection: Any,
    ) -> None:
        self.selection = Selection(**selection)
        _check(namespaces, self.selection, keep)
        self.store = store
        self._room: Room = store.room
        self.namespaces = [composed(name) for name in namespaces]
        self.rows = len(self.namespaces)
        self.device = torch.device(device)
        self.keep = keep
        self.key_dtype = key_dtype
        layout = self._room.layout
        self.chunk_size, self.heads_kv, self.head_dim = layout.chunk_size, layout.heads_kv, layout.head_dim
        self.fingerprint, self.memory_layers, self.layers = layout.fingerprint, layout.memory_layers, layout.layers
        alone = self.rows * self.layers == 1
        self._indexes = [
            [make_index(index if alone else copy.deepcopy(index)) for _ in range(self.layers)] for _ in self.namespaces
        ]
        self._lock = threading.RLock()
        self._version = 0
        self._keys: list[RowKeys] | None = None
        self._held: Held | None = None
        self._runs, self._seen, self._expires = self._read()

    # what it holds

    @property
    def version(self) -> int:
        """How often the bank came to hold something else: by ``refresh``, or because something was forgotten."""
        return self._version

    @property
    def chunks(self) -> Tensor:
        """(rows,) chunks that each row can find, as of the last search."""
        runs = self._runs
        return torch.tensor([int(runs.left[runs.row == row].sum()) for row in range(self.rows)])

    @property
    def tokens(self) -> Tensor:
        """(rows,) tokens that each row can find, as of the last search."""
        runs = self._runs
        left = np.where(runs.left == runs.counts, runs.tokens, runs.left * self.chunk_size)
        return torch.tensor([int(left[runs.row == row].sum()) for row in range(self.rows)])

    @property
    def nbytes(self) -> int:
        """Bytes held in memory and on the device; what is in the map does not count."""
        with self._lock:
            return sum(each.nbytes for each in self._keys or []) + (0 if self._held is None else self._held.nbytes)

    @property
    def loaded(self) -> bool:
        """Whether the chunk keys have been read."""
        return self._keys is not None

    def load(self) -> StoreBank:
        """Read now what the first search would read: chunk keys, and keys and values that are not left in the map."""
        with self._lock:
            if self._keys is None:
                self._load(None)
        return self

    def refresh(self) -> bool:
        """Take up the documents that the selection has now; whether anything is another than before.

        Only what is new is read. Chunks are numbered anew.
        """
        with self._lock:
            before = self._runs
            self._runs, self._seen, self._expires = self._read()
            if self._runs.same(before):
                return False
            self._version += 1
            if self._keys is not None:
                self._load(before)
            return True

    # reading

    @torch.no_grad()
    def search(
        self, queries: Tensor, num_chunks: int, rows: Tensor | None = None, *, layer: int = 0
    ) -> RetrievedMemory:
        """The best chunks for every query, per head, by inner product with the mean key.

        Args:
            queries: (B, H, T, D), position-free and unscaled; H a multiple of Hkv.
            num_chunks: R.
            rows: (B,) the bank row each batch row reads; by default its own, or the only one there is.
            layer: whose keys are searched, by its place in ``memory_layers``.

        Raises:
            MemoryBankError: queries or rows that do not fit the bank.
            StoreError: the store was closed.
        """
        read = self._rows_of(rows, queries, num_chunks, layer)
        with self._lock:
            self._notice()
            self.load()
            assert self._keys is not None
            with torch.autocast(queries.device.type, enabled=False):
                scores, numbers, mask = self._best(queries.detach(), num_chunks, read, layer, self._keys)
            bases = torch.from_numpy(self._runs.bases[read]).to(numbers.device)
            chunks = numbers + bases.view(-1, 1, 1, 1)
            if self._held is not None and self._held.ready:
                return self._by_reference(self._held, scores, chunks, mask, read, layer)
            return self._copied(scores, chunks, mask, read, layer)

    def provenance(self, row: int, chunk: int) -> ChunkOrigin:
        """Where a chunk of a row came from; chunks are numbered as in ``RetrievedMemory.chunks``."""
        with self._lock:
            if not 0 <= row < self.rows:
                raise MemoryBankError(f"row ({row}) must lie in 0..{self.rows - 1}, the rows of this bank")
            count = int(np.diff(self._runs.bases)[row])
            if not 0 <= chunk < count:
                raise MemoryBankError(f"chunk ({chunk}) of row {row} is not there; it has {count}, counted from 0")
            return self._runs.origin(row, chunk)

    def passage(self, origin: ChunkOrigin, around: int = 12, *, row: int = 0) -> Passage:
        """The text of a chunk, with ``around`` tokens on either side; documents are found without knowing the row.

        Raises:
            StoreError: its document was forgotten, replaced or has expired, or is no document of this store.
        """
        return read_passage(self._room, origin, around)

    def search_text(self, query: str, *, top: int = 10, row: int = 0, around: int = 12) -> list[SearchHit]:
        """Which chunks of a row the model's heads find for a text, the largest share of their output first.

        Raises:
            StoreError: the store was opened without a model or a tokenizer, or the text is empty.
        """
        return search_text(self, query, self._room, top=top, row=row, around=around)

    def session(self, *, capacity_tokens: int = 65536, rows: int | None = None) -> SessionBank:
        """A memory over this one that takes what a running conversation adds, to be committed or dropped."""
        return SessionBank(self, capacity_tokens=capacity_tokens, rows=rows)

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

    def _read(self) -> tuple[Runs, object, float]:
        """The selection's chunks, the store's version that they are of, and when the first of them expires."""
        seen = self._room.catalog.version()  # before the runs, so that no change between is missed
        runs: Runs = until_found(lambda: read_runs(self._room, self.namespaces, self.selection))
        return runs, seen, runs.expires()

    def _notice(self) -> None:
        """Let go of what was forgotten or has expired since the last search; microseconds where nothing happened."""
        seen = self._room.catalog.version()
        if seen == self._seen and clock.time() < self._expires:
            return
        before, self._runs = self._runs, until_found(lambda: self._runs.now(self._room))
        gone = np.flatnonzero(before.left != self._runs.left)
        if len(gone):
            self._version += 1
            for row, keys in enumerate(self._keys or []):
                keys.forget(self._runs, row)
            for run in gone.tolist() if self._held is not None else []:
                assert self._held is not None
                begin, end = self._runs.begins[run : run + 2].tolist()
                self._held.wipe(begin + int(self._runs.left[run]), end)
        self._expires, self._seen = self._runs.expires(), seen

    def _load(self, before: Runs | None) -> None:
        """Read keys, and values if they are to be held; ``before``: what those that are loaded are of."""
        runs = self._runs
        had: Sequence[Any] = [None] * self.rows if before is None else [(before, each) for each in self._keys or []]
        self._keys = [
            RowKeys(runs, row, indexes, self.device, self.key_dtype, had[row])
            for row, indexes in enumerate(self._indexes)
        ]
        if self.keep != "map":
            where = self.device if self.keep == "device" else torch.device("cpu")
            old = None if before is None or self._held is None else (before, self._held)
            self._held = Held(runs, where, self.device, old)

    # what was found

    def _best(
        self, queries: Tensor, num: int, read: list[int], layer: int, keys: list[RowKeys]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, numbers in the row, and where there is any: (B, H, T, R) each."""
        batch, heads, length, _ = queries.shape
        grouped = queries.reshape(batch, self.heads_kv, -1, self.head_dim)
        shape = (*grouped.shape[:3], num)
        scores = torch.empty(shape, dtype=torch.float32, device=queries.device)
        numbers = torch.empty(shape, dtype=torch.long, device=queries.device)
        mask = torch.empty(shape, dtype=torch.bool, device=queries.device)
        for row in sorted(set(read)):
            lines = [line for line, wanted in enumerate(read) if wanted == row]
            asked = grouped if len(lines) == batch else grouped[lines]
            scores[lines], numbers[lines], mask[lines] = keys[row].search(asked, num, layer)
        wanted = (batch, heads, length, num)
        return scores.view(wanted), numbers.view(wanted), mask.view(wanted)

    def _by_reference(
        self, held: Held, scores: Tensor, chunks: Tensor, mask: Tensor, read: list[int], layer: int
    ) -> RetrievedMemory:
        """All chunks as storage: everything is on the device."""
        device = chunks.device
        return RetrievedMemory(
            chunk_ids=chunks.masked_fill(~mask, held.kv.shape[0] - 1),
            chunk_mask=mask,
            scores=scores,
            storage=held.kv[None],
            lengths=held.lengths[None],
            rows=torch.zeros(len(read), dtype=torch.long, device=device),
            version=self._version,
            live_version=lambda: self._version,
            sources=held.sources[None],
            memory_rows=torch.tensor(read, device=device),
            first_head=layer * self.heads_kv,
            layer_heads=self.heads_kv if self.layers > 1 else None,
        )

    def _copied(self, scores: Tensor, chunks: Tensor, mask: Tensor, read: list[int], layer: int) -> RetrievedMemory:
        """Each pair of a chunk and a head once, as storage (1, P + 1, 1, 2, S, D) with the null chunk last.

        A head reads only its own part of a chunk: storing heads apart takes Hkv times fewer bytes from disk.
        """
        runs, device, version = self._runs, chunks.device, self._version
        head = torch.arange(chunks.shape[1], device=device) // (chunks.shape[1] // self.heads_kv)
        asked = (chunks * self.heads_kv + head.view(1, -1, 1, 1))[mask]
        pairs, slots = torch.unique(asked, return_inverse=True)
        found, heads = (each.cpu().numpy() for each in (pairs // self.heads_kv, pairs % self.heads_kv))
        heads = heads + layer * self.heads_kv
        held = self._held
        storage = take_mapped(runs, found, heads, self.device) if held is None else held.take(found, heads)
        return RetrievedMemory(
            chunk_ids=torch.full_like(chunks, len(found)).masked_scatter_(mask, slots),
            chunk_mask=mask,
            scores=scores,
            storage=storage[None, :, None],
            lengths=torch.from_numpy(np.append(runs.lengths(found), 0)).to(device)[None],
            rows=torch.zeros(len(read), dtype=torch.long, device=device),
            version=version,
            live_version=lambda: version,  # a copy: it stays what it is
            sources=torch.from_numpy(np.append(runs.in_rows(found), -1)).to(device)[None],
            memory_rows=torch.tensor(read, device=device),
        )

    def _rows_of(self, rows: Tensor | None, queries: Tensor, num_chunks: int, layer: int) -> list[int]:
        """Bank rows as plain numbers, of queries that fit."""
        sizes = {"layers": self.layers, "heads_kv": self.heads_kv, "head_dim": self.head_dim, "device": self.device}
        refuse_queries(queries, num_chunks, layer, **sizes)
        if rows is None and self.rows == 1:
            return [0] * queries.shape[0]
        return rows_of(rows, queries.shape[0], self.rows, "queries")


def _check(namespaces: Sequence[str], selection: Selection, keep: str) -> None:
    problems, documents, tokens = [], selection.documents, selection.max_tokens
    if not namespaces or isinstance(namespaces, str):
        problems.append(f"namespaces ({namespaces!r}) must be a list with at least one name")
    if isinstance(documents, str):
        problems.append(f"documents ({documents!r}) must be a list of names; write [{documents!r}]")
    if tokens is not None and tokens < 1:
        problems.append(f"max_tokens ({tokens}) must be at least 1")
    if keep not in ("map", "memory", "device"):
        problems.append(f"keep ({keep!r}) must be one of map, memory, device")
    if problems:
        raise ConfigError(problems)
