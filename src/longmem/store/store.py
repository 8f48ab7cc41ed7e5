"""``MemoryStore``: memory that lasts."""

from __future__ import annotations

import time as clock
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import NDArray

from longmem.data.tokens import check_tokenizer
from longmem.errors import StoreError
from longmem.store.adding import Receipt, add, append
from longmem.store.bank import StoreBank
from longmem.store.catalog import CATALOG, Catalog, DocumentInfo, Selection
from longmem.store.disk import LOCK, Dtype, Report, file_errors
from longmem.store.encode import Encoder, NewDocument, name_of, new_layout
from longmem.store.upkeep import CompactReport, VerifyReport, compact, export, import_archive, verify

Ids = Sequence[int] | NDArray[Any] | torch.Tensor
Mode = Literal["write", "read"]


@dataclass(frozen=True)
class Stats:
    """How much there is; for one namespace as if it shared nothing with others."""

    namespaces: int  # 1 for one
    documents: int  # that can be found now, as are tokens and chunks
    tokens: int
    chunks: int
    expired: int  # documents past their time, still on disk
    stored_bytes: int  # of the chunks of these documents in data files
    file_bytes: int | None = None  # on disk, as is the catalog; None for one namespace
    catalog_bytes: int | None = None
    dead_tokens: int | None = None  # on disk until the next compact; None for one namespace


class MemoryStore:
    """Documents of many namespaces as keys and values of a frozen backbone, on disk; open one with ``open``.

    A namespace sees nothing of another one. Whatever a method changes is changed wholly or not at all, also if the
    process is killed or the power fails at any moment (on a disk that keeps what ``fsync`` was told). One process
    writes at a time; any number read, each with a consistent view, also while it writes. Threads may share an open
    store and its banks.

    Names of namespaces and documents are kept composed (Unicode NFC), and asked for in either form.

    Every method may raise StoreDamaged (a file is not what was written) and, where it writes, StoreFull (no room, or
    read-only; the store is as it was before).

    Attributes:
        path: its folder, absolute.
        layout: what is fixed for the whole store: backbone, layers, sizes, number format.
        model: that it was opened with.
    """

    def __init__(self, catalog: Catalog, encoder: Encoder) -> None:
        self.catalog, self.encoder = catalog, encoder
        self.path, self.layout, self.model = catalog.folder, catalog.layout, encoder.model

    # opening and closing

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        model: Any = None,
        tokenizer: Any = None,
        mode: Mode = "write",
        create: bool = True,
        dtype: Dtype | None = None,
        chunk_size: int | None = None,
        segment_tokens: int | None = None,
    ) -> MemoryStore:
        """Open a store, or make one. Takes the same time at any size.

        Args:
            path: its folder.
            model: a LongMem, MemTRM or TrainingFree over the backbone whose keys and values are kept. Without it
                nothing can be encoded, but documents can be listed, shown, forgotten, compacted and verified.
            tokenizer: a fast one of transformers; None loads that of the model's backbone when a text is first given.
            mode: ``write``, or ``read``: changes nothing, works in a read-only folder and beside a writer.
            create: make a store where there is none (needs ``model``).
            dtype: of stored keys and values in a new store: ``float16`` (by default), ``bfloat16``, ``float32`` or
                ``int8``.
            chunk_size: S of a new store; by default the model's.
            segment_tokens: T of a new store, tokens that the backbone sees together; by default its window, at most
                1024.

        Raises:
            StoreLocked: another process writes to it; names the process.
            StoreDamaged: it is not what was written.
            StoreError: there is none, it belongs to another backbone or has other settings, or another version wrote
                it.
        """
        folder, writable = Path(path).absolute(), mode == "write"
        given: dict[str, Any] = {"dtype": dtype, "chunk_size": chunk_size, "segment_tokens": segment_tokens}
        if mode not in ("write", "read"):
            raise StoreError(f"mode ({mode!r}) must be 'write' or 'read'")
        if model is not None and not hasattr(model, "memory_layers"):
            loaded = "LongMem.from_pretrained(...), or TrainingFree.from_backbone(...) for any other"
            raise StoreError(f"model (a {type(model).__name__}) must be a loaded model that reads memory: {loaded}")
        if tokenizer is not None and not hasattr(tokenizer, "vocab_size"):
            way_out = "AutoTokenizer.from_pretrained(...)"
            raise StoreError(f"tokenizer (a {type(tokenizer).__name__}) must be a loaded tokenizer: {way_out}")
        if not (folder / CATALOG).exists():
            _check_new(folder, model, writable and create)
        new = new_layout(model, **given) if writable and create and model is not None else None
        catalog = Catalog(folder, writable=writable, new=new)
        try:
            for name, value in given.items():
                if value is not None and value != getattr(catalog.layout, name):
                    raise StoreError(
                        f"{folder}: this store was made with {name}={getattr(catalog.layout, name)}, not {value}; "
                        f"leave {name} away, or make another store"
                    )
            encoder = Encoder(model, catalog.layout, tokenizer)
            if model is not None:
                _check_model(folder, encoder, model)
                if tokenizer is not None:
                    check_tokenizer(tokenizer, model, way_out="open the store with the model's own")
        except BaseException:
            catalog.close()
            raise
        return cls(catalog, encoder)

    def close(self) -> None:
        """Close it and its banks; others may write then."""
        self.catalog.close()

    def __enter__(self) -> MemoryStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def tokenizer(self) -> Any:
        """The tokenizer given, or that of the model's backbone; None where there is none."""
        return self.encoder.find_tokenizer()

    # adding

    def add_document(
        self,
        namespace: str,
        text: str | None = None,
        *,
        name: str,
        source: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        time: float | None = None,
        expires: float | None = None,
        ids: Ids | None = None,
        replace: bool = False,
        progress: Report | None = None,
    ) -> Receipt:
        """Remember a text; the same document again changes nothing.

        A long document is committed in pieces that no reader sees before the last one; an interrupted add, called
        again, goes on where it stopped.

        Args:
            text: to remember; or ``ids``, token ids as they are.
            name, source, metadata, time, expires, replace: see ``NewDocument``.
            progress: told after every piece; an exception that it raises ends the add.

        Raises:
            StoreError: another text has this name, or the text or a setting cannot be used; nothing was changed.
        """
        new = NewDocument(name, text, ids, source, metadata, time, expires, replace)
        (receipt,) = self.add_documents(namespace, [new], progress=progress)
        return receipt

    def add_documents(
        self,
        namespace: str,
        documents: Iterable[NewDocument],
        *,
        workers: int | str = 1,
        progress: Report | None = None,
    ) -> Iterator[Receipt]:
        """Remember many documents, as a stream: memory does not grow with their number.

        Small documents share batches and transactions: receipts come in bursts, in order, each once its document is
        durable. Where it is interrupted, documents with a receipt are there, and adding all again goes on.

        Args:
            workers: processes that encode, each with a backbone of its own; ``"ray"`` or ``"ray:N"`` for a Ray
                cluster. The result is the same.

        Raises:
            StoreError: see ``add_document``; documents before the one at fault may be there. A worker that was killed.
        """
        return add(self.catalog, self.encoder, namespace, documents, progress, workers)

    def append(
        self,
        namespace: str,
        text: str | None = None,
        *,
        name: str,
        ids: Ids | None = None,
        progress: Report | None = None,
    ) -> Receipt:
        """Remember more of a document: its token ids are then the old ones and the new ones, as if added at once.

        Args:
            text: where the document was added as text; else ``ids``.

        Raises:
            StoreError: there is no such document, or text and ids do not fit together.
        """
        return append(self.catalog, self.encoder, namespace, NewDocument(name, text, ids), progress)

    # forgetting

    def forget(
        self,
        namespace: str,
        *,
        name: str | None = None,
        where: Mapping[str, Any] | None = None,
        before: float | None = None,
        everything: bool = False,
    ) -> list[DocumentInfo]:
        """Forget documents: no search of any process finds them from now on; ``compact`` removes their bytes.

        Args:
            name, where, before: all that are given must hold; see ``Selection``.
            everything: the whole namespace.

        Returns:
            what was forgotten.

        Raises:
            StoreError: no condition, or no document of that name.
        """
        if name is None and not where and before is None and not everything:
            raise StoreError("forget needs to know what: a name, where, before, or everything; nothing was forgotten")
        selection = Selection(None if name is None else [name], where, before=before)
        with self.catalog.writing(), self.catalog.write() as db:
            found = self.catalog.documents(namespace, selection, expired=True)
            db.executemany("DELETE FROM document WHERE id = ?", [(each.id,) for each in found])
        return found

    def compact(self, *, progress: Report | None = None) -> CompactReport:
        """Remove from the disk what was forgotten or has expired. Needs room for what stays once more, for a while.

        Raises:
            StoreDamaged: something that is needed is damaged; nothing is lost. Repair first.
        """
        return compact(self.catalog, progress)

    def verify(self, *, repair: bool = False, progress: Report | None = None) -> VerifyReport:
        """Compare every byte in use with what was written.

        Args:
            repair: encode damaged pieces again from their token ids, which needs the model and a store opened to write.

        Returns:
            all problems; damage does not raise.

        Raises:
            StoreError: repair of a store opened to read.
        """
        return verify(self.catalog, self.encoder, repair=repair, progress=progress)

    # moving

    def export(
        self, namespace: str, path: str | Path, names: Sequence[str] | None = None, *, progress: Report | None = None
    ) -> list[DocumentInfo]:
        """Write documents with their keys and values into one tar file, which replaces what is there, or nothing.

        Args:
            names: of the documents; None is all of the namespace.

        Raises:
            StoreError: there are none.
        """
        return export(self.catalog, namespace, Path(path).absolute(), names, progress)

    def import_(
        self, path: str | Path, namespace: str | None = None, *, progress: Report | None = None
    ) -> list[Receipt]:
        """Take over what ``export`` wrote, of this version or of format 1, all or nothing, without the model.

        The tensors are believed: whoever made the file decides what this text looks like here, also to others who add
        the same text later. Import only files of stores that you trust.

        Args:
            namespace: to import into; None is the one that was exported.

        Raises:
            StoreError: another backbone or layout, another document of a name that is taken, or a damaged file.
        """
        return import_archive(self.catalog, self.encoder, Path(path).absolute(), namespace, progress)

    # looking

    def namespaces(self) -> list[str]:
        """Those with documents that can be found now, sorted."""
        query = "SELECT DISTINCT namespace FROM document WHERE expires IS NULL OR expires > ? ORDER BY namespace"
        with self.catalog.read() as db:
            return [row[0] for row in db.execute(query, (clock.time(),))]

    def documents(self, namespace: str, where: Mapping[str, Any] | None = None) -> list[DocumentInfo]:
        """Documents of a namespace that can be found now, by time and number; ``where``: with this metadata."""
        return self.catalog.documents(namespace, Selection(where=where))

    def has(self, namespace: str, name: str) -> bool:
        """Whether there is a document of this name."""
        found = self.catalog.find(namespace, name)
        return found is not None and not found.expired(clock.time())

    def document(self, namespace: str, name: str) -> DocumentInfo:
        """One document; StoreError if there is none of that name."""
        return self.catalog.live(namespace, name)

    def text(self, namespace: str, name: str) -> str:
        """The text of a document; of one that was added as token ids, what they decode to.

        Raises:
            StoreError: there is none of that name, or there is no tokenizer to decode its token ids.
        """
        with self.catalog.read():
            tokens = self.catalog.whole(self.document(namespace, name))
        return tokens.spelled(self.tokenizer)

    def token_ids(self, namespace: str, name: str) -> NDArray[Any]:
        """The token ids of a document, (tokens,) uint32."""
        with self.catalog.read():
            return self.catalog.whole(self.document(namespace, name)).ids

    def stats(self, namespace: str | None = None) -> Stats:
        """How much there is, in a namespace (as if it shared nothing) or in the whole store."""
        now = clock.time()
        with self.catalog.read() as db:
            every = self.catalog.documents(namespace, expired=True)
            found = [each for each in every if not each.expired(now)]
            chunks, whole = sum(each.chunks for each in found), list[int]()
            if namespace is None:
                dead = "SELECT total(tokens) FROM piece WHERE id NOT IN (SELECT piece FROM part)"
                whole = [*self.catalog.sizes(), int(db.execute(dead).fetchone()[0])]
        return Stats(
            len({each.namespace for each in found}),
            len(found),
            sum(each.tokens for each in found),
            chunks,
            len(every) - len(found),
            chunks * self.layout.chunk_bytes,
            *whole,
        )

    # searching

    def bank(self, namespace: str, **settings: Any) -> StoreBank:
        """What a model searches: ``model(ids, memory=store.bank("alice"))``; read-only.

        Args:
            **settings: see ``StoreBank``: ``documents``, ``where``, ``after``, ``before``, ``device``, ``index``.
        """
        return StoreBank(self, namespace, **settings)


def _check_new(folder: Path, model: Any, create: bool) -> None:
    """Raises StoreError where no store can be made in a folder without a catalog."""
    with file_errors(folder, "listing"):  # a file is no folder
        held = sorted(each.name for each in folder.iterdir()) if folder.exists() else []
    if others := [name for name in held if name != LOCK and not name.startswith(CATALOG)]:
        way_out = f"restore {CATALOG} if it is a store's, or name an empty or new folder"
        raise StoreError(f"{folder}: no memory store, and it holds other files ({others[0]}); {way_out}")
    if not create:
        raise StoreError(f"{folder}: no memory store here; check the path; the first text that is added makes one")
    if model is None:
        raise StoreError(f"{folder}: a new store needs the model whose memory it is to hold; open it with model=")


def _check_model(folder: Path, encoder: Encoder, model: Any) -> None:
    """Raises StoreError where the model's backbone or layers are others than the store's; names both."""
    layout, sizes = encoder.layout, (model.memory_layers, model.memory_heads, model.memory_head_dim)
    if encoder.accepts(layout.fingerprint) and sizes == (layout.memory_layers, layout.heads_kv, layout.head_dim):
        return
    ours, theirs = (", ".join(map(str, layers)) for layers in (layout.memory_layers, model.memory_layers))
    raise StoreError(
        f"{folder}: written by backbone {layout.backbone} ({layout.fingerprint}, layers {ours}), this model is "
        f"{name_of(model)} ({model.fingerprint}, layers {theirs}); keys of one mean nothing to the other: use the "
        "store's own backbone, or make another store"
    )
