"""What a reader of memory gets from the catalog: which chunks of which data files, in the order of the documents."""

from __future__ import annotations

import time as clock
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longmem.errors import StoreDamaged, StoreError
from longmem.store.records import DocumentInfo, Layout
from longmem.store.rows import info_of, is_expired, matches
from longmem.store.schema import DocumentRow, FileRow
from longmem.store.snapshot import Snapshot


@dataclass(frozen=True)
class Selection:
    """Which documents of a namespace; all conditions hold together.

    Attributes:
        documents: their names; None is all.
        where: metadata that they have: every key with an equal value.
        after: added at this time (seconds since the epoch) or later.
        before: added before this time.
        max_tokens: only the newest so many tokens, in whole chunks.
    """

    documents: Sequence[str] | None = None
    where: Mapping[str, Any] | None = None
    after: float | None = None
    before: float | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class ChunkTable:
    """Where the chunks of some documents lie: runs in document order (time, then number), P runs in all.

    Attributes:
        documents: in order.
        files: data files that the runs lie in.
        file: (P,) index into ``files``.
        first_chunk: (P,) of the run, in its file.
        chunks: (P,) in the run.
        tokens: (P,) real tokens of the run; only its last chunk may be short.
        document: (P,) index into ``documents``.
        first_token: (P,) offset of the run's first token in its document.
        content: (P,) number of the content, for ``Snapshot.text``.
        skipped: (P,) chunks of the content before the run's first.
        layout: of the store.
        expires: the moment at which the first of these documents expires; None if none does.
    """

    documents: list[DocumentInfo]
    files: list[FileRow]
    file: NDArray[np.int32]
    first_chunk: NDArray[np.int64]
    chunks: NDArray[np.int64]
    tokens: NDArray[np.int64]
    document: NDArray[np.int32]
    first_token: NDArray[np.int64]
    content: NDArray[np.int64]
    skipped: NDArray[np.int64]
    layout: Layout
    expires: float | None

    @property
    def num_chunks(self) -> int:
        """N, in all."""
        return int(self.chunks.sum())

    @property
    def num_tokens(self) -> int:
        """In all."""
        return int(self.tokens.sum())

    def expand(self) -> ChunkArrays:
        """One entry for every chunk instead of every run."""
        run = np.repeat(np.arange(len(self.chunks)), self.chunks)
        begins = np.cumsum(self.chunks) - self.chunks
        inside = np.arange(len(run)) - begins[run]
        size = self.layout.chunk_size
        return ChunkArrays(
            run=run,
            file=self.file[run],
            chunk=self.first_chunk[run] + inside,
            document=self.document[run],
            start_token=self.first_token[run] + inside * size,
            length=np.minimum(size, self.tokens[run] - inside * size).astype(np.int32),
        )


@dataclass(frozen=True)
class ChunkArrays:
    """One entry for each of N chunks.

    Attributes:
        run: (N,) index into the runs of the table.
        file: (N,) index into its ``files``.
        chunk: (N,) number in that file.
        document: (N,) index into its ``documents``.
        start_token: (N,) offset in the document.
        length: (N,) real tokens.
    """

    run: NDArray[np.int64]
    file: NDArray[np.int32]
    chunk: NDArray[np.int64]
    document: NDArray[np.int32]
    start_token: NDArray[np.int64]
    length: NDArray[np.int32]


def read_chunks(
    snapshot: Snapshot, namespace: str, selection: Selection | None = None, *, now: float | None = None
) -> ChunkTable:
    """The chunks of a namespace's documents, in document order; a namespace without documents has none.

    Args:
        selection: which documents; None is all.
        now: documents that expire at this moment or before are left out; None is the clock's.

    Raises:
        StoreError: a document that was named is not there.
        StoreDamaged: the catalog is not what was written.
    """
    layout = snapshot.layout
    wanted = select(snapshot, namespace, selection or Selection(), now=now)
    pieces = snapshot.pieces_of(namespace, wanted) if wanted else {}
    contents = snapshot.contents_of(namespace) if wanted else {}
    names: dict[str, int] = {}
    runs: list[tuple[int, ...]] = []
    for number, document in enumerate(wanted):
        for piece in pieces[document.id]:
            content = contents.get(piece.content) or snapshot.content(piece.content)
            chunks = layout.chunks(piece.tokens)
            if chunks > content.chunks:
                raise StoreDamaged(f"catalog.sqlite: document {document.name!r} has more chunks than its content")
            file = names.setdefault(content.file, len(names))
            runs.append((file, content.first_chunk, chunks, piece.tokens, number, piece.first_token, piece.content, 0))
    if selection is not None and selection.max_tokens is not None:
        runs = _newest(runs, selection.max_tokens, layout.chunk_size)
    table = np.array(runs, dtype=np.int64).reshape(-1, 8)
    return ChunkTable(
        documents=[info_of(row, layout) for row in wanted],
        files=[snapshot.file(name) for name in names],
        file=table[:, 0].astype(np.int32),
        first_chunk=table[:, 1],
        chunks=table[:, 2],
        tokens=table[:, 3],
        document=table[:, 4].astype(np.int32),
        first_token=table[:, 5],
        content=table[:, 6],
        skipped=table[:, 7],
        layout=layout,
        expires=min((row.expires for row in wanted if row.expires is not None), default=None),
    )


def select(snapshot: Snapshot, namespace: str, selection: Selection, *, now: float | None = None) -> list[DocumentRow]:
    """The documents that a selection means, all but its ``max_tokens`` considered.

    Raises:
        StoreError: a document that was named is not there.
    """
    moment = clock.time() if now is None else now
    rows = [row for row in snapshot.documents(namespace) if not is_expired(row, moment)]
    if selection.documents is not None:
        names = set(selection.documents)
        missing = sorted(names - {row.name for row in rows})
        if missing:
            raise StoreError(
                f"namespace {namespace!r} has no document {missing[0]!r}; `longmem memory list` shows its names"
            )
        rows = [row for row in rows if row.name in names]
    if selection.after is not None:
        rows = [row for row in rows if row.added >= selection.after]
    if selection.before is not None:
        rows = [row for row in rows if row.added < selection.before]
    return [row for row in rows if matches(row, selection.where)]


def _newest(runs: list[tuple[int, ...]], max_tokens: int, size: int) -> list[tuple[int, ...]]:
    """The last runs, the first of them cut at its front by whole chunks, with at most ``max_tokens`` tokens."""
    kept: list[tuple[int, ...]] = []
    room = max_tokens
    for file, first_chunk, chunks, tokens, document, first_token, content, _ in reversed(runs):
        drop = min(chunks, max(0, -(-(tokens - room) // size)))
        if drop < chunks:
            gone = drop * size
            kept.append(
                (file, first_chunk + drop, chunks - drop, tokens - gone, document, first_token + gone, content, drop)
            )
            room -= tokens - gone
        if drop:
            break
    return kept[::-1]
