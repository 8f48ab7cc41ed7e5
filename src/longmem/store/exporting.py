"""Exporting documents into one file, for another store of the same backbone."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path

from longmem.errors import StoreError
from longmem.store.archive import MANIFEST, ArchivedDocument, Manifest, add_member, content_bytes, member_name
from longmem.store.durable import failpoint, file_errors, placed
from longmem.store.pieces import Tokens
from longmem.store.places import until_found
from longmem.store.reading import Selection, select
from longmem.store.records import DocumentInfo, Progress, Report
from longmem.store.room import Room
from longmem.store.rows import info_of, metadata_of
from longmem.store.schema import ContentRow, DocumentRow, PieceRow
from longmem.store.snapshot import Snapshot


def export(
    room: Room, namespace: str, path: Path, names: Sequence[str] | None, progress: Report | None
) -> list[DocumentInfo]:
    """See ``MemoryStore.export``."""

    def write() -> list[DocumentInfo]:
        with room.catalog.snapshot(own=True) as snapshot:
            return _export(room, snapshot, namespace, path, names, progress)

    return until_found(write)


def _export(
    room: Room,
    snapshot: Snapshot,
    namespace: str,
    path: Path,
    names: Sequence[str] | None,
    progress: Report | None,
) -> list[DocumentInfo]:
    rows = select(snapshot, namespace, Selection(documents=names))
    if not rows:
        raise StoreError(
            f"namespace {namespace!r} has no documents to export; `longmem memory list` shows what there is"
        )
    pieces = snapshot.pieces_of(namespace, rows)
    contents = {piece.content: snapshot.content(piece.content) for row in rows for piece in pieces[row.id]}
    total, done = sum(room.layout.chunk_bytes * content.chunks for content in contents.values()), 0
    with file_errors(path, "looking at"):
        if path.is_dir():
            raise StoreError(f"{path}: a folder; name a file to export to")
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    with placed(path.absolute().parent, path.absolute()) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        sums = {}
        for content in contents.values():
            digest = content.digest.hex()
            sums[digest] = add_member(tar, member_name(digest), _bytes(room, snapshot, content))
            done += room.layout.chunk_bytes * content.chunks
            if progress is not None:
                progress(Progress("copy", done, total, "bytes", path.name))
        documents = [_document(row, pieces[row.id], contents) for row in rows]
        add_member(tar, MANIFEST, Manifest(namespace, room.layout, documents, sums).to_json())
        failpoint("export.written")
    return [info_of(row, room.layout) for row in rows]


def _bytes(room: Room, snapshot: Snapshot, content: ContentRow) -> bytes:
    file = room.data_file(snapshot.file(content.file))
    chunks = file.chunks(content.first_chunk, content.first_chunk + content.chunks)
    return content_bytes(Tokens.from_row(snapshot.text(content.id)), chunks, room.layout)


def _document(row: DocumentRow, pieces: list[PieceRow], contents: dict[int, ContentRow]) -> ArchivedDocument:
    return ArchivedDocument(
        name=row.name,
        source=row.source,
        metadata=metadata_of(row),
        added=row.added,
        expires=row.expires,
        tokens=row.tokens,
        revision=row.revision,
        pieces=[(contents[piece.content].digest.hex(), piece.tokens) for piece in pieces],
    )
