"""Adding documents: pieces that are not there yet are encoded, written and committed as they come, a document with its
last piece. No reader sees half of one, and an add that was interrupted finds its pieces again.

Who encodes is this process, several on this machine (``ProcessPoolExecutor``), or actors of a Ray cluster. A worker is
given the backbone as ``save_pretrained`` writes it, so that it has the writer's weights wherever they came from; the
fingerprint is compared. Batches come back in order: the store does not depend on who encoded what.
"""

from __future__ import annotations

import multiprocessing
import re
import sqlite3
import tempfile
import time as clock
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from longmem.errors import LongMemError, StoreError
from longmem.store.catalog import Catalog, DocumentInfo
from longmem.store.disk import Layout, Progress, Report, StoredChunks, append_chunks
from longmem.store.encode import Encoder, Ids, NewDocument, Tokens, composed, joined_tokens, metadata_text

BATCH_DOCUMENTS = 1024
"""At most, in a batch, which else is full with the tokens of a piece; each is committed by itself."""
Status = Literal["added", "replaced", "appended", "updated", "unchanged"]


@dataclass(frozen=True)
class Receipt:
    """What became of a document."""

    namespace: str
    name: str
    status: Status  # ``updated``: the same text with another expiry
    tokens: int  # in the document now
    chunks: int
    revision: int


@dataclass
class Planned:
    """A document on its way into the catalog."""

    namespace: str
    new: NewDocument  # as given, without text and ids
    tokens: int  # in it when it is written
    digest: bytes  # of the whole; unused by an append
    pieces: list[tuple[bytes, int]] = field(default_factory=list)  # digest, and how many of its tokens
    revision: int = 1  # of a new document
    onto: DocumentInfo | None = None  # the document that is appended to, as it was then


@dataclass
class _Batch:
    """Pieces to encode, and the documents that are complete with them."""

    pieces: dict[bytes, Tokens] = field(default_factory=dict)
    documents: list[Planned] = field(default_factory=list)
    tokens: int = 0  # those of known pieces, too
    name: str = ""


def add(
    catalog: Catalog,
    encoder: Encoder,
    namespace: str,
    documents: Iterable[NewDocument],
    progress: Report | None,
    workers: int | str,
) -> Iterator[Receipt]:
    """See ``MemoryStore.add_documents``."""
    catalog.writing()
    if not ((isinstance(workers, int) and workers > 0) or re.fullmatch(r"ray(:[1-9]\d*)?", str(workers))):
        raise StoreError(f"workers ({workers!r}) must be a number from 1 on, 'ray' or 'ray:N'")
    planned = (_planned(catalog, encoder, composed(namespace), new) for new in documents)
    return _added(catalog, encoder, planned, progress, workers)


def append(catalog: Catalog, encoder: Encoder, namespace: str, new: NewDocument, progress: Report | None) -> Receipt:
    """See ``MemoryStore.append``. The last segment, if it is short, is encoded again together with what is new."""
    catalog.writing()
    size, namespace = catalog.layout.segment_tokens, composed(namespace)
    tokens = encoder.tokens(new, begin=False)
    with catalog.read():
        document = catalog.live(namespace, new.name)
        *kept, end = catalog.parts(document.id)
        last, whole = catalog.tokens(end.piece), end.tokens // size * size
    if (last.text is None) != (tokens.text is None):
        was = "token ids" if last.text is None else "text"
        raise StoreError(f"document {new.name!r} was added as {was}; append the same")
    if whole < end.tokens:
        tokens = joined_tokens([last.slice(whole, end.tokens), tokens])
    pieces = [(part.digest, part.tokens) for part in kept] + [(end.digest, whole)] * (whole > 0)
    length = end.first_token + whole + len(tokens)
    plan = Planned(namespace, NewDocument(new.name), length, b"", pieces, onto=document)
    (receipt,) = _added(catalog, encoder, iter([(plan, tokens)]), progress, 1)
    return receipt


def _planned(catalog: Catalog, encoder: Encoder, namespace: str, new: NewDocument) -> tuple[Planned, Tokens]:
    new.check(namespace)
    tokens = encoder.tokens(new)
    plan = Planned(namespace, replace(new, text=None, ids=None), len(tokens), tokens.digest())
    with catalog.read():
        status_of(catalog, plan)  # refused before any work
    return plan, tokens


def _added(
    catalog: Catalog,
    encoder: Encoder,
    planned: Iterator[tuple[Planned, Tokens]],
    progress: Report | None,
    workers: int | str,
) -> Iterator[Receipt]:
    """Encode and commit, batch by batch."""
    done, me, pinned = 0, object(), set[int]()
    catalog.pinned[me] = pinned
    try:
        with closing(_encoded(encoder, _batches(catalog, planned, pinned), workers)) as made:
            for batch, chunks in made:
                done += batch.tokens
                if progress is not None:
                    progress(Progress("encode", done, None, "tokens", batch.name))
                yield from commit(catalog, zip(batch.pieces.values(), chunks, strict=True), batch.documents, pinned)
    finally:
        del catalog.pinned[me]


def _batches(catalog: Catalog, planned: Iterator[tuple[Planned, Tokens]], pinned: set[int]) -> Iterator[_Batch]:
    batch, size, coming = _Batch(), catalog.layout.piece_tokens, set[bytes]()
    for document, tokens in planned:
        batch.name = document.new.name
        for start in range(0, len(tokens), size):
            piece = tokens.slice(start, start + size)
            digest = piece.digest()
            document.pieces.append((digest, len(piece)))
            batch.tokens += len(piece)
            if digest not in coming and known(catalog, digest, pinned) is None:
                coming.add(digest)
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


# documents and pieces in the catalog


def known(catalog: Catalog, digest: bytes, pinned: set[int]) -> int | None:
    """The piece in the catalog, where it then stays."""
    with catalog.writing():
        row = catalog.row("SELECT id FROM piece WHERE digest = ?", digest)
        pinned.update(row or ())
        return None if row is None else int(row[0])


def commit(
    catalog: Catalog,
    pieces: Iterable[tuple[Tokens, StoredChunks]],
    documents: Iterable[Planned],
    pinned: set[int],
) -> list[Receipt]:
    """Write pieces that are not there yet, and in one transaction the documents that are complete with them.

    All is durable when this returns.
    """
    rows: list[tuple[Any, ...]] = []

    def fresh() -> Iterator[StoredChunks]:
        place = first
        for tokens, chunks in pieces:
            if known(catalog, digest := tokens.digest(), pinned) is None:
                starts = None if tokens.starts is None else tokens.starts.astype("<u4").tobytes()
                words = (tokens.ids.astype("<u4").tobytes(), tokens.text, starts)
                rows.append((None, digest, len(tokens), place, len(chunks), chunks.crc(), *words))
                place += len(chunks)
                yield chunks

    with catalog.writing():
        generation, first = catalog.end()
        end = append_chunks(catalog.folder, catalog.layout, generation, first, fresh())
        with catalog.write() as db:
            pinned.update(_insert(db, "piece", row) for row in rows)
            if rows:
                db.execute("UPDATE meta SET value = ? WHERE key = 'records'", (end,))
            return [_write_document(catalog, db, document) for document in documents]


REPLACE = "choose another name, or replace it (replace=True, `--replace`)"


def status_of(catalog: Catalog, plan: Planned, way_out: str = REPLACE) -> tuple[Status, DocumentInfo | None]:
    """What becomes of a document, and the one that has its name now, expired or not.

    Raises StoreError where the name belongs to another text, or the document to append to has changed.
    """
    new, old = plan.new, catalog.find(plan.namespace, plan.new.name)
    if plan.onto is not None:
        if old is None or (old.id, old.revision) != (plan.onto.id, plan.onto.revision):
            raise StoreError(f"document {new.name!r} was changed by something else meanwhile; append again")
        return "appended", old
    if old is None or old.expired(clock.time()):
        return "added", old
    given = (plan.tokens, new.source, metadata_text(new.metadata), old.added if new.time is None else new.time)
    same = (old.tokens, old.source, metadata_text(old.metadata), old.added) == given
    if same and catalog.whole(old).digest() == plan.digest:
        kept = new.expires == old.expires or (new.expires is None and not new.replace)
        return "unchanged" if kept else "updated", old
    if not new.replace:
        raise StoreError(
            f"namespace {plan.namespace!r} has another document {new.name!r} (another text, source, metadata "
            f"or time); {way_out}"
        )
    return "replaced", old


def _write_document(catalog: Catalog, db: sqlite3.Connection, plan: Planned) -> Receipt:
    """Bring a document into the catalog, where its pieces are.

    Raises StoreError where these do not make the document, which only an archive can bring about.
    """
    status, old = status_of(catalog, plan)
    new, tokens, revision = plan.new, plan.tokens, plan.revision
    if old is not None and status in ("unchanged", "updated"):
        if status == "updated":
            db.execute("UPDATE document SET expires = ? WHERE id = ?", (new.expires, old.id))
        return Receipt(plan.namespace, new.name, status, old.tokens, old.chunks, old.revision)
    if old is not None and status != "added":
        revision = old.revision + 1
    if old is not None and status == "appended":
        number = old.id
        db.execute("DELETE FROM part WHERE document = ?", (number,))
        db.execute("UPDATE document SET tokens = ?, revision = ? WHERE id = ?", (tokens, revision, number))
    else:
        db.execute("DELETE FROM document WHERE namespace = ? AND name = ?", (plan.namespace, new.name))
        added = clock.time() if new.time is None else new.time
        about = (new.source, metadata_text(new.metadata), added, new.expires, tokens, revision)
        number = _insert(db, "document", (None, plan.namespace, new.name, *about))
    first_token, size, complete = 0, catalog.layout.segment_tokens, bool(plan.pieces)
    for ordinal, (digest, count) in enumerate(plan.pieces):
        piece, full = catalog.row("SELECT id, tokens FROM piece WHERE digest = ?", digest) or (None, 0)
        last = ordinal == len(plan.pieces) - 1
        if not (0 < count <= full and (count % size == 0 or (last and count == full))):
            complete = False
            break
        db.execute("INSERT INTO part VALUES (?, ?, ?, ?, ?)", (number, ordinal, piece, first_token, count))
        first_token += count
    if not complete or first_token != tokens:
        raise StoreError(f"document {new.name!r} of the archive is incomplete; nothing was imported")
    return Receipt(plan.namespace, new.name, status, tokens, catalog.layout.chunks(tokens), revision)


def _insert(db: sqlite3.Connection, table: str, row: tuple[Any, ...]) -> int:
    """Insert the columns of a row, in the order of the schema; its number."""
    number = db.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row).lastrowid
    assert number is not None
    return number


# who encodes

Submit = Callable[[list[Ids]], "Future[list[StoredChunks]]"]


def _encoded(
    encoder: Encoder, batches: Iterable[_Batch], workers: int | str
) -> Generator[tuple[_Batch, list[StoredChunks]], None, None]:
    """Every batch with the chunks of its pieces, in order.

    Args:
        workers: processes on this machine, ``ray``, or ``ray:N`` for so many actors of a Ray cluster; they start when
            there is something to encode.

    Raises:
        StoreError: a worker failed or was killed, or Ray is not installed.
    """
    submit: Submit | None = None
    ahead, under_way = 0, deque[tuple[_Batch, Any]]()
    with ExitStack() as ends:
        for batch in batches:
            ids = [tokens.ids for tokens in batch.pieces.values()]
            if workers == 1:
                yield batch, encoder.encode(ids)
                continue
            if ids and submit is None:
                start: Any = _ray if isinstance(workers, str) else _processes
                submit, ahead = start(encoder, workers, ends)
            with _worker_errors():
                under_way.append((batch, submit(ids) if ids and submit else None))
            while len(under_way) > ahead:
                yield _finished(*under_way.popleft())
        for each in under_way:
            yield _finished(*each)


@contextmanager
def _worker_errors() -> Iterator[None]:
    try:
        yield
    except LongMemError:
        raise
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[-1]
        raise StoreError(
            f"a worker failed or was killed ({type(error).__name__}: {line:.200}); what has a receipt is stored; "
            "add again to go on from there"
        ) from error


def _finished(batch: _Batch, future: Future[list[StoredChunks]] | None) -> tuple[_Batch, list[StoredChunks]]:
    with _worker_errors():
        return batch, [] if future is None else future.result()


def _processes(encoder: Encoder, workers: int, ends: ExitStack) -> tuple[Submit, int]:
    """What encodes pieces elsewhere, and how many batches to have under way."""
    folder = ends.enter_context(tempfile.TemporaryDirectory(prefix="longmem-"))
    recipe = _Recipe.of(encoder, folder, max(1, torch.get_num_threads() // workers))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    ends.callback(pool.shutdown, cancel_futures=True)
    return lambda pieces: pool.submit(_encode, recipe, pieces), 2 * workers


def _ray(encoder: Encoder, workers: str, ends: ExitStack) -> tuple[Submit, int]:
    """See ``_processes``."""
    try:
        import ray
    except ImportError as error:
        raise StoreError("workers='ray' needs the ray extra: pip install 'longmem-lm[ray]'") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
        ends.callback(ray.shutdown)
    count = int(workers[4:] or ray.cluster_resources().get("CPU", 1))
    with tempfile.TemporaryDirectory(prefix="longmem-") as folder:
        recipe = _Recipe.of(encoder, folder, 1)
        files = ray.put({path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()})
    gpus = 1 if recipe.device == "cuda" else 0
    kind = ray.remote(_Actor).options(num_cpus=1, num_gpus=gpus, max_restarts=3, max_task_retries=3)
    actors = [kind.remote(recipe, files) for _ in range(count)]
    ends.callback(lambda: [ray.kill(actor) for actor in actors])
    turns = cycle(actors)
    return lambda pieces: next(turns).encode.remote(pieces).future(), 2 * count


class _Recipe(NamedTuple):
    """What a worker needs to make an encoder like the writer's."""

    folder: str  # of the backbone
    dtype: torch.dtype
    attention: str | None
    device: str
    threads: int
    layout: Layout

    @classmethod
    def of(cls, encoder: Encoder, folder: str, threads: int) -> _Recipe:
        backbone = encoder.needed().backbone.model
        backbone.save_pretrained(folder)
        attention, device = backbone.config._attn_implementation, str(backbone.device.type)
        return cls(folder, backbone.dtype, attention, device, threads, encoder.layout)


@cache
def _encoder(recipe: _Recipe) -> Encoder:
    """In the other process; loads at the first batch, so that an error of loading reaches the writer."""
    from longmem.modeling.baselines import TrainingFree

    torch.set_num_threads(recipe.threads)
    settings: Any = {} if recipe.attention is None else {"attn_implementation": recipe.attention}
    settings |= {"dtype": recipe.dtype, "memory_layers": recipe.layout.memory_layers}
    model: Any = TrainingFree.from_backbone(recipe.folder, **settings)
    model.train(False)
    if recipe.device == "cuda":  # GPUs in turn; Ray shows each actor its own GPU alone
        number = sum(multiprocessing.current_process()._identity)
        model.to(torch.device("cuda", number % torch.cuda.device_count()))
    encoder = Encoder(model, recipe.layout)
    if not encoder.accepts(recipe.layout.fingerprint):
        raise StoreError(
            f"in a worker the backbone has another fingerprint ({model.fingerprint}) than the store's "
            f"({recipe.layout.fingerprint}); use workers=1"
        )
    return encoder


def _encode(recipe: _Recipe, pieces: list[Ids]) -> list[StoredChunks]:
    return _encoder(recipe).encode(pieces)


class _Actor:
    """A worker on another machine: the backbone's files come along."""

    def __init__(self, recipe: _Recipe, files: dict[str, bytes]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="longmem-")
        for name, data in files.items():
            (Path(self._folder.name) / name).write_bytes(data)
        self._recipe = recipe._replace(folder=self._folder.name)

    def encode(self, pieces: list[Ids]) -> list[StoredChunks]:
        return _encode(self._recipe, pieces)
