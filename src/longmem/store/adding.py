"""Adding documents: pieces that are not there yet are encoded, written and committed as they come, a document with its
last piece; nobody sees half of one, and an interrupted add finds its pieces again.
"""

from __future__ import annotations

import time as clock
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from longmem.errors import StoreDamaged, StoreError
from longmem.store.durable import failpoint, new_id
from longmem.store.pieces import Tokens, cut, joined, tokens_of
from longmem.store.precision import StoredChunks
from longmem.store.records import Layout, NewDocument, Progress, Receipt, Report, Status
from longmem.store.room import Room
from longmem.store.rows import check_names, delete_document, find_live, is_expired, metadata_text, whole_document
from longmem.store.schema import ContentRow, DocumentRow, FileRow, PieceRow
from longmem.store.segments import FILE_BYTES, write_file
from longmem.store.snapshot import Snapshot
from longmem.store.transaction import Transaction
from longmem.store.workers import Team, Workers, team_of, workers_from

COMMIT_SECONDS = 30.0
"""An interruption costs at most the encoding of about so long."""
COMMIT_DOCUMENTS = 1024


@dataclass
class _Piece:
    """A piece that is not in the catalog: to be encoded, or encoded and to be written."""

    digest: bytes
    tokens: Tokens
    chunks: StoredChunks | None = None

    @property
    def size(self) -> int:
        """Bytes in a data file."""
        return 0 if self.chunks is None else self.chunks.nbytes


@dataclass(frozen=True)
class _Append:
    """What an append leaves of the document that it was planned on.

    Attributes:
        pieces: that stay; of the last of them ``last_tokens``.
        revision: of the document; another one means that it was changed meanwhile.
    """

    pieces: int
    last_tokens: int
    revision: int


@dataclass
class _Document:
    """A document on its way: what was given of it, and its new pieces by digest, each with its tokens."""

    namespace: str
    new: NewDocument
    metadata: str
    tokens: int
    whole: bytes
    pieces: list[tuple[bytes, int]] = field(default_factory=list)
    append: _Append | None = None

    @property
    def name(self) -> str:
        return self.new.name


class Adder:
    """Adds documents to a store, one batch of pieces and one data file at a time.

    Memory: the document at hand, a batch of pieces to encode (some for each worker), and a data file's worth of encoded
    ones.

    Args:
        progress: told after every piece.
        stream: nobody knows how many documents come; else there is one, and it says how many tokens.
        workers: who encodes, see ``workers``; they are called once there is something to encode.

    Raises:
        StoreError: workers that mean nothing.
    """

    def __init__(
        self, room: Room, progress: Report | None = None, *, stream: bool, workers: int | str | Workers = 1
    ) -> None:
        workers_from(workers)
        self._workers = workers
        self._team: Team | None = None
        self._room = room
        self._layout: Layout = room.layout
        self._progress = progress
        self._stream = stream
        self._total: int | None = None
        self._done = 0
        self._name = ""
        self._to_encode: dict[bytes, _Piece] = {}
        self._waiting: list[_Piece] = []
        self._waiting_tokens = 0
        self._encoded_bytes = 0
        self._encoded: dict[bytes, _Piece] = {}
        self._documents: list[_Document] = []
        self._pinned: set[int] = set()
        self._last_commit = clock.monotonic()

    def __enter__(self) -> Adder:
        self._room.pinned.append(self._pinned)
        return self

    def __exit__(self, *_: object) -> None:
        if self._team is not None:
            self._team.close()
        self._room.pinned[:] = [each for each in self._room.pinned if each is not self._pinned]

    def add(self, namespace: str, new: NewDocument) -> Iterator[Receipt]:
        """Take a document; receipts come for those that are committed by now, in order.

        Raises:
            StoreError: another text has this name; nothing was encoded.
        """
        check_names(namespace, new)
        tokens = tokens_of(new.name, new.text, new.ids, self._room.tokenizer, begin=True)
        metadata = metadata_text(new.metadata, new.name)
        document = _Document(namespace, replace(new, text=None, ids=None), metadata, len(tokens), tokens.digest())
        with self._room.catalog.snapshot() as snapshot:
            _status(snapshot, document)  # refused before any work
        yield from self._take(document, tokens)

    def append(self, namespace: str, new: NewDocument) -> Iterator[Receipt]:
        """Take more of a document; the last segment, if it was short, is encoded again together with it."""
        segment = self._layout.segment_tokens
        with self._room.guard, self._room.catalog.snapshot() as snapshot:
            row = find_live(snapshot, namespace, new.name)
            if row is None:
                raise StoreError(f"namespace {namespace!r} has no document {new.name!r} to append to; add it first")
            more = tokens_of(new.name, new.text, new.ids, self._room.tokenizer, begin=False)
            pieces = snapshot.pieces(row)
            last = Tokens.from_row(snapshot.text(pieces[-1].content))
            if (last.text is None) != (more.text is None):
                raise StoreError(
                    f"document {new.name!r} was added as {'token ids' if last.text is None else 'text'}; "
                    f"append {'ids=' if last.text is None else 'text'} to it"
                )
            whole = pieces[-1].tokens // segment * segment
            tail = last.slice(whole, pieces[-1].tokens) if whole < pieces[-1].tokens else Tokens(last.ids[:0])
            if whole:
                append = _Append(len(pieces), whole, row.revision)
            else:
                append = _Append(len(pieces) - 1, pieces[-2].tokens if len(pieces) > 1 else 0, row.revision)
            self._pinned.update(piece.content for piece in pieces)
        document = _Document(namespace, new, row.metadata, row.tokens + len(more), b"", append=append)
        yield from self._take(document, joined([tail, more]) if len(tail) else more)

    def finish(self) -> Iterator[Receipt]:
        """Encode and commit all that was taken."""
        yield from self._encode(everything=True)
        yield from self._commit()

    # encoding

    def _take(self, document: _Document, tokens: Tokens) -> Iterator[Receipt]:
        self._name = document.name
        if not self._stream:
            self._total = len(tokens)
        for piece in cut(tokens, self._layout.piece_tokens):
            digest = piece.digest()
            document.pieces.append((digest, len(piece)))
            if digest in self._encoded or digest in self._to_encode or self._has(digest):
                self._say(len(piece))
                continue
            self._to_encode[digest] = _Piece(digest, piece)
            self._waiting.append(self._to_encode[digest])
            self._waiting_tokens += len(piece)
            if self._waiting_tokens >= self._layout.piece_tokens:
                yield from self._encode()
        self._documents.append(document)
        if len(self._documents) >= COMMIT_DOCUMENTS and self._is_there(self._documents[0]):
            yield from self._commit()

    def _has(self, digest: bytes) -> bool:
        """Whether the catalog has this content; then it stays, as long as this goes on."""
        with self._room.guard, self._room.catalog.snapshot() as snapshot:
            row = snapshot.content_by_digest(digest)
            if row is not None:
                self._pinned.add(row.id)
        return row is not None

    def _encode(self, *, everything: bool = False) -> Iterator[Receipt]:
        """Hand over the pieces that wait; take what comes back, and with ``everything`` all of it."""
        if self._waiting:
            if self._team is None:
                self._team = team_of(self._workers, self._room.encoding())
            self._team.submit([(piece.digest, piece.tokens.ids) for piece in self._waiting])
            self._waiting.clear()
            self._waiting_tokens = 0
        if self._team is None:
            return
        for digest, chunks in self._team.finished(everything=everything):
            piece = self._encoded[digest] = self._to_encode.pop(digest)
            piece.chunks = chunks
            self._encoded_bytes += piece.size
            failpoint("add.encoded")
            self._say(len(piece.tokens))
            late = clock.monotonic() - self._last_commit > COMMIT_SECONDS
            if late or self._encoded_bytes >= FILE_BYTES:
                yield from self._commit()

    def _say(self, tokens: int) -> None:
        self._done += tokens
        if self._progress is not None:
            self._progress(Progress("encode", self._done, self._total, "tokens", self._name))

    # committing

    def _commit(self) -> Iterator[Receipt]:
        """Write what is encoded, and the documents whose pieces are then all there."""
        ready = 0
        while ready < len(self._documents) and self._is_there(self._documents[ready]):
            ready += 1
        if ready or self._encoded:
            with self._room.guard:
                receipts = self._write(self._documents[:ready])
            self._encoded.clear()
            self._encoded_bytes = 0
            del self._documents[:ready]
            self._last_commit = clock.monotonic()
            yield from receipts

    def _is_there(self, document: _Document) -> bool:
        """Whether all of a document is encoded."""
        return not any(digest in self._to_encode for digest, _ in document.pieces)

    def _write(self, documents: list[_Document]) -> list[Receipt]:
        room, placed = self._room, list[str]()
        fresh = [piece for piece in self._encoded.values() if not self._has(piece.digest)]
        if not fresh:
            with room.catalog.snapshot() as snapshot:
                plans = [_status(snapshot, document) for document in documents]
            if all(status == "unchanged" for status, _ in plans):
                return [_receipt("unchanged", row, self._layout, row.tokens) for _, row in plans if row is not None]
        try:
            files = []
            for group in _groups(fresh):
                placed.append(new_id())
                parts = [piece.chunks for piece in group if piece.chunks is not None]
                files.append((write_file(room.staging, room.segments, placed[-1], parts, self._layout), group))
                failpoint("add.placed")
            with room.catalog.transaction() as tx:
                for file, group in files:
                    tx.insert(file)
                    self._pinned.update(_insert_contents(tx, file, group))
                receipts = [_insert_document(tx, document, self._layout) for document in documents]
        except BaseException:
            room.discard(placed)
            raise
        failpoint("add.committed")
        if any(document.append is not None for document in documents):
            failpoint("append.committed")
        return receipts


def _groups(pieces: list[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces that go into one data file."""
    group: list[_Piece] = []
    filled = 0
    for piece in pieces:
        if group and filled + piece.size > FILE_BYTES:
            yield group
            group, filled = [], 0
        group.append(piece)
        filled += piece.size
    if group:
        yield group


def _insert_contents(tx: Transaction, file: FileRow, group: list[_Piece]) -> Iterator[int]:
    first = 0
    for piece in group:
        assert piece.chunks is not None
        number = tx.next_id("contents")
        tx.insert(ContentRow(number, piece.digest, len(piece.tokens), len(piece.chunks), file.id, first))
        tx.insert(piece.tokens.row(number, piece.chunks.records()))
        first += len(piece.chunks)
        yield number


def _status(snapshot: Snapshot, document: _Document) -> tuple[Status, DocumentRow | None]:
    """What becomes of a document, and the row that has its name now, expired or not.

    Raises:
        StoreError: the name belongs to another text, or the document to append to has changed.
    """
    row, new = snapshot.find(document.namespace, document.name), document.new
    if document.append is not None:
        if row is None or row.revision != document.append.revision:
            raise StoreError(f"document {document.name!r} was changed by something else meanwhile; append again")
        return "appended", row
    if row is None or is_expired(row):
        return "added", row
    if _same(snapshot, row, document):
        if new.expires == row.expires or (new.expires is None and not new.replace):
            return "unchanged", row
        return "updated", row
    if not new.replace:
        raise StoreError(
            f"namespace {document.namespace!r} has another document {document.name!r} (another text, source, metadata "
            "or time); choose another name, or replace it (replace=True, `--replace`)"
        )
    return "replaced", row


def _same(snapshot: Snapshot, row: DocumentRow, document: _Document) -> bool:
    """Whether all but the expiry is as given."""
    new = document.new
    if (row.tokens, row.source, row.metadata) != (document.tokens, new.source, document.metadata):
        return False
    return new.time in (None, row.added) and whole_document(snapshot, row).digest() == document.whole


def _insert_document(tx: Transaction, document: _Document, layout: Layout) -> Receipt:
    status, old = _status(tx, document)
    if status == "unchanged" or status == "updated":
        assert old is not None
        row = old if status == "unchanged" else old._replace(expires=document.new.expires)
        if row != old:
            tx.replace(old, row)
        return _receipt(status, row, layout, row.tokens)
    contents = [(_content(tx, document, digest), tokens) for digest, tokens in document.pieces]
    reused = sum(tokens for content, tokens in contents if tx.holds(document.namespace, content))
    kept: list[PieceRow] = []
    if document.append is not None:
        assert old is not None
        kept, reused = _cut_back(tx, old, document.append), old.tokens
        row = old._replace(tokens=document.tokens, pieces=len(kept) + len(contents), revision=old.revision + 1)
        tx.replace(old, row)
    else:
        if old is not None:
            delete_document(tx, old)
        new = document.new
        row = DocumentRow(
            id=tx.next_id("documents"),
            namespace=document.namespace,
            name=document.name,
            source=new.source,
            metadata=document.metadata,
            added=clock.time() if new.time is None else float(new.time),
            expires=None if new.expires is None else float(new.expires),
            tokens=document.tokens,
            pieces=len(contents),
            revision=1 if old is None or status == "added" else old.revision + 1,
        )
        tx.insert(row)
    first = sum(piece.tokens for piece in kept)
    for ordinal, (content, tokens) in enumerate(contents, len(kept)):
        tx.insert(PieceRow(row.id, ordinal, content, first, tokens))
        first += tokens
    return _receipt(status, row, layout, reused)


def _content(tx: Transaction, document: _Document, digest: bytes) -> int:
    row = tx.content_by_digest(digest)
    if row is None:
        raise StoreDamaged(
            f"catalog.sqlite: a content of document {document.name!r} vanished; run `longmem memory verify`"
        )
    return row.id


def _cut_back(tx: Transaction, row: DocumentRow, append: _Append) -> list[PieceRow]:
    """Leave what stays of a document: its whole segments."""
    pieces = tx.pieces(row)
    for piece in pieces[append.pieces :]:
        tx.delete(piece)
    kept = pieces[: append.pieces]
    if kept and kept[-1].tokens != append.last_tokens:
        shorter = kept[-1]._replace(tokens=append.last_tokens)
        tx.replace(kept[-1], shorter)
        kept[-1] = shorter
    return kept


def _receipt(status: Status, row: DocumentRow, layout: Layout, reused: int) -> Receipt:
    return Receipt(row.namespace, row.name, status, row.tokens, layout.chunks(row.tokens), reused, row.revision)
