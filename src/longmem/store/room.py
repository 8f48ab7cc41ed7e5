"""What the parts of an open store share, and how a store is opened."""

from __future__ import annotations

import math
import os
import threading
import time
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from longmem.data.tokens import check_tokenizer, load_tokenizer
from longmem.errors import DataError, StoreDamaged, StoreError
from longmem.store.catalog import CATALOG, Catalog
from longmem.store.disk import LOCK, Arrays, GenerationGone, WriterLock, failpoint, file_errors, paths_of, sync_folder
from longmem.store.encode import LONGEST_SEGMENT, Encoder, Encodes, accepts, window_of
from longmem.store.records import DTYPES, Dtype, Layout, NewDocument

Mode = Literal["write", "read"]


class Room:
    """The inside of an open store; ``MemoryStore`` is its outside.

    Attributes:
        folder: of the store, absolute.
        guard: held while the data files and the catalog are changed, so that threads do it one after the other.
        encoding: held while the model encodes.
        mapped: the data files as they were last read.
        pinned: pieces that unfinished adds count on; ``compact`` leaves them.
    """

    def __init__(
        self, folder: Path, catalog: Catalog, lock: WriterLock | None, encoder: Encoder | None, tokenizer: Any
    ) -> None:
        self.folder, self.catalog, self.lock, self.encoder = folder, catalog, lock, encoder
        self.tokenizer = tokenizer
        self.layout = catalog.layout
        self.guard = threading.RLock()
        self.encoding = threading.Lock()
        self.pinned: list[set[int]] = []
        self.mapped: Arrays | None = None

    def arrays(self) -> Arrays:
        """The data files as the catalog's present state has them; call it inside of ``catalog.read``.

        Raises:
            GenerationGone: ``compact`` of another process has just replaced them; read the catalog again.
        """
        generation, count = self.catalog.meta("generation"), self.catalog.meta("records")
        have = self.mapped
        if have is None or have.generation != generation or have.count < count:
            have = self.mapped = Arrays(self.folder, self.layout, generation, count)
        return have

    def writing(self) -> None:
        """Raises StoreError where the store was opened to read, or by the parent of this process."""
        if self.lock is None:
            raise StoreError(f"{self.folder}: opened to read; open it with mode='write'")
        if self.lock.pid != os.getpid():
            raise StoreError(f"{self.folder}: opened by process {self.lock.pid}; open it in this process")

    def encoder_needed(self) -> Encoder:
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

    def find_tokenizer(self, *, needed: bool = False) -> Any:
        """The tokenizer given, or that of the model's backbone; None where there is neither, or it cannot be loaded.

        Raises:
            DataError: it cannot be loaded and is ``needed``.
        """
        name = backbone_of(self.encoder.model) if self.tokenizer is None and self.encoder is not None else None
        if name:
            try:
                self.tokenizer = load_tokenizer(name)
            except DataError:
                if needed:
                    raise
        return self.tokenizer

    def sweep(self) -> None:
        """Remove data files that the catalog does not name: of a ``compact`` that was interrupted."""
        named = paths_of(self.folder, self.catalog.meta("generation"))
        self.remove(path for path in self.folder.glob("k*-*.bin") if path not in named)

    def remove(self, paths: Iterable[Path]) -> None:
        """Unlink data files, durably."""
        removed = list(paths)
        for path in removed:
            with file_errors(path, "removing"):
                path.unlink(missing_ok=True)
            failpoint("compact.unlinked")
        if removed:
            sync_folder(self.folder)


def until_found(read: Any) -> Any:
    """What a reading of catalog and data files gives, again where ``compact`` has replaced the files meanwhile.

    Raises:
        StoreDamaged: the same files are missing twice: they are lost.
    """
    missed = ""
    while True:
        try:
            return read()
        except GenerationGone as gone:
            if str(gone) == missed:
                raise StoreDamaged(missed) from gone
            missed = str(gone)


def open_room(
    folder: Path,
    model: Encodes | None,
    tokenizer: Any,
    mode: Mode,
    create: bool,
    batch_tokens: int | None,
    given: dict[str, Any],
) -> Room:
    """See ``MemoryStore.open``; ``given`` are settings of its layout."""
    if mode not in ("write", "read"):
        raise StoreError(f"mode ({mode!r}) must be 'write' or 'read'")
    if given["dtype"] not in (None, *DTYPES):
        raise StoreError(f"dtype ({given['dtype']!r}) must be one of {', '.join(DTYPES)}")
    if batch_tokens is not None and batch_tokens < 1:
        raise StoreError(f"batch_tokens ({batch_tokens}) must be at least 1")
    there = (folder / CATALOG).exists()
    if not there:
        _refuse_foreign(folder)
        if mode == "read" or not create:
            raise StoreError(
                f"{folder}: no memory store here; check the path, or open it with mode='write' to make one"
            )
    # refused before anything is made; a catalog without tables is that of a maker that was killed
    made = there and not (mode == "write" and _unfinished(folder))
    new = None if made else _new_layout(folder, model, **given)
    lock, catalog = None, None
    try:
        if mode == "write":
            with file_errors(folder, "making the folder"):
                folder.mkdir(parents=True, exist_ok=True)
            lock = WriterLock(folder)
            failpoint("create.folder")
        catalog = Catalog(folder / CATALOG, writable=mode == "write", new=new)
        if new is not None:
            sync_folder(folder)
            sync_folder(folder.parent)
        for name, value in given.items():
            if value is not None and value != getattr(catalog.layout, name):
                raise StoreError(
                    f"{folder}: this store was made with {name}={getattr(catalog.layout, name)}, not {value}; leave "
                    f"{name} away, or make another store"
                )
        if model is not None:
            _check_model(folder, catalog.layout, model)
            if tokenizer is not None and hasattr(tokenizer, "vocab_size") and hasattr(model, "get_input_embeddings"):
                check_tokenizer(tokenizer, model, way_out="open the store with the model's own")
        encoder = None if model is None else Encoder(model, catalog.layout, batch_tokens)
        room = Room(folder, catalog, lock, encoder, tokenizer)
        if lock is not None:
            room.sweep()
    except BaseException:
        if catalog is not None:
            catalog.close()
        if lock is not None:
            lock.release()
        raise
    return room


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder}: a file, not a store's folder; name a folder")
    with file_errors(folder, "listing"):
        held = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
    data = [name for name in held if name.endswith(".bin")]
    if data:
        raise StoreDamaged(f"{folder}: {CATALOG} is missing beside {data[0]}; restore it, or name another folder")
    foreign = [name for name in held if name != LOCK and not name.startswith(CATALOG)]
    if foreign:
        raise StoreError(
            f"{folder}: no memory store, and it holds other files ({foreign[0]}); name an empty or new folder"
        )


def _unfinished(folder: Path) -> bool:
    """Whether a writer was killed before it had made the catalog: SQLite writes no byte before the first commit."""
    log = folder / f"{CATALOG}-wal"
    return (folder / CATALOG).stat().st_size <= 4096 and not (log.exists() and log.stat().st_size)


def _new_layout(
    folder: Path, model: Encodes | None, dtype: Dtype | None, chunk_size: int | None, segment_tokens: int | None
) -> Layout:
    if model is None:
        raise StoreError(f"{folder}: a new store needs the model whose memory it is to hold; open it with model=")
    window = window_of(model)
    size = int(model.config.chunk_size) if chunk_size is None else chunk_size
    segment = segment_tokens
    if segment is None:
        segment = min(window or LONGEST_SEGMENT, LONGEST_SEGMENT) // max(size, 1) * size
    if size < 1 or segment < size or segment % size:
        near = max(1, round(segment / max(size, 1))) * size
        raise StoreError(
            f"segment_tokens ({segment}) must be a positive multiple of chunk_size ({size}); try segment_tokens={near}"
        )
    if window is not None and segment > window:
        raise StoreError(f"segment_tokens ({segment}) must not exceed the backbone's window of {window} tokens")
    return Layout(
        os.urandom(8).hex(),
        model.fingerprint,
        _name(model),
        model.memory_layers,
        model.memory_heads,
        model.memory_head_dim,
        size,
        segment,
        dtype or "float16",
        time.time(),
    )


def _check_model(folder: Path, layout: Layout, model: Encodes) -> None:
    """Raises StoreError where the model's backbone or layers are others than the store's; names both."""
    sizes = (model.memory_layers, model.memory_heads, model.memory_head_dim)
    if accepts(model, layout.fingerprint) and sizes == (layout.memory_layers, layout.heads_kv, layout.head_dim):
        return
    raise StoreError(
        f"{folder}: written by backbone {layout.backbone} ({layout.fingerprint}, {_layers(layout.memory_layers)}), "
        f"this model is {_name(model)} ({model.fingerprint}, {_layers(model.memory_layers)}); keys of one mean nothing "
        "to the other: use the store's own backbone, or make another store"
    )


def _layers(layers: tuple[int, ...]) -> str:
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"


def backbone_of(model: Any) -> str | None:
    """Where a model's backbone is, as others can find it: a folder, or a name of the hub; None where nothing says."""
    named = getattr(model.config, "backbone_name_or_path", None)
    inner = getattr(getattr(getattr(model, "backbone", None), "model", None), "config", None)
    loaded = getattr(inner, "_name_or_path", None)
    # a checkpoint names its backbone from its own folder, which means another place from here, or none
    found = next((Path(name).resolve() for name in (loaded, named) if name and Path(name).is_dir()), named or loaded)
    return str(found) if found else None


def _name(model: Any) -> str:
    """The backbone's name; of one without, what kind it is."""
    kind = getattr(getattr(model.config, "backbone_config", None), "model_type", None)
    return backbone_of(model) or getattr(model.config, "_name_or_path", None) or kind or type(model).__name__


def composed(name: str) -> str:
    """A name in composed form (Unicode NFC), as all names are kept: what looks the same is the same."""
    return unicodedata.normalize("NFC", name) if isinstance(name, str) else name


def check_names(namespace: str, new: NewDocument) -> None:
    """Refuse what cannot be a namespace, a name, a source or a moment.

    Raises:
        StoreError: lists all that is wrong.
    """
    wrong = []
    for what, value in (("namespace", namespace), ("name", new.name)):
        # control characters would break lines and terminals; a surrogate is no Unicode
        if not isinstance(value, str) or not 0 < len(value) <= 1000 or _holds(value, "Cc", "Cs", "Zl", "Zp"):
            wrong.append(f"{what} ({value!r:.60}) must be 1 to 1000 characters, none of them for control")
    if new.source is not None and (not isinstance(new.source, str) or _holds(new.source, "Cs")):
        wrong.append(f"source ({new.source!r:.60}) must be a text")
    for what, moment in (("time", new.time), ("expires", new.expires)):
        if moment is not None and not (isinstance(moment, int | float) and math.isfinite(moment)):
            wrong.append(f"{what} ({moment!r}) must be seconds since the epoch")
    if wrong:
        raise StoreError("; ".join(wrong))


def _holds(value: str, *kinds: str) -> bool:
    """Whether a character is of one of these categories of Unicode."""
    return any(unicodedata.category(character) in kinds for character in value)
