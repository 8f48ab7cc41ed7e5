"""Which chunks a bank has and where they are: runs of records of the data files, numbered row after row.

A chunk has two numbers: one in its row (what ``provenance`` takes), and one over all rows, the *global* one. Both stay
what they are until the bank is refreshed, also when chunks are forgotten.

P runs in all
"""

from __future__ import annotations

import math
import time as clock
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longmem.errors import StoreError
from longmem.store.catalog import matches
from longmem.store.disk import Arrays, Numbers
from longmem.store.records import DocumentInfo
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
