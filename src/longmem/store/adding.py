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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar

import torch

from longmem.errors import LongMemError, StoreError
from longmem.store.catalog import Catalog
from longmem.store.disk import StoredChunks, append
from longmem.store.encode import Encoder, Ids, Tokens, joined_tokens
from longmem.store.records import (
    DocumentInfo,
    Layout,
    NewDocument,
    Progress,
    Receipt,
    Report,
    Status,
    composed,
    metadata_text,
    no_document,
)

BATCH_DOCUMENTS = 1024
"""At most, in a batch, which else is full with the tokens of a piece; each is committed by itself."""


@dataclass
class Planned:
    """A document on its way into the catalog."""

    namespace: str
    new: NewDocument  # as given, without text and ids
    metadata: str  # JSON
    tokens: int  # in it when it is written
    digest: bytes  # of the whole; unused by an append
    pieces: list[tuple[bytes, int]] = field(default_factory=list)  # its new ones: digest, and how many of its tokens
    revision: int = 1  # of a new document; of an append, of the document that it was planned on
    kept: list[tuple[int, int]] | None = None  # what an append leaves: pieces, and how many of the tokens of each
    document: int = 0  # that an append was planned on


@dataclass
class _Batch:
    """Pieces to encode, and the documents that are complete with them."""

    pieces: dict[bytes, Tokens] = field(default_factory=dict)
    documents: list[Planned] = field(default_factory=list)
    tokens: int = 0  # those of known pieces, too
    name: str = ""


class Adder:
    """Adds documents to a store, batch by batch.

    Args:
        progress: told after every batch.
        workers: who encodes, see ``Team``.

    Raises:
        StoreError: workers that mean nothing, or a store opened to read.
    """

    def __init__(
        self, catalog: Catalog, encoder: Encoder, progress: Report | None = None, workers: int | str = 1
    ) -> None:
        catalog.writing()
        self._catalog, self._encoder, self._progress = catalog, encoder, progress
        self._team = Team(workers, encoder)
        self._total: int | None = None  # tokens to read, where that is known

    def add(self, namespace: str, documents: Iterable[NewDocument]) -> Iterator[Receipt]:
        """Add documents; a receipt comes when its document is durable. See ``MemoryStore.add_documents``."""
        return self._run(self._plan(composed(namespace), new) for new in documents)

    def add_one(self, namespace: str, new: NewDocument, *, append: bool = False) -> Receipt:
        """Add a document or, with ``append``, to one."""
        plan = (self._plan_append if append else self._plan)(composed(namespace), new)
        self._total = len(plan[1])
        return list(self._run(iter([plan])))[-1]

    # planning

    def _plan(self, namespace: str, new: NewDocument) -> tuple[Planned, Tokens]:
        new = replace(new, name=composed(new.name))
        new.check(namespace)
        tokens = self._encoder.tokens(new.name, new.text, new.ids)
        new, metadata = replace(new, text=None, ids=None), metadata_text(new.metadata, new.name)
        plan = Planned(namespace, new, metadata, len(tokens), tokens.digest())
        with self._catalog.read():
            status_of(self._catalog, plan)  # refused before any work
        return plan, tokens

    def _plan_append(self, namespace: str, new: NewDocument) -> tuple[Planned, Tokens]:
        """The last segment, if it is short, is encoded again together with what is new."""
        name, size, catalog = composed(new.name), self._catalog.layout.segment_tokens, self._catalog
        tokens = self._encoder.tokens(name, new.text, new.ids, begin=False)
        with catalog.read():
            document = catalog.live(namespace, name)
            kept = [(part.piece, part.tokens) for part in catalog.parts(document.id)]
            piece, used = kept.pop()
            last, whole = catalog.tokens(piece), used // size * size
        if (last.text is None) != (tokens.text is None):
            was, way_out = ("token ids", "ids=") if last.text is None else ("text", "text")
            raise StoreError(f"document {name!r} was added as {was}; append {way_out} to it")
        if whole:
            kept.append((piece, whole))
        if whole < used:
            tokens = joined_tokens([last.slice(whole, used), tokens])
        length = sum(count for _, count in kept) + len(tokens)
        plan = Planned(namespace, NewDocument(name), "", length, b"", [], document.revision, kept, document.id)
        return plan, tokens

    def _batches(self, planned: Iterator[tuple[Planned, Tokens]], pinned: set[int]) -> Iterator[_Batch]:
        batch, size, coming = _Batch(), self._catalog.layout.piece_tokens, set[bytes]()
        for document, tokens in planned:
            batch.name = document.new.name
            for start in range(0, len(tokens), size):
                piece = tokens.slice(start, start + size)
                digest = piece.digest()
                document.pieces.append((digest, len(piece)))
                batch.tokens += len(piece)
                if digest not in coming and known(self._catalog, digest, pinned) is None:
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

    def _run(self, planned: Iterator[tuple[Planned, Tokens]]) -> Iterator[Receipt]:
        done = 0
        with self._catalog.pinning() as pinned, closing(self._team):
            batches = self._batches(planned, pinned)
            ids = ((batch, [tokens.ids for tokens in batch.pieces.values()]) for batch in batches)
            for batch, chunks in self._team.encode(ids):
                done += batch.tokens
                if self._progress is not None:
                    self._progress(Progress("encode", done, self._total, "tokens", batch.name))
                yield from commit(self._catalog, pinned, batch.pieces, chunks, batch.documents)


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
    pieces: Mapping[bytes, Tokens],
    chunks: Sequence[StoredChunks],
    documents: Iterable[Planned],
) -> list[Receipt]:
    """Write pieces with their chunks, and the documents that are complete with them; durable when this returns."""
    with catalog.writing():
        made = dict(zip(pieces, chunks, strict=True))
        made = {digest: made[digest] for digest in made if known(catalog, digest, pinned) is None}  # not yet, of others
        with catalog.read():
            generation, first = catalog.meta("generation"), catalog.meta("records")
        if made:
            append(catalog.folder, catalog.layout, generation, first, list(made.values()))
        with catalog.write() as db:
            for digest, run in made.items():
                place = {"first": first, "count": len(run), "crc": run.crc()}
                about = {"digest": digest, "tokens": len(pieces[digest]), **pieces[digest].columns()}
                pinned.add(_insert(db, "piece", **about, **place))
                first += len(run)
            if made:
                db.execute("UPDATE meta SET value = ? WHERE key = 'records'", (first,))
            return [_write_document(catalog, db, pinned, document) for document in documents]


def status_of(catalog: Catalog, plan: Planned) -> tuple[Status, DocumentInfo | None]:
    """What becomes of a document, and the one that has its name now, expired or not.

    Raises:
        StoreError: the name belongs to another text, or the document to append to has changed.
    """
    new, old = plan.new, catalog.find(plan.namespace, plan.new.name)
    if plan.kept is not None:
        if old is None:
            raise no_document(plan.namespace, new.name)
        if (old.id, old.revision) != (plan.document, plan.revision):
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
            "or time); choose another name, or replace it (replace=True, `--replace`)"
        )
    return "replaced", old


def _write_document(catalog: Catalog, db: sqlite3.Connection, pinned: set[int], plan: Planned) -> Receipt:
    """Bring a document into the catalog, where its pieces are."""
    status, old = status_of(catalog, plan)
    new, space, tokens = plan.new, plan.namespace, plan.tokens
    if old is not None and status in ("unchanged", "updated"):
        if status == "updated":
            db.execute("UPDATE document SET expires = ? WHERE id = ?", (new.expires, old.id))
        return Receipt(space, new.name, status, old.tokens, old.chunks, old.tokens, old.revision)
    pieces = [*(plan.kept or []), *((known(catalog, digest, pinned), count) for digest, count in plan.pieces)]
    revision = plan.revision if old is None or status == "added" else old.revision + 1
    if old is not None and status == "appended":
        number, reused = old.id, old.tokens
        db.execute("DELETE FROM part WHERE document = ?", (number,))
        db.execute("UPDATE document SET tokens = ?, revision = ? WHERE id = ?", (tokens, revision, number))
    else:
        query = "SELECT 1 FROM part JOIN document ON document.id = document WHERE piece = ? AND namespace = ? LIMIT 1"
        reused = sum(count for piece, count in pieces if db.execute(query, (piece, space)).fetchone())
        db.execute("DELETE FROM document WHERE namespace = ? AND name = ?", (space, new.name))
        number = _insert(
            db,
            "document",
            namespace=space,
            name=new.name,
            source=new.source,
            metadata=plan.metadata,
            added=clock.time() if new.time is None else new.time,
            expires=new.expires,
            tokens=tokens,
            revision=revision,
        )
    first_token = 0
    for ordinal, (piece, count) in enumerate(pieces):
        db.execute("INSERT INTO part VALUES (?, ?, ?, ?, ?)", (number, ordinal, piece, first_token, count))
        first_token += count
    return Receipt(space, new.name, status, tokens, catalog.layout.chunks(tokens), reused, revision)


def _insert(db: sqlite3.Connection, table: str, **row: Any) -> int:
    places = ", ".join("?" * len(row))
    found = db.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({places})", tuple(row.values())).lastrowid
    assert found is not None
    return found


# who encodes

Batch = TypeVar("Batch")
Answer = TypeVar("Answer")
Chunks = list[StoredChunks]  # of a batch of pieces


class Team:
    """Encodes batches of pieces in order; starts when there is something to encode.

    Args:
        workers: processes on this machine, ``ray``, or ``ray:N`` for so many actors of a Ray cluster.
        encoder: that of this process.

    Raises:
        StoreError: it means nothing; when started, a model that other processes cannot have, or Ray is not installed.
    """

    def __init__(self, workers: int | str, encoder: Encoder) -> None:
        if not ((isinstance(workers, int) and workers > 0) or re.fullmatch(r"ray(:[1-9]\d*)?", str(workers))):
            raise StoreError(f"workers ({workers!r}) must be a number from 1 on, 'ray' or 'ray:N'")
        self._workers, self._encoder = workers, encoder
        self._send: Callable[[list[Ids]], Callable[[], Chunks]] | None = None
        self._ahead = 0  # batches that are under way while the next one is read
        self._open = ExitStack()

    def encode(self, batches: Iterator[tuple[Batch, list[Ids]]]) -> Iterator[tuple[Batch, Chunks]]:
        """Every batch, given with its pieces, with the chunks of these.

        Raises:
            StoreError: a worker failed, or was killed.
        """
        under_way: deque[tuple[Batch, Callable[[], Chunks]]] = deque()
        for batch, ids in batches:
            under_way.append((batch, self._begin(ids)))
            while len(under_way) > self._ahead:
                first, wait = under_way.popleft()
                yield first, _answered(wait)
        for batch, wait in under_way:
            yield batch, _answered(wait)

    def close(self) -> None:
        """End the workers."""
        self._open.close()

    def _begin(self, ids: list[Ids]) -> Callable[[], Chunks]:
        if not ids or self._workers == 1:
            chunks = self._encoder.encode(ids)
            return lambda: chunks
        if self._send is None:
            self._send = self._ray() if isinstance(self._workers, str) else self._processes(self._workers)
        send = self._send
        return _answered(lambda: send(ids))

    def _processes(self, workers: int) -> Callable[[list[Ids]], Callable[[], Chunks]]:
        folder = self._open.enter_context(tempfile.TemporaryDirectory(prefix="longmem-"))
        recipe = _Recipe.of(self._encoder, folder, max(1, torch.get_num_threads() // workers))
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
        self._open.callback(pool.shutdown, cancel_futures=True)
        self._ahead = 2 * workers
        return lambda ids: pool.submit(_encode, recipe, ids).result

    def _ray(self) -> Callable[[list[Ids]], Callable[[], Chunks]]:
        try:
            import ray
        except ImportError as error:
            raise StoreError("workers='ray' needs the ray extra: pip install 'longmem-lm[ray]'") from error
        if not ray.is_initialized():
            ray.init(log_to_driver=False)
            self._open.callback(ray.shutdown)
        count = int(str(self._workers)[4:] or ray.cluster_resources().get("CPU", 1))
        with tempfile.TemporaryDirectory(prefix="longmem-") as folder:
            recipe = _Recipe.of(self._encoder, folder, 1)
            files = ray.put({path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()})
        gpus = 1 if recipe.device == "cuda" else 0
        kind = ray.remote(_Actor).options(num_cpus=1, num_gpus=gpus, max_restarts=3, max_task_retries=3)
        actors = [kind.remote(recipe, files) for _ in range(count)]
        self._open.callback(lambda: [ray.kill(actor) for actor in actors])
        self._ahead, turns = 2 * count, cycle(actors)
        return lambda ids: partial(ray.get, next(turns).encode.remote(ids))


def _answered(call: Callable[[], Answer]) -> Answer:
    try:
        return call()
    except LongMemError:
        raise
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[-1]
        raise StoreError(
            f"a worker failed or was killed ({type(error).__name__}: {line:.200}); what has a receipt is stored; "
            "add again to go on from there"
        ) from error


@dataclass(frozen=True)
class _Recipe:
    """What a worker needs to make an encoder like the writer's."""

    folder: str  # of the backbone
    dtype: torch.dtype
    attention: str | None
    device: str
    threads: int
    layout: Layout
    batch_tokens: int

    @classmethod
    def of(cls, encoder: Encoder, folder: str, threads: int) -> _Recipe:
        model: Any = encoder.needed()
        backbone: Any = getattr(getattr(model, "backbone", None), "model", None)
        if not hasattr(backbone, "save_pretrained"):
            raise StoreError(f"a {type(model).__name__} cannot be given to other processes; use workers=1")
        backbone.save_pretrained(folder)
        attention, device = getattr(backbone.config, "_attn_implementation", None), str(model.device.type)
        return cls(folder, backbone.dtype, attention, device, threads, encoder.layout, encoder.batch_tokens)


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
    encoder = Encoder(model, recipe.layout, batch_tokens=recipe.batch_tokens)
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
        self._recipe = replace(recipe, folder=self._folder.name)

    def encode(self, pieces: list[Ids]) -> Chunks:
        return _encode(self._recipe, pieces)
