"""Where the chunks of an open bank lie: runs of the store's data files, numbered row after row.

A bank's chunks have two numbers: one in their row (what ``provenance`` takes), and one over all rows, the *global* one.

P runs in all
"""

from __future__ import annotations

import math
import time as clock
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from longmem.errors import StoreDamaged
from longmem.store.reading import ChunkTable, Selection, read_chunks
from longmem.store.records import DocumentInfo, Layout
from longmem.store.rows import info_of
from longmem.store.schema import DocumentRow, FileRow
from longmem.store.segments import DataFile, SegmentGone
from longmem.store.snapshot import Snapshot
from longmem.types import ChunkOrigin

Numbers = NDArray[np.int64]
Found = TypeVar("Found")


class ReadsStore(Protocol):
    """What a bank needs of its store; ``MemoryStore`` has it."""

    model: Any
    tokenizer: Any

    @property
    def layout(self) -> Layout: ...

    def snapshot(self) -> AbstractContextManager[Snapshot]: ...

    def version(self) -> Any:
        """Another value whenever any process has changed the catalog."""
        ...

    def data_file(self, row: FileRow) -> DataFile: ...

    def add_document(self, namespace: str, text: str | None, *, name: str, **more: Any) -> Any: ...

    def append(self, namespace: str, text: str | None, *, name: str, ids: Any) -> Any: ...


@dataclass(frozen=True)
class Places:
    """The chunks of all rows of a bank at one moment.

    Attributes:
        namespaces: of the rows.
        layout: of the store.
        documents: of all rows, one row behind the other.
        files: data files that any chunk lies in.
        bases: (rows + 1,) global number of each row's first chunk; the last is N, the number of all chunks.
        begins: (P + 1,) global number of each run's first chunk, and N.
        file: (P,) index into ``files``; -1 where a run is not to be read any more.
        first_chunk: (P,) of the run, in its file.
        tokens: (P,) real tokens of the run; only its last chunk may be short.
        document: (P,) index into ``documents``.
        first_token: (P,) offset of the run's first token in its document.
        content: (P,) number of the content that the run is a part of.
        skipped: (P,) chunks of the content before the run's first.
        row: (P,) the bank row of the run.
        left: (P,) chunks of the run that can still be found, its first ones.
    """

    namespaces: list[str]
    layout: Layout
    documents: list[DocumentInfo]
    files: list[DataFile]
    bases: Numbers
    begins: Numbers
    file: Numbers
    first_chunk: Numbers
    tokens: Numbers
    document: Numbers
    first_token: Numbers
    content: Numbers
    skipped: Numbers
    row: Numbers
    left: Numbers

    @property
    def num_chunks(self) -> int:
        """N, in all rows."""
        return int(self.bases[-1])

    def runs_of(self, chunks: Numbers) -> Numbers:
        """The run of each global chunk number."""
        return np.searchsorted(self.begins, chunks, side="right") - 1

    def lengths(self, chunks: Numbers) -> Numbers:
        """Real tokens of each chunk."""
        runs = self.runs_of(chunks)
        size = self.layout.chunk_size
        return np.minimum(size, self.tokens[runs] - (chunks - self.begins[runs]) * size)

    def in_rows(self, chunks: Numbers) -> Numbers:
        """The number of each global chunk in its row."""
        return chunks - self.bases[self.row[self.runs_of(chunks)]]

    def spots(self, chunks: Numbers) -> tuple[Numbers, Numbers]:
        """Index of each chunk's file, and its number there."""
        runs = self.runs_of(chunks)
        return self.file[runs], self.first_chunk[runs] + chunks - self.begins[runs]

    def origin(self, row: int, chunk: int) -> ChunkOrigin:
        """Where a chunk of a row came from."""
        number = int(self.bases[row]) + chunk
        at = np.array([number])
        run = int(self.runs_of(at)[0])
        document = self.documents[int(self.document[run])]
        return ChunkOrigin(
            document=document.name,
            start_token=int(self.first_token[run] + (number - self.begins[run]) * self.layout.chunk_size),
            length=int(self.lengths(at)[0]),
            number=chunk,
            time=document.added,
            namespace=document.namespace,
            document_id=document.id,
        )

    def expires(self, after: float) -> float:
        """The first moment behind this one at which a document expires; infinity if none does."""
        times = (document.expires for document in self.documents if document.expires is not None)
        return min((time for time in times if time > after), default=math.inf)

    def alive(self, row: int) -> NDArray[np.bool_]:
        """For every chunk of a row whether it can be found."""
        runs = np.flatnonzero(self.row == row)
        sizes = self.begins[runs + 1] - self.begins[runs]
        inside = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        found: NDArray[np.bool_] = inside < np.repeat(self.left[runs], sizes)
        return found

    def moved(self, snapshot: Snapshot, store: ReadsStore) -> Places:
        """The same chunks where they lie now; those that cannot be found any more nowhere."""
        contents = {}
        for namespace in set(self.namespaces):
            contents.update(snapshot.contents_of(namespace))
        names: dict[str, int] = {}
        file, first_chunk = np.full_like(self.file, -1), np.zeros_like(self.first_chunk)
        for run in np.flatnonzero(self.left):
            content = contents[int(self.content[run])]
            file[run] = names.setdefault(content.file, len(names))
            first_chunk[run] = content.first_chunk + self.skipped[run]
        files = [store.data_file(snapshot.file(name)) for name in names]
        return replace(self, files=files, file=file, first_chunk=first_chunk)

    def without_the_gone(self, snapshot: Snapshot, now: float) -> Places:
        """With the documents as they are now, and fewer chunks left of those that were forgotten, replaced or cut.

        What was once gone stays gone, whatever becomes of its document.
        """
        have: dict[int, DocumentRow] = {}
        for namespace in set(self.namespaces):
            have.update({row.id: row for row in snapshot.documents(namespace)})
        documents, left = list(self.documents), self.left.copy()
        ends = np.searchsorted(self.document, np.arange(len(documents) + 1))
        for number, document in enumerate(self.documents):
            row, runs = have.get(document.id), slice(ends[number], ends[number + 1])
            if row is None or (row.expires is not None and row.expires <= now):
                left[runs] = 0
                continue
            if row.revision != document.revision:
                pieces = {(piece.content, piece.first_token): piece.tokens for piece in snapshot.pieces(row)}
                for run in range(runs.start, runs.stop):
                    left[run] = min(left[run], self._still_in(pieces, run))
            documents[number] = info_of(row, self.layout)
        return replace(self, documents=documents, left=left)

    def _still_in(self, pieces: dict[tuple[int, int], int], run: int) -> int:
        """Chunks of a run that its document still has; ``pieces`` are its (content, first token) and their tokens."""
        size = self.layout.chunk_size
        before = int(self.skipped[run]) * size
        tokens = pieces.get((int(self.content[run]), int(self.first_token[run]) - before), 0) - before
        if tokens >= self.tokens[run]:
            return int(self.begins[run + 1] - self.begins[run])
        return max(0, tokens) // size  # a piece that was cut back ends with a whole chunk


def read_places(store: ReadsStore, namespaces: Sequence[str], selection: Selection) -> tuple[Places, Any]:
    """The chunks of a selection's documents, one row for each namespace, and the store's version they are of.

    Opens the data files and reads nothing of them.

    Raises:
        StoreError: a document that was named is not there.
        StoreDamaged: catalog or files are not what was written.
    """

    def read() -> tuple[Places, Any]:
        version = store.version()
        with store.snapshot() as snapshot:
            tables = [read_chunks(snapshot, namespace, selection, now=clock.time()) for namespace in namespaces]
        return _joined(store, list(namespaces), tables), version

    return until_found(read)


def until_found(read: Callable[[], Found]) -> Found:
    """What a reading of catalog and data files gives, with a fresh look at the catalog where a file is gone.

    However often ``compact`` is faster than we are: a file that it removed no later catalog names.

    Raises:
        StoreDamaged: the catalog still asks for it: it is lost.
    """
    missed = ""
    while True:
        try:
            return read()
        except SegmentGone as gone:
            if str(gone) == missed:
                raise StoreDamaged(missed) from gone
            missed = str(gone)


@dataclass(frozen=True)
class Copy:
    """Chunks that lie one behind the other, and where to have them from.

    Attributes:
        begin: global number of the first.
        count: how many.
        file: index of their data file.
        chunk: number of the first one there.
        old: global number of the first one in the places before, where they are loaded already; else None.
    """

    begin: int
    count: int
    file: int
    chunk: int
    old: int | None


def copies(places: Places, before: Places | None = None, row: int | None = None) -> Iterator[Copy]:
    """All chunks that can be found, of one row or of all, in order, in stretches as long as they come."""
    loaded = _loaded(before)
    pending: Copy | None = None
    runs = np.flatnonzero(places.left if row is None else places.left * (places.row == row))
    for run in runs.tolist():
        count, skipped = int(places.left[run]), int(places.skipped[run])
        begin, end, at = loaded.get((int(places.row[run]), int(places.content[run])), (0, 0, 0))
        old = at + skipped - begin if begin <= skipped and skipped + count <= end else None
        here = Copy(int(places.begins[run]), count, int(places.file[run]), int(places.first_chunk[run]), old)
        if pending is not None and _follows(pending, here):
            pending = replace(pending, count=pending.count + count)
            continue
        if pending is not None:
            yield pending
        pending = here
    if pending is not None:
        yield pending


def _loaded(before: Places | None) -> dict[tuple[int, int], tuple[int, int, int]]:
    """By row and content: which of its chunks (from, to) can be had, and the global number of the first."""
    if before is None:
        return {}
    return {
        (int(row), int(content)): (int(skipped), int(skipped + left), int(begin))
        for row, content, skipped, left, begin in zip(
            before.row, before.content, before.skipped, before.left, before.begins[:-1], strict=True
        )
    }


def _follows(first: Copy, second: Copy) -> bool:
    if first.begin + first.count != second.begin or (first.old is None) != (second.old is None):
        return False
    if first.old is not None and second.old is not None:
        return first.old + first.count == second.old
    return first.file == second.file and first.chunk + first.count == second.chunk


def _joined(store: ReadsStore, namespaces: list[str], tables: list[ChunkTable]) -> Places:
    files: dict[str, FileRow] = {file.id: file for table in tables for file in table.files}
    number = {name: index for index, name in enumerate(files)}
    sizes = [table.num_chunks for table in tables]

    def column(arrays: list[Any]) -> Numbers:
        return np.concatenate([np.asarray(array, dtype=np.int64) for array in arrays])

    chunks = column([table.chunks for table in tables])
    first_document = [0, *accumulate(len(table.documents) for table in tables)]
    return Places(
        namespaces=namespaces,
        layout=store.layout,
        documents=list(chain.from_iterable(table.documents for table in tables)),
        files=[store.data_file(row) for row in files.values()],
        bases=np.array([0, *accumulate(sizes)], dtype=np.int64),
        begins=np.concatenate(([0], np.cumsum(chunks))),
        file=column([[number[table.files[index].id] for index in table.file] for table in tables]),
        first_chunk=column([table.first_chunk for table in tables]),
        tokens=column([table.tokens for table in tables]),
        document=column([table.document + first_document[row] for row, table in enumerate(tables)]),
        first_token=column([table.first_token for table in tables]),
        content=column([table.content for table in tables]),
        skipped=column([table.skipped for table in tables]),
        row=column([np.full(len(table.chunks), row) for row, table in enumerate(tables)]),
        left=chunks,
    )
