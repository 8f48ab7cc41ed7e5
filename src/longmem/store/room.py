"""What the parts of an open store share: its folder, catalog, data files, encoder and tokenizer."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from longmem.errors import LongMemError, StoreError
from longmem.store.catalog import Catalog
from longmem.store.durable import failpoint, file_errors, sync_folder
from longmem.store.encode import Encoder, backbone_of
from longmem.store.lock import WriterLock
from longmem.store.records import Layout
from longmem.store.schema import FileRow
from longmem.store.segments import DataFile, file_name

SEGMENTS = "segments"
STAGING = "staging"
_DATA_FILE = re.compile(r"[0-9a-f]{16}\.safetensors")


class Room:
    """The inside of an open store; ``MemoryStore`` is its outside.

    Attributes:
        guard: held while the store is changed, so that threads do it one after the other.
        pinned: contents that an unfinished add counts on; ``compact`` leaves them.
    """

    def __init__(
        self, folder: Path, catalog: Catalog, lock: WriterLock | None, encoder: Encoder | None, tokenizer: Any
    ) -> None:
        self.folder = folder
        self.catalog = catalog
        self.lock = lock
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.guard = threading.RLock()
        self.pinned: list[set[int]] = []
        # weak: whoever reads a file keeps it open; what nobody reads must not keep bytes that compact removed
        self._files: WeakValueDictionary[str, DataFile] = WeakValueDictionary()

    @property
    def layout(self) -> Layout:
        """What is fixed for the whole store."""
        return self.catalog.layout

    @property
    def segments(self) -> Path:
        """Where the data files are."""
        return self.folder / SEGMENTS

    @property
    def staging(self) -> Path:
        """Where unfinished files are."""
        return self.folder / STAGING

    def data_file(self, row: FileRow) -> DataFile:
        """An open data file, the same one as long as somebody holds it, so that its blocks are compared once.

        Raises:
            SegmentGone: it is not there, see ``DataFile.open``.
            StoreDamaged: it has another size.
        """
        found = self._files.get(row.id)
        if found is None or found.row != row:
            found = self._files[row.id] = DataFile.open(self.segments / file_name(row.id), row, self.layout)
        return found

    def forget_file(self, name: str) -> None:
        """Open a data file anew when it is asked for again."""
        self._files.pop(name, None)

    def encoding(self) -> Encoder:
        """The encoder.

        Raises:
            StoreError: the store was opened without its model.
        """
        if self.encoder is None:
            raise StoreError(
                f"{self.folder}: opened without a model, which encoding text needs; open it with model= "
                f"(a LongMem over {self.layout.backbone})"
            )
        return self.encoder

    def find_tokenizer(self) -> Any:
        """The tokenizer given, or that of the model's backbone; None where there is neither."""
        if self.tokenizer is None and self.encoder is not None:
            name = backbone_of(self.encoder.model)
            if name:
                from longmem.data.tokenizer import load_tokenizer

                self.tokenizer = load_tokenizer(name)
        return self.tokenizer

    def discard(self, names: Iterable[str]) -> None:
        """Remove data files that were written for a transaction that failed; never fails itself.

        What cannot be removed safely is left to the sweep of the next writer.
        """
        with suppress(LongMemError, OSError):
            if self.catalog.settle():
                with self.catalog.snapshot() as snapshot:
                    known = {name for name in names if snapshot.rows(FileRow, "WHERE id = ?", (name,))}
                self.unlink([name for name in names if name not in known])

    def unlink(self, names: Iterable[str], point: str | None = None) -> None:
        """Remove data files that the catalog does not know (any more)."""
        for name in names:
            self.forget_file(name)
            path = self.segments / file_name(name)
            with file_errors(path, "removing"):
                path.unlink(missing_ok=True)
            if point:
                failpoint(point)
        with file_errors(self.segments, "writing"):
            sync_folder(self.segments)

    def leftovers(self) -> list[Path]:
        """Files of unfinished writes: in ``staging/``, and data files that the catalog does not know."""
        with self.catalog.snapshot() as snapshot:
            known = {file_name(row.id) for row in snapshot.files()}
        with file_errors(self.folder, "listing"):
            unfinished = list(self.staging.iterdir()) if self.staging.is_dir() else []
            unknown = (
                [path for path in self.segments.iterdir() if path.name not in known] if self.segments.is_dir() else []
            )
        return unfinished + [path for path in unknown if _DATA_FILE.fullmatch(path.name)]

    def sweep(self) -> list[Path]:
        """Remove what unfinished writes left; needs the lock and a catalog that was checked."""
        found = self.leftovers()
        for path in found:
            with file_errors(path, "removing"):
                path.unlink(missing_ok=True)
            failpoint("sweep.unlinked")
        if found:
            with file_errors(self.folder, "writing"):
                sync_folder(self.segments)
        return found
