"""``MemoryStore``: memory that lasts."""

from __future__ import annotations

import math
import time as clock
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray

from longmem.errors import StoreError
from longmem.store.adding import Adder
from longmem.store.archive import export, import_archive
from longmem.store.bank import StoreBank
from longmem.store.catalog import matches
from longmem.store.encode import Encodes
from longmem.store.records import (
    CompactReport,
    DocumentInfo,
    Dtype,
    ForgetReport,
    Layout,
    NewDocument,
    Receipt,
    Report,
    Stats,
    VerifyReport,
)
from longmem.store.room import Mode, Room, composed, open_room
from longmem.store.upkeep import compact, file_bytes, forget, verify

if TYPE_CHECKING:
    from longmem.store.passages import SearchHit

Ids = Sequence[int] | NDArray[Any] | torch.Tensor


class MemoryStore:
    """Documents of many namespaces as keys and values of a frozen backbone, on disk; open one with ``open``.

    A namespace sees nothing of another one. Whatever a method changes is changed wholly or not at all, also if the
    process is killed or the power fails at any moment (on a disk that keeps what ``fsync`` was told). One process
    writes at a time; any number read, each with a consistent view, also while it writes. Threads may share an open
    store and its banks.

    Names of namespaces and documents are kept composed (Unicode NFC), and asked for in either form.

    Every method may raise StoreDamaged (a file is not what was written) and, where it writes, StoreFull (no room, or
    read-only; the store is as it was before).
    """

    def __init__(self, room: Room) -> None:
        self.room = room

    # opening and closing

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        model: Encodes | None = None,
        tokenizer: Any = None,
        mode: Mode = "write",
        create: bool = True,
        dtype: Dtype | None = None,
        chunk_size: int | None = None,
        segment_tokens: int | None = None,
        batch_tokens: int | None = None,
    ) -> MemoryStore:
        """Open a store, or make one. Takes the same time at any size.

        Args:
            path: its folder; a relative one is resolved now.
            model: over the backbone whose keys and values are kept. Without it nothing can be encoded, but documents
                can be listed, shown, searched by a model of the caller, forgotten, compacted and verified.
            tokenizer: a fast one of transformers; None loads that of the model's backbone when a text is first given.
            mode: ``write``, or ``read``: changes nothing, works in a read-only folder and beside a writer.
            create: make a store where there is none (needs ``model``).
            dtype: of stored keys and values in a new store: ``float16`` (by default), ``bfloat16``, ``float32`` or
                ``int8``.
            chunk_size: S of a new store; by default the model's.
            segment_tokens: T of a new store, tokens that the backbone sees together; by default its window, at most
                1024.
            batch_tokens: tokens that go through the backbone together, about; by default by device.

        Raises:
            StoreLocked: another process writes to it; names the process.
            StoreDamaged: it is not what was written.
            StoreError: there is none, it belongs to another backbone or has other settings, or another version wrote
                it.
        """
        given = {"dtype": dtype, "chunk_size": chunk_size, "segment_tokens": segment_tokens}
        return cls(open_room(Path(path).absolute(), model, tokenizer, mode, create, batch_tokens, given))

    def close(self) -> None:
        """Close it and its banks; others may write then."""
        with self.room.guard:
            try:
                self.room.catalog.close()
            finally:
                if self.room.lock is not None:
                    self.room.lock.release()

    def __enter__(self) -> MemoryStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """The store's folder, absolute."""
        return self.room.folder

    @property
    def layout(self) -> Layout:
        """What is fixed for the whole store: backbone, layers, sizes, number format."""
        return self.room.layout

    @property
    def model(self) -> Encodes | None:
        """The model that the store was opened with."""
        return None if self.room.encoder is None else self.room.encoder.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer given, or that of the model's backbone; None where there is none."""
        return self.room.find_tokenizer()

    @property
    def writable(self) -> bool:
        """Whether it was opened to write."""
        return self.room.lock is not None

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
            name: unique in the namespace.
            source, metadata, time, expires, replace: see ``NewDocument``.
            progress: told after every piece; an exception that it raises ends the add.

        Raises:
            StoreError: another text has this name, or the text or a setting cannot be used; nothing was changed.
        """
        new = NewDocument(name, text, ids, source, metadata, time, expires, replace)
        return Adder(self.room, progress).add_one(namespace, new)

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
            progress: told after every batch; an exception that it raises ends the add.

        Raises:
            StoreError: see ``add_document``; documents before the one at fault may be there. A worker that was killed.
        """
        return Adder(self.room, progress, workers).add(namespace, documents)

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
        return Adder(self.room, progress).add_one(namespace, NewDocument(name, text, ids), append=True)

    # forgetting

    def forget(
        self,
        namespace: str,
        *,
        name: str | None = None,
        where: Mapping[str, Any] | None = None,
        older_than: float | None = None,
        before: float | None = None,
        everything: bool = False,
    ) -> ForgetReport:
        """Forget documents: no search of any process finds them from now on; ``compact`` removes their bytes.

        All conditions given must hold. Other namespaces are not touched, whatever they share.

        Args:
            name: of one document.
            where: metadata that they have: every key with an equal value.
            older_than: seconds since their time, at least.
            before: their time is before this moment, seconds since the epoch.
            everything: the whole namespace.

        Raises:
            StoreError: no condition, or no document of that name.
        """
        if name is None and not where and older_than is None and before is None and not everything:
            raise StoreError(
                "forget needs to know what: name=, where=, older_than=, before=, or everything=True; "
                "nothing was forgotten"
            )
        if older_than is not None:
            before = min(clock.time() - older_than, math.inf if before is None else before)
        return forget(self.room, namespace, name, where, before)

    def compact(self, *, progress: Report | None = None) -> CompactReport:
        """Remove from the disk what was forgotten or has expired. Needs room for what stays once more, for a while.

        Raises:
            StoreDamaged: something that is needed is damaged; nothing is lost. Repair first.
        """
        return compact(self.room, progress)

    def verify(self, *, repair: bool = False, progress: Report | None = None) -> VerifyReport:
        """Compare every byte in use with what was written.

        Args:
            repair: encode damaged pieces again from their token ids, which needs the model and a store opened to write.

        Returns:
            all problems; damage does not raise.

        Raises:
            StoreError: repair of a store opened to read.
        """
        return verify(self.room, repair=repair, progress=progress)

    # moving

    def export(
        self, namespace: str, path: str | Path, names: Sequence[str] | None = None, *, progress: Report | None = None
    ) -> list[DocumentInfo]:
        """Write documents with their keys and values into one tar file, whole or not at all.

        Args:
            path: of the file; what is there is replaced.
            names: of the documents; None is all of the namespace.

        Raises:
            StoreError: there are none.
        """
        return export(self.room, namespace, Path(path).absolute(), names, progress)

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
        return import_archive(self.room, Path(path).absolute(), namespace, progress)

    # looking

    def namespaces(self) -> list[str]:
        """Those with documents that can be found now, sorted."""
        query = "SELECT DISTINCT namespace FROM document WHERE expires IS NULL OR expires > ? ORDER BY namespace"
        with self.room.catalog.read() as db:
            return [row[0] for row in db.execute(query, (clock.time(),))]

    def documents(self, namespace: str, where: Mapping[str, Any] | None = None) -> list[DocumentInfo]:
        """Documents of a namespace that can be found now, by time and number; an unknown namespace has none.

        Args:
            where: metadata that they have: every key with an equal value.
        """
        return [each for each in self.room.catalog.documents(composed(namespace)) if matches(each, where)]

    def document(self, namespace: str, name: str) -> DocumentInfo:
        """One document.

        Raises:
            StoreError: there is none of that name.
        """
        return self.room.catalog.live(composed(namespace), composed(name))

    def text(self, namespace: str, name: str) -> str:
        """The text of a document; of one that was added as token ids, what they decode to.

        Raises:
            StoreError: there is none of that name, or there is no tokenizer to decode its token ids.
        """
        with self.room.catalog.read():
            tokens = self.room.catalog.whole(self.document(namespace, name))
        if tokens.text is None and self.tokenizer is None:
            raise StoreError(f"document {name!r} was added as token ids; open the store with tokenizer= to see text")
        return tokens.spelled(self.tokenizer)

    def token_ids(self, namespace: str, name: str) -> NDArray[Any]:
        """The token ids of a document, (tokens,) uint32."""
        with self.room.catalog.read():
            return self.room.catalog.whole(self.document(namespace, name)).ids

    def stats(self, namespace: str | None = None) -> Stats:
        """How much there is, in a namespace (as if it shared nothing) or in the whole store."""
        catalog, now = self.room.catalog, clock.time()
        with catalog.read():
            every = catalog.documents(None if namespace is None else composed(namespace), expired=True)
            found = [each for each in every if not each.expired(now)]
            chunks = sum(each.chunks for each in found)
            whole = namespace is None
            return Stats(
                namespaces=len({each.namespace for each in found}),
                documents=len(found),
                tokens=sum(each.tokens for each in found),
                chunks=chunks,
                expired=len(every) - len(found),
                stored_bytes=chunks * self.layout.chunk_bytes,
                file_bytes=file_bytes(self.room) if whole else None,
                catalog_bytes=catalog.disk_bytes if whole else None,
                dead_tokens=catalog.dead_tokens() if whole else None,
            )

    # searching

    def bank(self, namespace: str | Sequence[str], **settings: Any) -> StoreBank:
        """What a model searches: ``model(ids, memory=store.bank("alice"))``; read-only.

        Args:
            namespace: one, or one for each row of a batch.
            **settings: see ``StoreBank``: ``documents``, ``where``, ``after``, ``before``, ``max_tokens``, ``device``,
                ``keep``, ``index``.
        """
        return StoreBank(self, [namespace] if isinstance(namespace, str) else list(namespace), **settings)

    def search(self, namespace: str, text: str, *, top: int = 10, **settings: Any) -> list[SearchHit]:
        """The passages of a namespace that the model's heads find for a text, best first; needs the model.

        Args:
            top: how many.
            **settings: which documents, see ``StoreBank``.
        """
        return self.bank(namespace, **settings).search_text(text, top=top)
