"""Compacting: what nobody refers to leaves the disk, small data files become large ones.

File by file: the new data file is made durable, one transaction makes it true and drops what is dead, the old ones are
removed. Killed anywhere, the store is one that could have been there, with the same documents.
"""

from __future__ import annotations

import time as clock
from collections.abc import Iterator
from dataclasses import dataclass

from longmem.store.catalog import Catalog
from longmem.store.checking import check_catalog
from longmem.store.durable import failpoint, new_id
from longmem.store.precision import StoredChunks
from longmem.store.records import CompactReport, Layout, Progress, Report
from longmem.store.room import Room
from longmem.store.rows import delete_document, is_expired
from longmem.store.schema import ContentRow, DocumentRow, FileRow, PieceRow
from longmem.store.segments import FILE_BYTES, write_file
from longmem.store.snapshot import Snapshot
from longmem.store.transaction import Transaction

READER_SECONDS = 5.0
"""How long ``compact`` waits for readers whose snapshots keep the write-ahead log."""


@dataclass
class _Old:
    """A data file, and which of its contents somebody refers to."""

    row: FileRow
    live: list[ContentRow]
    dead: list[ContentRow]


def compact(room: Room, progress: Report | None) -> CompactReport:
    """See ``MemoryStore.compact``."""
    with room.guard:
        check_catalog(room.catalog).raise_first()  # a lost row must not pass for something that nobody refers to
        room.sweep()
        before = _size(room.catalog)
        documents = _remove_expired(room)
        plan = _plan(room)
        total = sum(room.layout.chunk_bytes * content.chunks for old in plan for content in old.live)
        done = 0
        for group in filter(_worth_it, _groups(plan, room.layout)):
            _rewrite(room, group)
            done += sum(room.layout.chunk_bytes * content.chunks for old in group for content in old.live)
            if progress is not None:
                progress(Progress("rewrite", done, total, "bytes", group[0].row.id))
        room.catalog.vacuum()
        failpoint("compact.vacuumed")
        emptied = room.catalog.empty_log(READER_SECONDS)
        failpoint("compact.emptied")
        after = _size(room.catalog)
        return CompactReport(
            documents=documents,
            tokens=sum(content.tokens for old in plan for content in old.dead),
            files_before=before[0],
            files_after=after[0],
            bytes_before=before[1],
            bytes_after=after[1],
            emptied=emptied,
        )


def _size(catalog: Catalog) -> tuple[int, int]:
    with catalog.snapshot() as snapshot:
        files = snapshot.files()
    return len(files), sum(row.size for row in files) + catalog.disk_bytes


def _remove_expired(room: Room) -> int:
    now = clock.time()
    with room.catalog.snapshot() as snapshot:
        if not any(is_expired(row, now) for row in snapshot.rows(DocumentRow, "WHERE expires IS NOT NULL")):
            return 0
    with room.catalog.transaction() as tx:
        expired = [row for row in tx.every(DocumentRow) if is_expired(row, now)]
        for row in expired:
            delete_document(tx, row)
    return len(expired)


def _plan(room: Room) -> list[_Old]:
    """Files to rewrite or remove: those with something dead, and small ones if there are several."""
    with room.catalog.snapshot() as snapshot:
        live = {row.content for row in snapshot.every(PieceRow)}.union(*room.pinned)
        by_file: dict[str, _Old] = {row.id: _Old(row, [], []) for row in snapshot.files()}
        for content in sorted(snapshot.every(ContentRow), key=lambda row: row.first_chunk):
            old = by_file[content.file]
            (old.live if content.id in live else old.dead).append(content)
    with_dead = [old for old in by_file.values() if old.dead]
    small = [old for old in by_file.values() if not old.dead and old.row.size <= FILE_BYTES // 2]
    if len(small) + sum(1 for old in with_dead if old.live) < 2:
        small = []
    return sorted(with_dead + small, key=lambda old: min((content.id for content in old.live), default=0))


def _groups(plan: list[_Old], layout: Layout) -> Iterator[list[_Old]]:
    """Old files whose living contents go into one new file together."""
    group: list[_Old] = []
    filled = 0
    for old in plan:
        size = layout.chunk_bytes * sum(content.chunks for content in old.live)
        if group and filled + size > FILE_BYTES:
            yield group
            group, filled = [], 0
        group.append(old)
        filled += size
    if group:
        yield group


def _worth_it(group: list[_Old]) -> bool:
    return len(group) > 1 or bool(group[0].dead)


def _rewrite(room: Room, group: list[_Old]) -> None:
    placed: list[str] = []
    try:
        live = [(old, content) for old in group for content in old.live]
        file = None
        if live:
            placed.append(new_id())
            parts = [_chunks(room, old.row, content) for old, content in live]
            file = write_file(room.staging, room.segments, placed[0], parts, room.layout)
            failpoint("compact.placed")
        with room.catalog.transaction() as tx:
            if file is not None:
                tx.insert(file)
                move_contents(tx, file, [content for _, content in live])
            for old in group:
                for content in old.dead:
                    tx.delete(tx.text(content.id))
                    tx.delete(content)
                tx.delete(old.row)
    except BaseException:
        room.discard(placed)
        raise
    failpoint("compact.committed")
    room.unlink([old.row.id for old in group], "compact.unlinked")


def _chunks(room: Room, file: FileRow, content: ContentRow) -> StoredChunks:
    return room.data_file(file).chunks(content.first_chunk, content.first_chunk + content.chunks)


def move_contents(tx: Transaction, file: FileRow, contents: list[ContentRow]) -> None:
    """Say that these contents lie in this file now, one behind the other."""
    first = 0
    for content in contents:
        tx.replace(content, content._replace(file=file.id, first_chunk=first))
        first += content.chunks


def dead_tokens(snapshot: Snapshot) -> int:
    """Tokens of contents that no document refers to."""
    live = {row.content for row in snapshot.every(PieceRow)}
    return sum(row.tokens for row in snapshot.every(ContentRow) if row.id not in live)
