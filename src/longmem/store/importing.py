"""Importing what another store exported: all of it, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longmem.errors import StoreError
from longmem.store.archive import Archive, ArchivedDocument
from longmem.store.durable import failpoint, file_errors, new_id
from longmem.store.pieces import Tokens, joined
from longmem.store.precision import StoredChunks
from longmem.store.records import Layout, NewDocument, Progress, Receipt, Report, Status
from longmem.store.room import Room
from longmem.store.rows import check_names, delete_document, is_expired, metadata_text, whole_document
from longmem.store.schema import ContentRow, DocumentRow, FileRow, PieceRow
from longmem.store.segments import FILE_BYTES, write_file
from longmem.store.snapshot import Snapshot
from longmem.store.transaction import Transaction


@dataclass(frozen=True)
class _Placed:
    """A content in a data file that the catalog does not know yet."""

    digest: bytes
    tokens: Tokens
    chunks: int
    records: bytes


def import_archive(room: Room, path: Path, namespace: str | None, progress: Report | None) -> list[Receipt]:
    """See ``MemoryStore.import_``."""
    with room.guard, file_errors(path, "reading"), path.open("rb") as stream:
        archive = Archive(stream, path)
        manifest, target = archive.manifest, namespace or archive.manifest.namespace
        other = manifest.layout.difference(room.layout)
        if other:
            theirs, ours = getattr(manifest.layout, other[0]), getattr(room.layout, other[0])
            raise StoreError(
                f"{path}: exported from a store with {other[0]}={theirs} ({manifest.layout.backbone}), this one has "
                f"{ours} ({room.layout.backbone}); its tensors mean nothing here: add the text itself"
            )
        for document in manifest.documents:
            check_names(target, NewDocument(document.name, time=document.added, expires=document.expires))
            if sum(tokens for _, tokens in document.pieces) != document.tokens or not document.pieces:
                raise StoreError(f"{path}: document {document.name!r} is incomplete; export again")
        with room.catalog.snapshot() as snapshot:
            missing = [digest for digest in manifest.contents if not _has(snapshot, digest)]
            for document in manifest.documents:
                _status(snapshot, archive, target, document, room.layout)
        placed: list[str] = []
        try:
            files = list(_write(room, archive, missing, placed, progress))
            with room.catalog.transaction() as tx:
                for file, contents in files:
                    _insert_contents(tx, file, contents)
                receipts = [_insert(tx, archive, target, document, room.layout) for document in manifest.documents]
        except BaseException:
            room.discard(placed)
            raise
    failpoint("import.committed")
    return receipts


def _has(snapshot: Snapshot, digest: str) -> bool:
    return snapshot.content_by_digest(bytes.fromhex(digest)) is not None


def _write(
    room: Room, archive: Archive, digests: list[str], placed: list[str], progress: Report | None
) -> Iterator[tuple[FileRow, list[_Placed]]]:
    """Data files with these contents."""
    group: list[tuple[_Placed, StoredChunks]] = []
    filled = 0
    for number, digest in enumerate(digests, 1):
        tokens, chunks = archive.content(digest, room.layout)
        if room.layout.dtype in ("float16", "float32") and not np.isfinite(chunks.kv).all():
            raise StoreError(f"content {digest} of the archive holds numbers that are not finite; nothing was imported")
        if group and filled + chunks.nbytes > FILE_BYTES:
            yield _place(room, group, placed)
            group, filled = [], 0
        group.append((_Placed(bytes.fromhex(digest), tokens, len(chunks), chunks.records()), chunks))
        filled += chunks.nbytes
        if progress is not None:
            progress(Progress("copy", number, len(digests), "contents", digest))
    if group:
        yield _place(room, group, placed)


def _place(room: Room, group: list[tuple[_Placed, StoredChunks]], placed: list[str]) -> tuple[FileRow, list[_Placed]]:
    placed.append(new_id())
    file = write_file(room.staging, room.segments, placed[-1], [chunks for _, chunks in group], room.layout)
    failpoint("import.placed")
    return file, [content for content, _ in group]


def _insert_contents(tx: Transaction, file: FileRow, contents: list[_Placed]) -> None:
    tx.insert(file)
    first = 0
    for content in contents:
        number = tx.next_id("contents")
        tx.insert(ContentRow(number, content.digest, len(content.tokens), content.chunks, file.id, first))
        tx.insert(content.tokens.row(number, content.records))
        first += content.chunks


def _status(
    snapshot: Snapshot, archive: Archive, namespace: str, document: ArchivedDocument, layout: Layout
) -> tuple[Status, DocumentRow | None]:
    row = snapshot.find(namespace, document.name)
    if row is None or is_expired(row):
        return "added", row
    if row.tokens == document.tokens and row.metadata == metadata_text(document.metadata, document.name):
        runs = [archive.content(digest, layout)[0].slice(0, tokens) for digest, tokens in document.pieces]
        if joined(runs).digest() == whole_document(snapshot, row).digest():
            return "unchanged", row
    raise StoreError(
        f"namespace {namespace!r} has another document {document.name!r}; nothing was imported: import into another "
        "namespace, or forget that document"
    )


def _insert(tx: Transaction, archive: Archive, namespace: str, document: ArchivedDocument, layout: Layout) -> Receipt:
    status, old = _status(tx, archive, namespace, document, layout)
    reused = document.tokens
    if status == "unchanged":
        assert old is not None
        row = old
    else:
        if old is not None:
            delete_document(tx, old)
        contents = []
        for digest, tokens in document.pieces:
            content = tx.content_by_digest(bytes.fromhex(digest))
            if content is None or not 0 < tokens <= content.tokens:
                raise StoreError(f"document {document.name!r} of the archive is incomplete; nothing was imported")
            contents.append((content, tokens))
        reused = sum(tokens for content, tokens in contents if tx.holds(namespace, content.id))
        row = DocumentRow(
            id=tx.next_id("documents"),
            namespace=namespace,
            name=document.name,
            source=document.source,
            metadata=metadata_text(document.metadata, document.name),
            added=float(document.added),
            expires=None if document.expires is None else float(document.expires),
            tokens=document.tokens,
            pieces=len(contents),
            revision=document.revision,
        )
        tx.insert(row)
        first = 0
        for ordinal, (content, tokens) in enumerate(contents):
            whole = tokens == content.tokens or tokens % layout.segment_tokens == 0
            last = ordinal == len(contents) - 1
            if not whole or (not last and tokens % layout.segment_tokens):
                raise StoreError(
                    f"document {document.name!r} of the archive is cut inside a segment; nothing was imported"
                )
            tx.insert(PieceRow(row.id, ordinal, content.id, first, tokens))
            first += tokens
    return Receipt(namespace, row.name, status, row.tokens, layout.chunks(row.tokens), reused, row.revision)
