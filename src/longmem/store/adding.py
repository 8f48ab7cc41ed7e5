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
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from longmem.errors import LongMemError, StoreError
from longmem.store.catalog import Catalog, DocumentInfo, composed
from longmem.store.disk import Layout, Progress, Report, StoredChunks, append_chunks
from longmem.store.encode import Encoder, Ids, NewDocument, Tokens, joined_tokens, metadata_text

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
    metadata: str  # JSON
    tokens: int  # in it when it is written
    digest: bytes  # of the whole; unused by an append
    pieces: list[tuple[bytes, int]] = field(default_factory=list)  # its new ones: digest, and how many of its tokens
    revision: int = 1  # of a new document
    onto: DocumentInfo | None = None  # the document that is appended to, as it was then
    kept: list[tuple[int, int]] = field(default_factory=list)  # what stays of it: pieces, and how many tokens of each


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
    new, size, namespace = replace(new, name=composed(new.name)), catalog.layout.segment_tokens, composed(namespace)
    tokens = encoder.tokens(new, begin=False)
    with catalog.read():
        document = catalog.live(namespace, new.name)
        kept = [(part.piece, part.tokens) for part in catalog.parts(document.id)]
        piece, used = kept.pop()
        last, whole = catalog.tokens(piece), used // size * size
    if (last.text is None) != (tokens.text is None):
        was, way_out = ("token ids", "ids=") if last.text is None else ("text", "text")
        raise StoreError(f"document {new.name!r} was added as {was}; append {way_out} to it")
    if whole:
        kept.append((piece, whole))
    if whole < used:
        tokens = joined_tokens([last.slice(whole, used), tokens])
    length = sum(count for _, count in kept) + len(tokens)
    plan = Planned(namespace, NewDocument(new.name), "", length, b"", onto=document, kept=kept)
    (receipt,) = _added(catalog, encoder, iter([(plan, tokens)]), progress, 1)
    return receipt


def _planned(catalog: Catalog, encoder: Encoder, namespace: str, new: NewDocument) -> tuple[Planned, Tokens]:
    new = replace(new, name=composed(new.name))
    new.check(namespace)
    tokens, metadata = encoder.tokens(new), metadata_text(new.metadata, new.name)
    plan = Planned(namespace, replace(new, text=None, ids=None), metadata, len(tokens), tokens.digest())
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
    batches = _batches(catalog, planned, pinned)
    ids = ((batch, [tokens.ids for tokens in batch.pieces.values()]) for batch in batches)
    try:
        with closing(encoded(encoder, ids, workers)) as made:
            for batch, chunks in made:
                done += batch.tokens
                if progress is not None:
                    progress(Progress("encode", done, None, "tokens", batch.name))
                yield from commit(catalog, pinned, list(batch.pieces.values()), chunks, batch.documents)
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
    pinned: set[int],
    pieces: Sequence[Tokens],
    chunks: Sequence[StoredChunks],
    documents: Iterable[Planned],
) -> list[Receipt]:
    """Write pieces with their chunks, and the documents that are complete with them; durable when this returns."""
    with catalog.writing():
        made = [pair for pair in zip(pieces, chunks, strict=True) if known(catalog, pair[0].digest(), pinned) is None]
        generation, first = catalog.end()
        if made:
            append_chunks(catalog.folder, catalog.layout, generation, first, [run for _, run in made])
        return enter(catalog, first, [(tokens, len(run), run.crc()) for tokens, run in made], documents, pinned)


def enter(
    catalog: Catalog,
    first: int,
    pieces: Sequence[tuple[Tokens, int, int]],
    documents: Iterable[Planned],
    pinned: set[int],
) -> list[Receipt]:
    """One transaction: pieces whose chunks are the records from ``first`` on, each given with the number of its chunks
    and their check sum, and documents that are complete with them.
    """
    with catalog.write() as db:
        for tokens, count, crc in pieces:
            starts = None if tokens.starts is None else tokens.starts.astype("<u4").tobytes()
            words = (tokens.ids.astype("<u4").tobytes(), tokens.text, starts)
            row = (None, tokens.digest(), len(tokens), first, count, crc, *words)
            pinned.add(_insert(db, "piece", row))
            first += count
        if pieces:
            db.execute("UPDATE meta SET value = ? WHERE key = 'records'", (first,))
        return [_write_document(catalog, db, pinned, document) for document in documents]


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
    given = (plan.tokens, new.source, plan.metadata, old.added if new.time is None else new.time)
    same = (old.tokens, old.source, metadata_text(old.metadata, old.name), old.added) == given
    if same and catalog.whole(old).digest() == plan.digest:
        kept = new.expires == old.expires or (new.expires is None and not new.replace)
        return "unchanged" if kept else "updated", old
    if not new.replace:
        raise StoreError(
            f"namespace {plan.namespace!r} has another document {new.name!r} (another text, source, metadata "
            f"or time); {way_out}"
        )
    return "replaced", old


def _write_document(catalog: Catalog, db: sqlite3.Connection, pinned: set[int], plan: Planned) -> Receipt:
    """Bring a document into the catalog, where its pieces are."""
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
        row = (plan.namespace, new.name, new.source, plan.metadata, added, new.expires, tokens, revision)
        number = _insert(db, "document", (None, *row))
    first_token = 0
    pieces = [*plan.kept, *((known(catalog, digest, pinned), count) for digest, count in plan.pieces)]
    for ordinal, (piece, count) in enumerate(pieces):
        db.execute("INSERT INTO part VALUES (?, ?, ?, ?, ?)", (number, ordinal, piece, first_token, count))
        first_token += count
    return Receipt(plan.namespace, new.name, status, tokens, catalog.layout.chunks(tokens), revision)


def _insert(db: sqlite3.Connection, table: str, row: tuple[Any, ...]) -> int:
    """Insert the columns of a row, in the order of the schema; its number."""
    number = db.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row).lastrowid
    assert number is not None
    return number


# who encodes

Batch = TypeVar("Batch")
Chunks = list[StoredChunks]  # of a batch of pieces
Wait = Callable[[], Chunks]


def encoded(
    encoder: Encoder, batches: Iterator[tuple[Batch, list[Ids]]], workers: int | str
) -> Generator[tuple[Batch, Chunks], None, None]:
    """Every batch, given with its pieces, with their chunks, in order.

    Args:
        workers: processes on this machine, ``ray``, or ``ray:N`` for so many actors of a Ray cluster; they start when
            there is something to encode.

    Raises:
        StoreError: a worker failed or was killed, a model that other processes cannot have, or Ray is not installed.
    """

    def send(pieces: list[Ids]) -> Wait:
        return partial(encoder.encode, pieces)

    ahead, under_way = 0, deque[tuple[Batch, Wait]]()
    with ExitStack() as ends:
        for batch, pieces in batches:
            if pieces and workers != 1 and not ahead:
                ahead, send = (_ray if isinstance(workers, str) else _processes)(encoder, workers, ends)  # type: ignore[assignment, arg-type]
            under_way.append((batch, send(pieces)))
            while len(under_way) > ahead:
                first, wait = under_way.popleft()
                yield first, wait()
        for first, wait in under_way:
            yield first, wait()


def _processes(encoder: Encoder, workers: int, ends: ExitStack) -> tuple[int, Callable[[list[Ids]], Wait]]:
    """How many batches are under way at a time, and what sends one."""
    folder = ends.enter_context(tempfile.TemporaryDirectory(prefix="longmem-"))
    recipe = _Recipe.of(encoder, folder, max(1, torch.get_num_threads() // workers))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    ends.callback(pool.shutdown, cancel_futures=True)

    @_worker_errors()
    def send(pieces: list[Ids]) -> Wait:
        return _worker_errors()(pool.submit(_encode, recipe, pieces).result)

    return 2 * workers, send


def _ray(encoder: Encoder, workers: str, ends: ExitStack) -> tuple[int, Callable[[list[Ids]], Wait]]:
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

    @_worker_errors()
    def send(pieces: list[Ids]) -> Wait:
        return _worker_errors()(partial(ray.get, next(turns).encode.remote(pieces)))

    return 2 * count, send


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
        model: Any = encoder.needed()
        backbone: Any = getattr(getattr(model, "backbone", None), "model", None)
        if not hasattr(backbone, "save_pretrained"):
            raise StoreError(f"a {type(model).__name__} cannot be given to other processes; use workers=1")
        backbone.save_pretrained(folder)
        attention, device = getattr(backbone.config, "_attn_implementation", None), str(model.device.type)
        return cls(folder, backbone.dtype, attention, device, threads, encoder.layout)


@cache
def _encoder(recipe: _Recipe) -> Encoder:
    """In the other process; loads at the first batch, so that an error of loading reaches the writer."""
    from longmem.modeling.baselines import TrainingFree
    from longmem.modeling.loading import load_backbone

    torch.set_num_threads(recipe.threads)
    settings = {} if recipe.attention is None else {"attn_implementation": recipe.attention}
    loaded = load_backbone(recipe.folder, None, recipe.dtype, **settings)
    model: Any = TrainingFree.from_backbone(loaded, memory_layers=recipe.layout.memory_layers)
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


def _encode(recipe: _Recipe, pieces: list[Ids]) -> Chunks:
    return _encoder(recipe).encode(pieces)


class _Actor:
    """A worker on another machine: the backbone's files come along."""

    def __init__(self, recipe: _Recipe, files: dict[str, bytes]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="longmem-")
        for name, data in files.items():
            (Path(self._folder.name) / name).write_bytes(data)
        self._recipe = recipe._replace(folder=self._folder.name)

    def encode(self, pieces: list[Ids]) -> Chunks:
        return _encode(self._recipe, pieces)
