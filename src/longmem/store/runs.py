"""Which chunks a bank has, where they are, and what of them is loaded: runs of records of the data files.

A chunk has two numbers: one in its row (what ``provenance`` takes), and one over all rows, the *global* one. Both stay
what they are until the bank is refreshed, also when chunks are forgotten.

P runs in all, or pairs of a chunk and a head · N chunks of all rows · n chunks of a row that can be found ·
H heads of all layers · Hkv heads of one layer · S tokens per chunk · D head_dim · Q queries per key/value head ·
R retrieved chunks
"""

from __future__ import annotations

import math
import time as clock
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longmem.errors import StoreError
from longmem.memory.index import Index
from longmem.store.catalog import matches
from longmem.store.disk import Arrays, Numbers
from longmem.store.records import DTYPES, DocumentInfo
from longmem.store.room import Room, composed
from longmem.types import ChunkOrigin

_QUERY = """
SELECT document.id, part.piece, part.first_token, part.tokens, piece.first
FROM document JOIN part ON part.document = document.id JOIN piece ON piece.id = part.piece
WHERE namespace = ? AND (expires IS NULL OR expires > ?) ORDER BY added, document.id, ordinal
"""


@dataclass(frozen=True)
class Selection:
    """Which documents of a namespace; all conditions hold together."""

    documents: Sequence[str] | None = None  # their names; None is all
    where: Mapping[str, Any] | None = None  # metadata that they have: every key with an equal value
    after: float | None = None  # added at this time (seconds since the epoch) or later
    before: float | None = None  # added before this time
    max_tokens: int | None = None  # only the newest so many tokens, in whole chunks

    def of(self, namespace: str, documents: list[DocumentInfo]) -> list[DocumentInfo]:
        """Those that are meant; ``max_tokens`` is not looked at.

        Raises:
            StoreError: a document that was named is not there.
        """
        found = documents
        if self.documents is not None:
            names = {composed(name) for name in self.documents}
            missing = sorted(names - {each.name for each in found})
            if missing:
                raise StoreError(
                    f"namespace {namespace!r} has no document {missing[0]!r}; `longmem memory list` shows its names"
                )
            found = [each for each in found if each.name in names]
        after = -math.inf if self.after is None else self.after
        before = math.inf if self.before is None else self.before
        return [each for each in found if after <= each.added < before and matches(each, self.where)]


@dataclass(frozen=True)
class Runs:
    """The chunks of all rows of a bank at one moment."""

    namespaces: list[str]  # of the rows
    documents: list[DocumentInfo]  # of all rows, one row after the other
    arrays: Arrays  # the data files
    bases: Numbers  # (rows + 1,) global number of each row's first chunk; the last is N, the number of all chunks
    begins: Numbers  # (P + 1,) global number of each run's first chunk, and N
    row: Numbers  # (P,) the bank row of the run
    document: Numbers  # (P,) index into ``documents``
    piece: Numbers  # (P,) the piece that the run is a part of
    skipped: Numbers  # (P,) chunks of the piece before the run's first
    first: Numbers  # (P,) record of the run's first chunk in the data files
    first_token: Numbers  # (P,) offset of the run's first token in its document
    tokens: Numbers  # (P,) real tokens of the run; only its last chunk may be short
    left: Numbers  # (P,) chunks of the run that can still be found, its first ones

    @property
    def num_chunks(self) -> int:
        """N, in all rows."""
        return int(self.bases[-1])

    @property
    def counts(self) -> Numbers:
        """(P,) chunks of each run."""
        return np.diff(self.begins)

    def runs_of(self, chunks: Numbers) -> Numbers:
        """The run of each global chunk number."""
        return np.searchsorted(self.begins, chunks, side="right") - 1

    def lengths(self, chunks: Numbers) -> Numbers:
        """Real tokens of each chunk."""
        runs, size = self.runs_of(chunks), self.arrays.layout.chunk_size
        return np.minimum(size, self.tokens[runs] - (chunks - self.begins[runs]) * size)

    def in_rows(self, chunks: Numbers) -> Numbers:
        """The number of each global chunk in its row."""
        return chunks - self.bases[self.row[self.runs_of(chunks)]]

    def records(self, chunks: Numbers) -> Numbers:
        """Where each global chunk is in the data files."""
        runs = self.runs_of(chunks)
        return self.first[runs] + chunks - self.begins[runs]

    def alive(self, row: int) -> Numbers:
        """Global numbers of the chunks of a row that can be found."""
        left = self.left * (self.row == row)
        inside = np.arange(left.sum()) - np.repeat(np.cumsum(left) - left, left)
        found: Numbers = np.repeat(self.begins[:-1], left) + inside
        return found

    def numbers_in(self, before: Runs) -> Numbers:
        """(N,) the global number that each chunk had, -1 where it is new."""
        columns = (before.row, before.piece, before.skipped, before.left, before.begins[:-1])
        had = {
            (row, piece): (skipped, skipped + left, begin)
            for row, piece, skipped, left, begin in zip(*(each.tolist() for each in columns), strict=True)
        }
        old = np.full(len(self.piece), -1)
        for run, count in enumerate(self.counts.tolist()):
            begin, end, at = had.get((int(self.row[run]), int(self.piece[run])), (0, 0, 0))
            if begin <= self.skipped[run] and self.skipped[run] + count <= end:
                old[run] = at + self.skipped[run] - begin
        inside = np.arange(self.num_chunks) - np.repeat(self.begins[:-1], self.counts)
        spread = np.repeat(old, self.counts)
        return np.where(spread < 0, -1, spread + inside)

    def origin(self, row: int, chunk: int) -> ChunkOrigin:
        """Where a chunk of a row came from."""
        number = int(self.bases[row]) + chunk
        run = int(self.runs_of(np.array([number]))[0])
        document = self.documents[int(self.document[run])]
        return ChunkOrigin(
            document=document.name,
            start_token=int(self.first_token[run] + (number - self.begins[run]) * self.arrays.layout.chunk_size),
            length=int(self.lengths(np.array([number]))[0]),
            number=chunk,
            time=document.added,
            namespace=document.namespace,
            document_id=document.id,
        )

    def expires(self) -> float:
        """The first moment at which a document that is left expires; infinity if none does."""
        left = {int(number) for number in self.document[self.left > 0]}
        return min((self.documents[each].expires or math.inf for each in left), default=math.inf)

    def same(self, other: Runs) -> bool:
        """Whether both have the same chunks, all of which can be found; they may have moved in the files."""
        names = ("bases", "begins", "piece", "skipped", "first_token", "tokens", "left")
        return [each.id for each in self.documents] == [each.id for each in other.documents] and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in names
        )

    def now(self, room: Room) -> Runs:
        """The same chunks where they are stored now, fewer left of those that were forgotten, replaced or cut back.

        What was once gone stays gone, whatever becomes of its document.
        """
        there: dict[tuple[int, int, int], tuple[int, int]] = {}
        with room.catalog.read() as db:
            for namespace in set(self.namespaces):
                rows = db.execute(_QUERY, (namespace, clock.time()))
                there.update({(row[0], row[1], row[2]): (row[3], row[4]) for row in rows})
            expires = dict(db.execute("SELECT id, expires FROM document WHERE expires IS NOT NULL"))
            arrays = room.arrays()
        size, left, first = self.arrays.layout.chunk_size, self.left.copy(), self.first.copy()
        for run in np.flatnonzero(left).tolist():
            skipped = int(self.skipped[run])
            begin = int(self.first_token[run]) - skipped * size
            tokens, record = there.get((self.documents[self.document[run]].id, int(self.piece[run]), begin), (0, 0))
            rest, first[run] = tokens - skipped * size, record + skipped
            if rest < self.tokens[run]:  # a part that was cut back ends with a whole chunk
                left[run] = min(int(left[run]), max(0, rest) // size)
        documents = [replace(each, expires=expires.get(each.id)) for each in self.documents]
        return replace(self, documents=documents, arrays=arrays, left=left, first=first)


def read_runs(room: Room, namespaces: Sequence[str], selection: Selection) -> Runs:
    """The chunks of a selection's documents, one row for each namespace, in the order of the documents' times.

    Raises:
        StoreError: a document that was named is not there.
        GenerationGone: see ``Room.arrays``.
    """
    size = room.layout.chunk_size
    documents: list[DocumentInfo] = []
    tables: list[NDArray[np.int64]] = []
    with room.catalog.read() as db:
        for row, namespace in enumerate(namespaces):
            wanted = selection.of(namespace, room.catalog.documents(namespace))
            number = {each.id: len(documents) + at for at, each in enumerate(wanted)}
            documents += wanted
            runs = [
                [row, number[document], piece, 0, first, first_token, tokens]  # in the order of the fields of Runs
                for document, piece, first_token, tokens, first in db.execute(_QUERY, (namespace, clock.time()))
                if document in number
            ]
            if selection.max_tokens is not None:
                runs = _newest(runs, selection.max_tokens, size)
            tables.append(np.array(runs, dtype=np.int64).reshape(-1, 7))
        arrays = room.arrays()
    table = np.concatenate(tables)
    counts = -(-table[:, 6] // size)
    rows = np.arange(len(namespaces) + 1)
    begins = np.concatenate([[0], np.cumsum(counts)])
    bases = begins[np.searchsorted(table[:, 0], rows)]
    columns: list[Numbers] = [*table.T, counts]
    return Runs(list(namespaces), documents, arrays, bases, begins, *columns)


def _newest(runs: list[list[int]], max_tokens: int, size: int) -> list[list[int]]:
    """The last runs, the first of them cut at its front by whole chunks, with at most ``max_tokens`` tokens."""
    kept: list[list[int]] = []
    room = max_tokens
    for row, document, piece, _, first, first_token, tokens in reversed(runs):
        chunks = -(-tokens // size)
        drop = min(chunks, max(0, -(-(tokens - room) // size)))
        if drop < chunks:
            gone = drop * size
            kept.append([row, document, piece, drop, first + drop, first_token + gone, tokens - gone])
            room -= tokens - gone
        if drop:
            break
    return kept[::-1]


AT_ONCE = 1 << 14
"""Chunks that are loaded at a time: no second copy of everything."""


class RowKeys:
    """Mean keys of a row's chunks, side by side; what is forgotten is taken out, so that search never sees it.

    Args:
        runs: of the bank.
        row: whose keys.
        indexes: one for each remembered layer, of this row alone.
        before: runs and keys from which what is already loaded is copied.

    Attributes:
        keys: (1, H, n, D).
        numbers: (n,) global chunk number of every key, ascending, on the CPU.
    """

    def __init__(
        self,
        runs: Runs,
        row: int,
        indexes: Sequence[Index],
        device: torch.device,
        dtype: torch.dtype,
        before: tuple[Runs, RowKeys] | None = None,
    ) -> None:
        self.indexes, self._base, self._total = indexes, int(runs.bases[row]), int(np.diff(runs.bases)[row])
        self.numbers = runs.alive(row)
        layout = runs.arrays.layout
        self.keys = torch.empty(1, layout.heads, len(self.numbers), layout.head_dim, dtype=dtype, device=device)
        old = np.full(len(self.numbers), -1)
        if before is not None:  # slots that these chunks have in the old keys
            had = runs.numbers_in(before[0])[self.numbers]
            old = np.where(had < 0, -1, np.searchsorted(before[1].numbers, had))
        had_keys = None if before is None else before[1].keys[0].transpose(0, 1)
        _fill(self.keys[0].transpose(0, 1), old, had_keys, runs.arrays.keys, runs.records(self.numbers))
        same = int((np.append(old, -2) != np.arange(len(old) + 1)).argmax())  # leading slots that are what they were
        if before is None or same < len(before[1].numbers):
            for index in indexes:
                index.cleared(torch.zeros(1, dtype=torch.long))
            same = 0
        slots = torch.arange(same, len(old), device=device)
        for layer, index in enumerate(indexes):
            index.written(self._layer(layer), torch.zeros_like(slots), slots)
        self._renumber()

    def _layer(self, layer: int) -> Tensor:
        """(1, Hkv, n, D), a view."""
        heads = self.keys.shape[1] // len(self.indexes)
        return self.keys[:, layer * heads : (layer + 1) * heads]

    def _renumber(self) -> None:
        # None: slots are numbers in the row, which saves a look-up
        whole = len(self.numbers) == self._total
        self._in_row = None if whole else torch.from_numpy(self.numbers - self._base).to(self.keys.device)

    def search(self, queries: Tensor, num: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best chunks of queries (b, Hkv, Q, D).

        Returns:
            scores (b, Hkv, Q, R) float32, numbers in the row (b, Hkv, Q, R) long, best first, and (R,) bool where there
            is any; elsewhere both are 0.
        """
        lines, live = queries.shape[0], len(self.numbers)
        exists = torch.arange(num, device=queries.device) < live
        if not live:
            nothing = torch.zeros(*queries.shape[:3], num, device=queries.device)
            return nothing, nothing.long(), exists
        scores, slots = self.indexes[layer].search(queries, self._layer(layer), [0] * lines, [live] * lines, num)
        if live < num:
            scores, slots = scores.masked_fill(~exists, 0.0), slots.masked_fill(~exists, 0)
        return scores, slots if self._in_row is None else self._in_row[slots], exists

    def forget(self, runs: Runs, row: int) -> None:
        """Take out what cannot be found any more; the rest moves up, and what is after it is overwritten."""
        stays = torch.from_numpy(np.searchsorted(self.numbers, runs.alive(row))).to(self.keys.device)
        if len(stays) == len(self.numbers):
            return
        for head in self.keys[0]:  # one head at a time: a copy of all keys need not fit beside them
            head[: len(stays)] = head.index_select(0, stays)
            head[len(stays) :] = 0
        self.numbers = runs.alive(row)
        self.keys = self.keys[:, :, : len(stays)]
        for index in self.indexes:
            index.kept(0, stays)
        self._renumber()

    @property
    def nbytes(self) -> int:
        """Of the keys."""
        return self.keys.numel() * self.keys.element_size()


class Held:
    """Keys and values of all chunks in memory or on the device, by global number.

    Args:
        held: where the numbers are.
        device: where they are wanted.
        before: runs and values from which what is already held is copied.

    Attributes:
        kv: (N + 1, H, 2, S, D); the last one is zero, and stands for no chunk.
        lengths: (N + 1,) real tokens of each.
        sources: (N + 1,) number of each in its row; -1 of the last.
    """

    def __init__(
        self, runs: Runs, held: torch.device, device: torch.device, before: tuple[Runs, Held] | None = None
    ) -> None:
        layout = runs.arrays.layout
        self.device = device
        shape = (runs.num_chunks + 1, layout.heads, 2, layout.chunk_size, layout.head_dim)
        pinned = held.type == "cpu" and device.type == "cuda"  # page-locked memory is fetched fast
        self.kv = torch.zeros(shape, dtype=DTYPES[layout.dtype], device=held, pin_memory=pinned)
        self.scales = torch.ones(shape[:3], device=held) if layout.dtype == "int8" else None
        every = np.arange(runs.num_chunks)
        self.lengths = torch.from_numpy(np.append(runs.lengths(every), 0)).to(device)
        self.sources = torch.from_numpy(np.append(runs.in_rows(every), -1)).to(device)
        old = np.full(runs.num_chunks, -1) if before is None else runs.numbers_in(before[0])
        records = runs.records(every)
        _fill(self.kv, old, None if before is None else before[1].kv, runs.arrays.kv, records)
        if self.scales is not None:
            _fill(self.scales, old, None if before is None else before[1].scales, runs.arrays.scales, records)

    @property
    def ready(self) -> bool:
        """Whether all is on the device in the form in which it is read; int8 has to be scaled first."""
        return self.scales is None and self.kv.device.type == self.device.type

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(each.numel() * each.element_size() for each in (self.kv, self.scales) if each is not None)

    def take(self, chunks: Numbers, heads: Numbers) -> Tensor:
        """(P + 1, 2, S, D) on the device, of global chunks (P,) and heads (P,); the last one is zero."""
        count = self.kv.shape[1]
        lines = torch.from_numpy(np.append(chunks * count + heads, (self.kv.shape[0] - 1) * count))
        taken = self._picked(self.kv, lines)
        if self.scales is None:
            return taken
        return taken.to(torch.float32) * self._picked(self.scales, lines)[..., None, None]

    def _picked(self, table: Tensor, lines: Tensor) -> Tensor:
        """Lines of (N + 1, H, ...), heads side by side, on the device."""
        return table.flatten(0, 1).index_select(0, lines.to(table.device)).to(self.device, non_blocking=True)

    def wipe(self, begin: int, end: int) -> None:
        """Overwrite the chunks from ``begin`` to ``end`` with zeros."""
        self.kv[begin:end] = 0


def _fill(target: Tensor, old: Numbers, before: Tensor | None, stored: Any, records: Numbers) -> None:
    """Fill the lines of ``target``: from the lines ``old`` of ``before``, or where these are -1 from the data files."""
    for begin in range(0, len(old), AT_ONCE):
        part = old[begin : begin + AT_ONCE]
        into = target[begin : begin + len(part)]
        known, new = np.flatnonzero(part >= 0), np.flatnonzero(part < 0)
        if len(known) and before is not None:
            into[torch.from_numpy(known).to(into.device)] = before[torch.from_numpy(part[known]).to(before.device)]
        if len(new):
            read = torch.from_numpy(_records(stored, records[begin + new]))
            read = (read.view(torch.bfloat16) if read.dtype == torch.int16 else read).to(into.device, into.dtype)
            if len(known):
                into[torch.from_numpy(new).to(into.device)] = read
            else:
                into.copy_(read)


def _records(array: Any, records: Numbers) -> Any:
    """A copy of some records; those that are one after the other are read in one go."""
    follow = bool((np.diff(records) == 1).all())
    return array[records[0] : records[-1] + 1].copy() if follow else array[records]


def take_mapped(runs: Runs, chunks: Numbers, heads: Numbers, device: torch.device) -> Tensor:
    """As ``Held.take``, from the memory map; of a chunk only the heads that were found are read."""
    layout = runs.arrays.layout
    dtype = torch.float32 if layout.dtype == "int8" else DTYPES[layout.dtype]
    shape = (len(chunks) + 1, 2, layout.chunk_size, layout.head_dim)
    # page-locked, so that a GPU fetches it while the host goes on
    taken = torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
    taken[:-1] = runs.arrays.gather(runs.records(chunks), heads, dtype)
    taken[-1] = 0
    return taken.to(device, non_blocking=True)
