"""``MemoryStore``: memory that lasts."""

from __future__ import annotations

import time as clock
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray

from longmem.errors import DataError, StoreError
from longmem.store.adding import Adder
from longmem.store.compacting import compact, dead_tokens
from longmem.store.encode import Encodes
from longmem.store.exporting import export
from longmem.store.forgetting import forget
from longmem.store.importing import import_archive
from longmem.store.opening import Mode, open_room
from longmem.store.reading import Selection, select
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
from longmem.store.room import Room
from longmem.store.rows import find_live, info_of, whole_document
from longmem.store.schema import DocumentRow, FileRow
from longmem.store.segments import DataFile
from longmem.store.snapshot import Snapshot
from longmem.store.verifying import verify
from longmem.store.workers import Workers

if TYPE_CHECKING:
    from longmem.store.bank import StoreBank
    from longmem.store.passages import SearchHit

Ids = Sequence[int] | NDArray[Any] | torch.Tensor


class MemoryStore:
    """Documents of many namespaces as keys and values of a frozen backbone, on disk; open one with ``open``.

    A namespace sees nothing of another one. Whatever a method changes is changed wholly or not at all, also if the
    process is killed or the power fails at any moment (on a disk that keeps what ``fsync`` was told). One process
    writes at a time; any number read, each with a consistent view, also while it writes. A damaged byte gives an
    error, never a wrong answer. Methods may be called from several threads.

    Every method may raise StoreDamaged (files are not what was written) and, where it writes, StoreFull (no room, or
    read-only; the store is as it was before).
    """

    def __init__(self, room: Room) -> None:
        self._room = room

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
        check: bool = True,
    ) -> MemoryStore:
        """Open a store, or make one.

        Args:
            path: its folder.
            model: a ``LongMem`` over the backbone whose keys and values are kept. Without it nothing can be encoded,
                but documents can be listed, shown, searched by a model of the caller, forgotten, compacted and
                verified.
            tokenizer: a fast one of transformers; None loads that of the model's backbone when a text is first given.
            mode: ``write``, or ``read``: changes nothing, works in a read-only folder and beside a writer.
            create: make a store where there is none (needs ``model``).
            dtype: of stored keys and values in a new store: ``float16`` (by default), ``bfloat16``, ``float32`` or
                ``int8``.
            chunk_size: S of a new store; by default the model's.
            segment_tokens: T of a new store, tokens that the backbone sees together; by default its window, at most
                1024.
            batch_tokens: tokens that go through the backbone together, about; by default by device.
            check: refuse a catalog that is damaged; without, what can be read of it can be looked at and verified.

        Raises:
            StoreLocked: another process writes to it; names the process.
            StoreDamaged: it is not what was written.
            StoreError: there is none, it belongs to another backbone or has other settings, or a newer version wrote
                it.
        """
        return cls(
            open_room(
                path,
                model=model,
                tokenizer=tokenizer,
                mode=mode,
                create=create,
                dtype=dtype,
                chunk_size=chunk_size,
                segment_tokens=segment_tokens,
                batch_tokens=batch_tokens,
                check=check,
            )
        )

    def close(self) -> None:
        """Close; a writer seals the catalog and lets others write."""
        room = self._room
        with room.guard:
            try:
                room.catalog.close()
            finally:
                if room.lock is not None:
                    room.lock.release()

    def __enter__(self) -> MemoryStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """The store's folder."""
        return self._room.folder

    @property
    def layout(self) -> Layout:
        """What is fixed for the whole store: backbone, layer, sizes, number format."""
        return self._room.layout

    @property
    def model(self) -> Encodes | None:
        """The model that the store was opened with."""
        return None if self._room.encoder is None else self._room.encoder.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer given, or that of the model's backbone; None where there is none."""
        try:
            return self._room.find_tokenizer()
        except DataError:
            return None

    @property
    def writable(self) -> bool:
        """Whether it was opened to write."""
        return self._room.lock is not None

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

        A long document is committed in parts that nobody sees before the last one; an interrupted add, called again,
        goes on where it stopped.

        Args:
            text: to remember; or ``ids``, token ids as they are.
            name: unique in the namespace.
            source, metadata, time, expires, replace: see ``NewDocument``.
            progress: told after every piece; what it raises ends the add.

        Raises:
            StoreError: another text has this name, or the text or a setting cannot be used; nothing was changed.
        """
        new = NewDocument(name, text, ids, source, metadata, time, expires, replace)
        with Adder(self._ready(new), progress, stream=False) as adder:
            return [*adder.add(namespace, new), *adder.finish()][-1]

    def add_documents(
        self,
        namespace: str,
        documents: Iterable[NewDocument],
        *,
        workers: int | str | Workers = 1,
        progress: Report | None = None,
    ) -> Iterator[Receipt]:
        """Remember many documents, as a stream: memory does not grow with their number.

        Small documents share batches, data files and transactions: receipts come in bursts, in order, each once its
        document is durable. Where it is interrupted, documents with a receipt are there, and adding all again goes on.

        Args:
            workers: processes that encode, this one among them, each with a backbone of its own; ``"ray"`` or
                ``"ray:N"`` for a Ray cluster; ``Ranks`` under torchrun. The result is the same.
            progress: told after every piece; what it raises ends the add.

        Raises:
            StoreError: see ``add_document``; documents before the one at fault may be there. A worker that was killed.
        """
        self._ready(None)
        with Adder(self._room, progress, stream=True, workers=workers) as adder:
            for new in documents:
                self._ready(new)
                yield from adder.add(namespace, new)
            yield from adder.finish()

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
        new = NewDocument(name, text, ids)
        with Adder(self._ready(new), progress, stream=False) as adder:
            return [*adder.append(namespace, new), *adder.finish()][-1]

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
            before: their time lies before this moment, seconds since the epoch.
            everything: the whole namespace.

        Returns:
            what was forgotten, as names and hashes; ``verify(absent=report)`` checks that it is gone.

        Raises:
            StoreError: no condition, or no document of that name.
        """
        self._writing()
        return forget(
            self._room, namespace, name=name, where=where, older_than=older_than, before=before, everything=everything
        )

    def compact(self, *, progress: Report | None = None) -> CompactReport:
        """Remove from the disk what was forgotten or has expired, and join small data files.

        Raises:
            StoreDamaged: something that is needed is damaged; nothing that is still referred to is lost. Repair first.
        """
        self._writing()
        return compact(self._room, progress)

    def verify(
        self,
        *,
        repair: bool = False,
        absent: ForgetReport | None = None,
        absent_text: str | None = None,
        progress: Report | None = None,
    ) -> VerifyReport:
        """Compare every byte with what was written.

        Args:
            repair: make again what can be made again, data files from the token ids (which needs the model and a store
                opened to write); a file comes out with the bits it had, unless the device rounds otherwise.
            absent: also look whether anything of what was forgotten is left in any file.
            absent_text: also look for this text, in documents and in the bytes of the files.

        Returns:
            all problems; damage does not raise.

        Raises:
            StoreError: repair of a store opened to read, or a report of another store.
        """
        if repair:
            self._writing()
        return verify(self._room, repair=repair, absent=absent, absent_text=absent_text, progress=progress)

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
        return export(self._room, namespace, Path(path), names, progress)

    def import_(
        self, path: str | Path, namespace: str | None = None, *, progress: Report | None = None
    ) -> list[Receipt]:
        """Take over what ``export`` wrote, all or nothing, without the model.

        The tensors are believed: whoever made the file decides what this text looks like here, also to others who add
        the same text later. Import only files of stores that you trust.

        Args:
            namespace: to import into; None is the one that was exported.

        Raises:
            StoreError: another backbone or layout, another document of a name that is taken, or a damaged file.
        """
        self._writing()
        return import_archive(self._room, Path(path), namespace, progress)

    # looking

    def namespaces(self) -> list[str]:
        """Those with documents that can be found now, sorted."""
        with self.snapshot() as snapshot:
            return snapshot.namespaces(clock.time())

    def documents(self, namespace: str, where: Mapping[str, Any] | None = None) -> list[DocumentInfo]:
        """Documents of a namespace that can be found now, by time and number; an unknown namespace has none.

        Args:
            where: metadata that they have: every key with an equal value.
        """
        with self.snapshot() as snapshot:
            rows = select(snapshot, namespace, Selection(where=where))
            return [info_of(row, snapshot.layout) for row in rows]

    def document(self, namespace: str, name: str) -> DocumentInfo:
        """One document.

        Raises:
            StoreError: there is none of that name.
        """
        with self.snapshot() as snapshot:
            return info_of(self._row(snapshot, namespace, name), snapshot.layout)

    def text(self, namespace: str, name: str) -> str:
        """The text of a document; of one that was added as token ids, what they decode to.

        Raises:
            StoreError: there is none of that name, or there is no tokenizer to decode its token ids.
        """
        with self.snapshot() as snapshot:
            tokens = whole_document(snapshot, self._row(snapshot, namespace, name))
        if tokens.text is not None:
            return tokens.text
        if self._room.find_tokenizer() is None:
            raise StoreError(
                f"document {name!r} was added as token ids; open the store with tokenizer= to see its text"
            )
        return str(self._room.find_tokenizer().decode(tokens.ids.tolist()))

    def token_ids(self, namespace: str, name: str) -> NDArray[Any]:
        """The token ids of a document, (tokens,) uint32."""
        with self.snapshot() as snapshot:
            return whole_document(snapshot, self._row(snapshot, namespace, name)).ids

    def stats(self, namespace: str | None = None) -> Stats:
        """How much there is, in a namespace (as if it shared nothing) or in the whole store."""
        now = clock.time()
        with self.snapshot() as snapshot:
            layout = snapshot.layout
            every = snapshot.every(DocumentRow) if namespace is None else snapshot.documents(namespace)
            rows = [row for row in every if row.expires is None or row.expires > now]
            chunks = sum(layout.chunks(row.tokens) for row in rows)
            found = Stats(
                namespaces=len({row.namespace for row in rows}),
                documents=len(rows),
                tokens=sum(row.tokens for row in rows),
                chunks=chunks,
                expired=len(every) - len(rows),
                stored_bytes=chunks * layout.chunk_bytes,
            )
            if namespace is not None:
                return found
            files = snapshot.files()
            return Stats(
                **{
                    **vars(found),
                    "file_bytes": sum(row.size for row in files),
                    "catalog_bytes": self._room.catalog.disk_bytes,
                    "files": len(files),
                    "dead_tokens": dead_tokens(snapshot),
                }
            )

    # searching

    def bank(self, namespace: str | Sequence[str], **settings: Any) -> StoreBank:
        """What a model searches: ``model(ids, memory=store.bank("alice"))``; read-only.

        Args:
            namespace: one, or one for each row of a batch.
            **settings: see ``StoreBank``: ``documents``, ``where``, ``after``, ``before``, ``max_tokens``, ``device``,
                ``keep``, ``index``.
        """
        from longmem.store.bank import StoreBank

        me: Any = self
        return StoreBank(me, [namespace] if isinstance(namespace, str) else list(namespace), **settings)

    def search(self, namespace: str, text: str, *, top: int = 10, **settings: Any) -> list[SearchHit]:
        """The passages of a namespace that the model's heads find for a text, best first; needs the model.

        Args:
            top: how many.
            **settings: which documents, see ``StoreBank``.
        """
        return self.bank(namespace, **settings).search_text(text, top=top)

    # for readers of chunks

    def snapshot(self) -> AbstractContextManager[Snapshot]:
        """One consistent state of the catalog while the ``with`` block lasts; see ``read_chunks``."""
        return self._room.catalog.snapshot()

    def version(self) -> tuple[int, int]:
        """Another value whenever any process has changed the store; takes microseconds."""
        return self._room.catalog.version()

    def data_file(self, row: FileRow) -> DataFile:
        """An open data file of a snapshot; see ``DataFile.open``."""
        return self._room.data_file(row)

    # small helpers

    def _writing(self) -> Room:
        if self._room.lock is None:
            raise StoreError(f"{self.path}: opened to read; open it with mode='write'")
        return self._room

    def _ready(self, new: NewDocument | None) -> Room:
        room = self._writing()
        if new is not None and new.text is not None:
            room.find_tokenizer()
        return room

    def _row(self, snapshot: Snapshot, namespace: str, name: str) -> DocumentRow:
        row = find_live(snapshot, namespace, name)
        if row is None:
            raise StoreError(f"namespace {namespace!r} has no document {name!r}; `longmem memory list` shows its names")
        return row
