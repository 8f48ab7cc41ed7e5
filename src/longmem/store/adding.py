"""Adding documents: pieces that are not there yet are encoded, written and committed as they come, a document with its
last piece. No reader sees half of one, and an add that was interrupted finds its pieces again.
"""

from __future__ import annotations

import json
import sqlite3
import time as clock
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from longmem.errors import StoreError
from longmem.store.catalog import insert
from longmem.store.disk import StoredChunks, append
from longmem.store.encode import Ids, Tokens, cut, joined_tokens, tokens_of
from longmem.store.records import DocumentInfo, NewDocument, Progress, Receipt, Report, Status
from longmem.store.room import Room, check_names, composed
from longmem.store.workers import Team

COMMIT_BYTES = 64 << 20
COMMIT_SECONDS = 30.0
"""An interruption costs at most the encoding of about so long."""
BATCH_DOCUMENTS = 1024
Pieces = Sequence[tuple[int | None, int]]  # number in the catalog, and how many of its tokens


@dataclass(frozen=True)
class _Append:
    """What an append leaves of the document."""

    pieces: int  # the first ones
    last_tokens: int  # of the last of them
    revision: int  # of the document that this was planned on


@dataclass
class _Document:
    """A document on its way."""

    namespace: str
    new: NewDocument  # as given, without text and ids
    metadata: str  # JSON
    tokens: int  # in it when it is written
    digest: bytes  # of the whole; unused by an append
    append: _Append | None = None
    pieces: list[tuple[bytes, int]] = field(default_factory=list)  # its new ones, digest and tokens


@dataclass
class _Batch:
    """Pieces to encode, and the documents that are complete with them."""

    pieces: dict[bytes, Tokens] = field(default_factory=dict)
    documents: list[_Document] = field(default_factory=list)
    tokens: int = 0  # those of known pieces, too
    name: str = ""


class Adder:
    """Adds documents to a store; holds a few batches and up to 64 MiB of encoded pieces.

    Args:
        progress: told after every batch.
        workers: who encodes, see ``workers.Team``.

    Raises:
        StoreError: workers that mean nothing, or a store opened to read.
    """

    def __init__(self, room: Room, progress: Report | None = None, workers: int | str = 1) -> None:
        room.writing()
        self._room, self._progress = room, progress
        self._team = Team(workers, room.encoder_needed, room.encoding)
        self._pinned: set[int] = set()
        self._coming: set[bytes] = set()  # pieces that are being encoded
        self._done = 0
        self._total: int | None = None

    def add(self, namespace: str, documents: Iterable[NewDocument]) -> Iterator[Receipt]:
        """Add documents; a receipt comes when its document is durable. See ``MemoryStore.add_documents``."""
        return self._run(self._plan(composed(namespace), new) for new in documents)

    def add_one(self, namespace: str, new: NewDocument, *, append: bool = False) -> Receipt:
        """Add a document or, with ``append``, to one; the number of tokens to read is the total of the progress."""
        plan = (self._plan_append if append else self._plan)(composed(namespace), new)
        self._total = len(plan[1])
        return list(self._run(iter([plan])))[-1]

    # planning

    def _plan(self, namespace: str, new: NewDocument) -> tuple[_Document, Tokens]:
        new = replace(new, name=composed(new.name))
        check_names(namespace, new)
        tokens = self._tokens(new, begin=True)
        metadata = metadata_text(new.metadata, new.name)
        plan = _Document(namespace, replace(new, text=None, ids=None), metadata, len(tokens), tokens.digest())
        with self._room.catalog.read():
            self._status(plan)  # refused before any work
        return plan, tokens

    def _plan_append(self, namespace: str, new: NewDocument) -> tuple[_Document, Tokens]:
        """The last segment, if it is short, is encoded again together with what is new."""
        new, size, catalog = replace(new, name=composed(new.name)), self._room.layout.segment_tokens, self._room.catalog
        more = self._tokens(new, begin=False)
        with self._room.guard, catalog.read():
            document = catalog.live(namespace, new.name)
            parts = catalog.parts(document.id)
            last = catalog.tokens(parts[-1].piece)
            if (last.text is None) != (more.text is None):
                raise StoreError(
                    f"document {new.name!r} was added as {'token ids' if last.text is None else 'text'}; "
                    f"append {'ids=' if last.text is None else 'text'} to it"
                )
            whole = parts[-1].tokens // size * size
            tail = last.slice(whole, parts[-1].tokens)
            if whole:
                kept = _Append(len(parts), whole, document.revision)
            else:
                kept = _Append(len(parts) - 1, parts[-2].tokens if len(parts) > 1 else 0, document.revision)
            self._pinned.update(part.piece for part in parts)
        plan = _Document(namespace, replace(new, text=None, ids=None), "", document.tokens + len(more), b"", kept)
        return plan, joined_tokens([tail, more]) if whole < parts[-1].tokens else more

    def _tokens(self, new: NewDocument, *, begin: bool) -> Tokens:
        tokenizer = None if new.text is None else self._room.find_tokenizer(needed=True)
        tokens = tokens_of(new.name, new.text, new.ids, tokenizer, begin=begin)
        if self._room.encoder is not None:
            self._room.encoder.check_ids(new.name, tokens.ids)
        return tokens

    def _batches(self, planned: Iterator[tuple[_Document, Tokens]]) -> Iterator[_Batch]:
        batch, size = _Batch(), self._room.layout.piece_tokens
        for document, tokens in planned:
            batch.name = document.new.name
            for piece in cut(tokens, size):
                digest = piece.digest()
                document.pieces.append((digest, len(piece)))
                batch.tokens += len(piece)
                if digest not in self._coming and self._known(digest) is None:
                    self._coming.add(digest)
                    batch.pieces[digest] = piece
                    if sum(map(len, batch.pieces.values())) >= size:
                        yield batch
                        batch = _Batch(name=document.new.name)
            batch.documents.append(document)
            if len(batch.documents) >= BATCH_DOCUMENTS:
                yield batch
                batch = _Batch()
        if batch.documents or batch.pieces:
            yield batch

    def _known(self, digest: bytes) -> int | None:
        """The piece in the catalog; it stays there as long as this add goes on."""
        with self._room.guard:
            piece = self._room.catalog.piece_of(digest)
            if piece is not None:
                self._pinned.add(piece)
            return piece

    # encoding and committing

    def _run(self, planned: Iterator[tuple[_Document, Tokens]]) -> Iterator[Receipt]:
        self._room.pinned.append(self._pinned)
        ready: list[tuple[_Batch, list[StoredChunks]]] = []
        held, last = 0, clock.monotonic()
        try:
            for batch, chunks in self._team.encode(self._batches(planned), _ids_of):
                ready.append((batch, chunks))
                held += sum(run.nbytes for run in chunks)
                self._say(batch)
                if held >= COMMIT_BYTES or clock.monotonic() - last > COMMIT_SECONDS:
                    yield from self._commit(ready)
                    ready, held, last = [], 0, clock.monotonic()
            yield from self._commit(ready)
        finally:
            self._team.close()
            self._room.pinned[:] = [each for each in self._room.pinned if each is not self._pinned]

    def _say(self, batch: _Batch) -> None:
        self._done += batch.tokens
        if self._progress is not None:
            self._progress(Progress("encode", self._done, self._total, "tokens", batch.name))

    def _commit(self, ready: list[tuple[_Batch, list[StoredChunks]]]) -> list[Receipt]:
        """Write what is encoded, and the documents that are complete with it."""
        documents = [document for batch, _ in ready for document in batch.documents]
        made = [
            (digest, tokens, run)
            for batch, chunks in ready
            for (digest, tokens), run in zip(batch.pieces.items(), chunks, strict=True)
        ]
        with self._room.guard:
            # another thread may have been sooner
            receipts = self._write([each for each in made if self._known(each[0]) is None], documents)
        self._coming.difference_update(digest for digest, _, _ in made)
        return receipts

    def _write(self, fresh: list[tuple[bytes, Tokens, StoredChunks]], documents: list[_Document]) -> list[Receipt]:
        room = self._room
        with room.catalog.read():
            generation, first = room.catalog.meta("generation"), room.catalog.meta("records")
        if fresh:
            append(room.folder, room.layout, generation, first, [run for _, _, run in fresh])
        added = []
        with room.catalog.write() as db:
            for digest, tokens, run in fresh:
                added.append(insert_piece(db, digest, tokens, first, len(run), run.crc()))
                first += len(run)
            if fresh:
                db.execute("UPDATE meta SET value = ? WHERE key = 'records'", (first,))
            receipts = [self._insert(db, document) for document in documents]
        self._pinned.update(added)
        return receipts

    # documents in the catalog

    def _status(self, document: _Document) -> tuple[Status, DocumentInfo | None]:
        """What becomes of a document, and the one that has its name now, expired or not.

        Raises:
            StoreError: the name belongs to another text, or the document to append to has changed.
        """
        new = document.new
        old = self._room.catalog.find(document.namespace, new.name)
        if document.append is not None:
            if old is None or old.revision != document.append.revision:
                raise StoreError(f"document {new.name!r} was changed by something else meanwhile; append again")
            return "appended", old
        if old is None or old.expired(clock.time()):
            return "added", old
        if self._same(old, document):
            kept = new.expires == old.expires or (new.expires is None and not new.replace)
            return "unchanged" if kept else "updated", old
        if not new.replace:
            raise StoreError(
                f"namespace {document.namespace!r} has another document {new.name!r} (another text, source, metadata "
                "or time); choose another name, or replace it (replace=True, `--replace`)"
            )
        return "replaced", old

    def _same(self, old: DocumentInfo, document: _Document) -> bool:
        """Whether all but the expiry is as given."""
        given = (document.tokens, document.new.source, document.metadata)
        if (old.tokens, old.source, metadata_text(old.metadata, old.name)) != given:
            return False
        return document.new.time in (None, old.added) and self._room.catalog.whole(old).digest() == document.digest

    def _insert(self, db: sqlite3.Connection, document: _Document) -> Receipt:
        status, old = self._status(document)
        new, chunks = document.new, self._room.layout.chunks(document.tokens)
        if status in ("unchanged", "updated"):
            assert old is not None
            if status == "updated":
                db.execute("UPDATE document SET expires = ? WHERE id = ?", (new.expires, old.id))
            return Receipt(old.namespace, old.name, status, old.tokens, old.chunks, old.tokens, old.revision)
        pieces = [(self._room.catalog.piece_of(digest), tokens) for digest, tokens in document.pieces]
        if document.append is not None:
            assert old is not None
            revision, reused = old.revision + 1, old.tokens
            insert_parts(db, old.id, pieces, *_cut_back(db, old.id, document.append))
            db.execute("UPDATE document SET tokens = ?, revision = ? WHERE id = ?", (document.tokens, revision, old.id))
        else:
            revision = 1 if old is None or status == "added" else old.revision + 1
            new = replace(new, time=clock.time() if new.time is None else new.time)
            given = (document.namespace, new, document.metadata, document.tokens, revision)
            reused = insert_document(db, *given, pieces)
        return Receipt(document.namespace, new.name, status, document.tokens, chunks, reused, revision)


def _ids_of(batch: _Batch) -> list[Ids]:
    return [tokens.ids for tokens in batch.pieces.values()]


def _cut_back(db: sqlite3.Connection, document: int, kept: _Append) -> tuple[int, int]:
    """Leave the whole segments of a document; number and offset of its next part."""
    db.execute("DELETE FROM part WHERE document = ? AND ordinal >= ?", (document, kept.pieces))
    if not kept.pieces:
        return 0, 0
    key = (document, kept.pieces - 1)
    db.execute("UPDATE part SET tokens = ? WHERE document = ? AND ordinal = ?", (kept.last_tokens, *key))
    first = db.execute("SELECT first_token FROM part WHERE document = ? AND ordinal = ?", key).fetchone()[0]
    return kept.pieces, first + kept.last_tokens


def insert_piece(db: sqlite3.Connection, digest: bytes, tokens: Tokens, first: int, count: int, crc: int) -> int:
    """A piece whose ``count`` chunks are the records from ``first`` on; its number."""
    columns = tokens.columns()
    return insert(db, "piece", digest=digest, tokens=len(tokens), first=first, count=count, crc=crc, **columns)


def insert_document(
    db: sqlite3.Connection,
    namespace: str,
    new: NewDocument,
    metadata: str,
    tokens: int,
    revision: int,
    pieces: Pieces,
) -> int:
    """A document in the place of what has its name; how many of its tokens the namespace had already."""
    query = "SELECT 1 FROM part JOIN document ON document.id = part.document WHERE piece = ? AND namespace = ? LIMIT 1"
    reused = sum(count for piece, count in pieces if db.execute(query, (piece, namespace)).fetchone())
    db.execute("DELETE FROM document WHERE namespace = ? AND name = ?", (namespace, new.name))
    about = {"namespace": namespace, "name": new.name, "source": new.source, "metadata": metadata}
    times = {"added": new.time, "expires": new.expires}  # the columns make floats of them
    insert_parts(db, insert(db, "document", **about, **times, tokens=tokens, revision=revision), pieces)
    return reused


def insert_parts(
    db: sqlite3.Connection,
    document: int,
    pieces: Pieces,
    ordinal: int = 0,
    first_token: int = 0,
) -> None:
    """Parts of a document."""
    for piece, tokens in pieces:
        db.execute("INSERT INTO part VALUES (?, ?, ?, ?, ?)", (document, ordinal, piece, first_token, tokens))
        ordinal, first_token = ordinal + 1, first_token + tokens


def metadata_text(metadata: Mapping[str, Any] | None, name: str) -> str:
    """Metadata as the catalog keeps it.

    Raises:
        StoreError: it is no JSON object.
    """
    try:
        text = json.dumps(dict(metadata or {}), sort_keys=True, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        message = f"metadata of {name!r} must be a JSON object ({error}); use strings, numbers, lists"
        raise StoreError(message) from error
    return text
