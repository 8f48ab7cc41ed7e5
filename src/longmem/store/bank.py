"""``StoreBank``: the documents of a store as a memory that a model searches.

B batch rows · T tokens · H query heads · Hkv key/value heads · D head_dim · S tokens per chunk · R retrieved chunks
"""

from __future__ import annotations

import copy
import math
import threading
import time as clock
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from longmem.errors import ConfigError, MemoryBankError, StoreError
from longmem.memory.index import Index, make_index
from longmem.store.chunk_keys import RowKeys
from longmem.store.found import Hits, gathered
from longmem.store.passages import Passage, SearchHit, read_passage, search_text
from longmem.store.places import Numbers, Places, ReadsStore, read_places, until_found
from longmem.store.reading import Selection
from longmem.store.schema import FileRow, TotalRow
from longmem.store.snapshot import Snapshot
from longmem.store.values import HeldValues, Keep, MappedValues, Values
from longmem.types import ChunkOrigin, RetrievedMemory

if TYPE_CHECKING:
    from longmem.store.overlay import SessionBank


class StoreBank:
    """Documents of one or several namespaces, read-only, one row for each namespace.

    Opening reads the catalog alone. Chunk keys are read at the first search (or by ``load``); keys and values stay in
    the memory map unless ``keep`` says otherwise, and of them only the heads and chunks that were found are read.

    A bank holds the documents of the moment when it was opened. What is added, appended or replaced later it finds
    after ``refresh``; what is forgotten, replaced or expired, by whatever process, it misses from the next search on.
    Chunk numbers stay what they are until ``refresh``. Threads may share a bank: their searches wait for each other.

    Args:
        store: an open ``MemoryStore``; closing it closes the bank.
        namespaces: of the rows.
        documents: names; None is all.
        where: metadata that the documents have, every key with an equal value.
        after: only documents of this time (seconds since the epoch) or later.
        before: only documents from before this time.
        max_tokens: only the newest tokens of every row, in whole chunks.
        device: where to search.
        keep: where keys and values are: ``map`` on disk, in the memory map; ``memory`` of the host; ``device``.
        index: how keys are searched: a name (see ``memory.INDEXES``) or an index that was never used.
        key_dtype: of the chunk keys on the device.

    Raises:
        StoreError: a document that was named is not there, or the store is closed.
        StoreDamaged: catalog or files are not what was written.
        ConfigError: a setting that breaks a rule.
    """

    _places: Places
    _seen: object
    _expires: float
    _states: list[TotalRow | None]

    def __init__(
        self,
        store: ReadsStore,
        namespaces: Sequence[str],
        *,
        documents: Sequence[str] | None = None,
        where: Mapping[str, Any] | None = None,
        after: float | None = None,
        before: float | None = None,
        max_tokens: int | None = None,
        device: torch.device | str = "cpu",
        keep: Keep = "map",
        index: str | Index = "exact",
        key_dtype: torch.dtype = torch.float32,
    ) -> None:
        _check(namespaces, documents, max_tokens, keep)
        self.store = store
        self.namespaces = list(namespaces)
        self.rows = len(self.namespaces)
        self.selection = Selection(documents, where, after, before, max_tokens)
        self.device = torch.device(device)
        self.keep = keep
        self.key_dtype = key_dtype
        layout = store.layout
        self.chunk_size, self.heads_kv, self.head_dim = layout.chunk_size, layout.heads_kv, layout.head_dim
        self.fingerprint, self.memory_layer = layout.fingerprint, layout.memory_layer
        self._indexes = [make_index(copy.deepcopy(index) if self.rows > 1 else index) for _ in self.namespaces]
        self._lock = threading.RLock()
        self._version = 0
        self._keys: list[RowKeys] | None = None
        self._values: Values | None = None
        self._read()

    # what it holds

    @property
    def version(self) -> int:
        """How often the bank came to hold something else: by ``refresh``, or because something was forgotten."""
        return self._version

    @property
    def chunks(self) -> Tensor:
        """(rows,) chunks that each row can find, as of the last search."""
        left = self._places.left
        return torch.tensor([int(left[self._places.row == row].sum()) for row in range(self.rows)])

    @property
    def tokens(self) -> Tensor:
        """(rows,) tokens that each row can find, as of the last search."""
        places = self._places
        whole = places.left == np.diff(places.begins)
        left = np.where(whole, places.tokens, places.left * self.chunk_size)
        return torch.tensor([int(left[places.row == row].sum()) for row in range(self.rows)])

    @property
    def nbytes(self) -> int:
        """Bytes held in memory and on the device; what lies in the map does not count."""
        with self._lock:
            keys = sum(each.nbytes for each in self._keys or [])
            return keys + (0 if self._values is None else self._values.nbytes)

    @property
    def loaded(self) -> bool:
        """Whether the chunk keys have been read."""
        return self._keys is not None

    def load(self) -> StoreBank:
        """Read now what the first search would read: chunk keys, and keys and values that are not left in the map."""
        with self._lock:
            if self._keys is None:
                self._keys, self._values = self._loaded()
        return self

    def refresh(self) -> bool:
        """Take up the documents that the selection has now; whether anything is another than before.

        Only what is new is read. Chunks are numbered anew.
        """
        with self._lock:
            before, keys, values = self._places, self._keys, self._values
            self._read()
            if _same(before, self._places):  # but they may lie elsewhere now
                self._keys = keys
                self._values = MappedValues(self._places, self.device) if isinstance(values, MappedValues) else values
                return False
            self._version += 1
            if keys is not None:
                self._keys, self._values = self._loaded(before, keys, values)
            return True

    # reading

    @torch.no_grad()
    def search(self, queries: Tensor, num_chunks: int, rows: Tensor | None = None) -> RetrievedMemory:
        """The best chunks for every query, per head, by inner product with the mean key.

        Args:
            queries: (B, H, T, D), position-free and unscaled; H a multiple of Hkv.
            num_chunks: R.
            rows: (B,) the bank row each batch row reads; by default its own, or the only one there is.

        Raises:
            MemoryBankError: queries or rows that do not fit the bank.
            StoreError: the store was closed.
            StoreDamaged: a file is not what was written; nothing wrong is ever returned.
        """
        read = self._rows_of(rows, queries, num_chunks)
        with self._lock:
            self._notice()
            self.load()
            assert self._keys is not None and self._values is not None
            with torch.autocast(queries.device.type, enabled=False):
                scores, numbers, mask = self._best(queries.detach(), num_chunks, read, self._keys)
            return gathered(self._places, self._values, Hits(scores, numbers, mask, read), lambda: self._version)

    def provenance(self, row: int, chunk: int) -> ChunkOrigin:
        """Where a chunk of a row came from; chunks are numbered as in ``RetrievedMemory.chunks``."""
        with self._lock:
            if not 0 <= row < self.rows:
                raise MemoryBankError(f"row ({row}) must lie in 0..{self.rows - 1}, the rows of this bank")
            count = int(self._places.bases[row + 1] - self._places.bases[row])
            if not 0 <= chunk < count:
                raise MemoryBankError(f"chunk ({chunk}) of row {row} is not there; it has {count}, counted from 0")
            return self._places.origin(row, chunk)

    def passage(self, origin: ChunkOrigin, around: int = 12) -> Passage:
        """The text of a chunk, with ``around`` tokens on either side.

        Raises:
            StoreError: its document was forgotten, replaced or has expired, or is no document of this store.
        """
        return read_passage(self.store, origin, around)

    def passage_in(self, row: int, origin: ChunkOrigin, around: int) -> Passage:
        """See ``passage``; documents are found without knowing the row."""
        return self.passage(origin, around)

    def search_text(self, query: str, *, top: int = 10, row: int = 0, around: int = 12) -> list[SearchHit]:
        """Which chunks of a row the model's heads find for a text, the largest share of their output first.

        Raises:
            StoreError: the store was opened without a model or a tokenizer, or the text is empty.
        """
        return search_text(self, query, top=top, row=row, around=around)

    def session(self, *, capacity_tokens: int = 65536, rows: int | None = None) -> SessionBank:
        """A memory over this one that takes what a running conversation adds, to be committed or dropped."""
        from longmem.store.overlay import SessionBank

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

    def _read(self) -> None:
        """Look up the selection's chunks."""
        with self.store.snapshot() as snapshot:  # before the places, so that no change between is missed
            states = self._states_in(snapshot)
        self._places, self._seen = read_places(self.store, self.namespaces, self.selection)
        self._expires = self._places.expires(-math.inf)
        self._states = states
        self._keys = self._values = None

    def _notice(self) -> None:
        """Let go of what was forgotten or has expired since the last search; microseconds where nothing happened."""
        now = clock.time()
        version = self.store.version()
        if version == self._seen and now < self._expires:
            return
        places = until_found(lambda: self._changed(now))
        if places is not None:
            before, self._places = self._places, places
            self._expires = places.expires(now)
            if isinstance(self._values, MappedValues):
                self._values = MappedValues(places, self.device)
            gone = np.flatnonzero(before.left != places.left)
            if len(gone):
                self._forget(gone)
        self._seen = version

    def _changed(self, now: float) -> Places | None:
        """The places as they are now; None where nothing of this bank has changed."""
        with self.store.snapshot() as snapshot:
            states = self._states_in(snapshot)
            here = [file.row.id for file in self._places.files]
            marks = ", ".join("?" * len(here))
            moved = len(snapshot.rows(FileRow, f"WHERE id IN ({marks})", here)) < len(here)
            if states == self._states and now < self._expires and not moved:
                return None
            places = self._places.without_the_gone(snapshot, now)
            if moved:
                places = places.moved(snapshot, self.store)
            self._states = states
            return places

    def _states_in(self, snapshot: Snapshot) -> list[TotalRow | None]:
        """Another one for every namespace whose documents have changed."""
        return [snapshot.total(f"documents:{name}") for name in self.namespaces]

    def _forget(self, runs: Numbers) -> None:
        """Overwrite the keys and values of what these runs have no more."""
        self._version += 1
        places = self._places
        if self._keys is not None:
            for row in np.unique(places.row[runs]).tolist():
                self._keys[row].forget(places, row)
        if isinstance(self._values, HeldValues):
            for run in runs.tolist():
                self._values.wipe(int(places.begins[run] + places.left[run]), int(places.begins[run + 1]))

    def _loaded(
        self, before: Places | None = None, keys: list[RowKeys] | None = None, values: Values | None = None
    ) -> tuple[list[RowKeys], Values]:
        """Keys and values of the places; ``before`` is what the given ones are of."""
        places = self._places
        new_keys = []
        for row, index in enumerate(self._indexes):
            had = None if before is None or keys is None else (before, keys[row])
            new_keys.append(RowKeys(places, row, index, self.device, self.key_dtype, had))
        if self.keep == "map":
            return new_keys, MappedValues(places, self.device)
        held = self.device if self.keep == "device" else torch.device("cpu")
        old = (before, values) if before is not None and isinstance(values, HeldValues) else None
        return new_keys, HeldValues(places, held, self.device, old)

    # searching

    def _best(self, queries: Tensor, num: int, read: list[int], keys: list[RowKeys]) -> tuple[Tensor, Tensor, Tensor]:
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
            scores[lines], numbers[lines], mask[lines] = keys[row].search(asked, num)
        wanted = (batch, heads, length, num)
        return scores.view(wanted), numbers.view(wanted), mask.view(wanted)

    # small helpers

    def _rows_of(self, rows: Tensor | None, queries: Tensor, num_chunks: int) -> list[int]:
        """Bank rows as plain numbers, of queries that fit."""
        if queries.dim() != 4 or queries.shape[3] != self.head_dim or queries.shape[1] % self.heads_kv:
            raise MemoryBankError(
                f"queries {tuple(queries.shape)} must be (B, H, T, {self.head_dim}), H a multiple of the bank's "
                f"{self.heads_kv} key/value heads"
            )
        if num_chunks < 1:
            raise MemoryBankError(f"num_chunks ({num_chunks}) must be at least 1")
        if queries.device.type != self.device.type:
            raise MemoryBankError(f"queries are on {queries.device}, the bank on {self.device}; open it with device=")
        batch = queries.shape[0]
        if rows is None:
            if self.rows not in (1, batch):
                raise MemoryBankError(f"queries have {batch} rows, the bank {self.rows}; pass rows= to say which")
            return [0] * batch if self.rows == 1 else list(range(batch))
        chosen = [int(row) for row in rows.tolist()]
        if len(chosen) != batch:
            raise MemoryBankError(f"rows ({len(chosen)} entries) must have one per row of the queries ({batch})")
        outside = [row for row in chosen if not 0 <= row < self.rows]
        if outside:
            raise MemoryBankError(f"rows ({outside[0]}) must lie in 0..{self.rows - 1}, the rows of this bank")
        return chosen


def _same(one: Places, other: Places) -> bool:
    """Whether two readings found the same chunks, all of them alive."""
    names = ("bases", "begins", "tokens", "first_token", "content", "skipped", "left")
    return [each.id for each in one.documents] == [each.id for each in other.documents] and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in names
    )


def _check(namespaces: Sequence[str], documents: object, max_tokens: int | None, keep: str) -> None:
    problems = []
    if not namespaces or isinstance(namespaces, str):
        problems.append(f"namespaces ({namespaces!r}) must be a list with at least one name")
    if isinstance(documents, str):
        problems.append(f"documents ({documents!r}) must be a list of names; write [{documents!r}]")
    if max_tokens is not None and max_tokens < 1:
        problems.append(f"max_tokens ({max_tokens}) must be at least 1")
    if keep not in ("map", "memory", "device"):
        problems.append(f"keep ({keep!r}) must be one of map, memory, device")
    if problems:
        raise ConfigError(problems)
