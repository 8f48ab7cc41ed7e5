"""Opening a store: its folder, the writer's lock, the catalog, the model that it belongs to, and what a crash left."""

from __future__ import annotations

import time as clock
from pathlib import Path
from typing import Any, Literal, cast

from longmem.errors import StoreDamaged, StoreError
from longmem.store.catalog import CATALOG, Catalog, unfinished
from longmem.store.checking import check_catalog
from longmem.store.durable import failpoint, file_errors, new_id, sync_folder
from longmem.store.encode import LONGEST_SEGMENT, Encoder, Encodes, backbone_of, window_of
from longmem.store.lock import LOCK, WriterLock
from longmem.store.records import DTYPES, FORMAT, Dtype, Layout
from longmem.store.room import SEGMENTS, STAGING, Room
from longmem.store.seal import SEAL

Mode = Literal["write", "read"]
_OURS = {CATALOG, f"{CATALOG}-wal", f"{CATALOG}-shm", SEAL, LOCK, SEGMENTS, STAGING}


def open_room(
    path: str | Path,
    *,
    model: Encodes | None,
    tokenizer: Any,
    mode: Mode,
    create: bool,
    dtype: Dtype | None,
    chunk_size: int | None,
    segment_tokens: int | None,
    batch_tokens: int | None,
    check: bool,
) -> Room:
    """See ``MemoryStore.open``."""
    folder = Path(path)
    if mode not in ("write", "read"):
        raise StoreError(f"mode ({mode!r}) must be 'write' or 'read'")
    if dtype is not None and dtype not in DTYPES:
        raise StoreError(f"dtype ({dtype!r}) must be one of {', '.join(DTYPES)}")
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder}: a file, not a store's folder; name a folder")
    there = (folder / CATALOG).exists()
    if not there:
        _refuse_foreign(folder)
    if not there and (mode == "read" or not create):
        raise StoreError(f"{folder}: no memory store here; check the path, or open it with mode='write' to make one")
    lock, catalog = None, None
    try:
        if mode == "write":
            settings = (folder, model, dtype, chunk_size, segment_tokens)
            if not there:
                _new_layout(*settings)  # refused before anything is made
            _make_folders(folder)
            lock = WriterLock.acquire(folder)
            if unfinished(folder):
                catalog = Catalog.create(folder, lock, _new_layout(*settings))
            else:
                catalog = Catalog(folder, lock, check=check)
        else:
            catalog = Catalog(folder, check=check)
        layout = catalog.layout
        if layout.format > FORMAT:
            raise StoreError(f"{folder}: format {layout.format}, this version reads {FORMAT}; use a newer longmem")
        _check_settings(folder, layout, dtype, chunk_size, segment_tokens)
        encoder = None if model is None else _encoder(folder, layout, model, batch_tokens)
        room = Room(folder, catalog, lock, encoder, tokenizer)
        if lock is not None and check:
            if not catalog.sealed:
                check_catalog(catalog).raise_first()
            room.sweep()
    except BaseException:
        if catalog is not None:
            catalog.close(seal=False)
        if lock is not None:
            lock.release()
        raise
    return room


def _refuse_foreign(folder: Path) -> None:
    if not folder.is_dir():
        return
    with file_errors(folder, "listing"):
        foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in _OURS)
        data = (folder / SEGMENTS).is_dir() and any((folder / SEGMENTS).iterdir())
    if foreign:
        raise StoreError(
            f"{folder}: no memory store, and it holds other files ({foreign[0]}); name an empty or new folder"
        )
    if data:
        raise StoreDamaged(
            f"{folder}: {CATALOG} is missing beside data files; restore it from a backup, or name another folder"
        )


def _make_folders(folder: Path) -> None:
    with file_errors(folder, "making the folder"):
        made = not folder.exists()
        for each in (folder, folder / SEGMENTS, folder / STAGING):
            each.mkdir(parents=True, exist_ok=True)
        if made:
            sync_folder(folder)
            sync_folder(folder.absolute().parent)
    failpoint("create.folder")


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
        store_id=new_id(),
        fingerprint=model.fingerprint,
        backbone=_name(model),
        memory_layer=model.memory_layer,
        heads_kv=model.memory_heads,
        head_dim=model.memory_head_dim,
        chunk_size=size,
        segment_tokens=segment,
        dtype=dtype or "float16",
        created=clock.time(),
    )


def _check_settings(
    folder: Path, layout: Layout, dtype: Dtype | None, chunk_size: int | None, segment_tokens: int | None
) -> None:
    given = {"dtype": dtype, "chunk_size": chunk_size, "segment_tokens": segment_tokens}
    for name, value in given.items():
        if value is not None and value != getattr(layout, name):
            raise StoreError(
                f"{folder}: this store was made with {name}={getattr(layout, name)}, not {value}; leave {name} away, "
                "or make another store"
            )


def _encoder(folder: Path, layout: Layout, model: Encodes, batch_tokens: int | None) -> Encoder:
    """The encoder of the store's own backbone.

    Raises:
        StoreError: the model is another one; names both.
    """
    theirs = (layout.fingerprint, layout.memory_layer, layout.heads_kv, layout.head_dim)
    ours = (model.fingerprint, model.memory_layer, model.memory_heads, model.memory_head_dim)
    if theirs != ours:
        raise StoreError(
            f"{folder}: written by backbone {layout.backbone} ({layout.fingerprint}, layer {layout.memory_layer}), "
            f"this model is {_name(model)} ({model.fingerprint}, layer {model.memory_layer}); keys of one mean nothing "
            "to the other: use the store's own backbone, or make another store"
        )
    if batch_tokens is not None and batch_tokens < 1:
        raise StoreError(f"batch_tokens ({batch_tokens}) must be at least 1")
    return Encoder(model, layout, batch_tokens)


def _name(model: Encodes) -> str:
    config = model.config
    named = backbone_of(model) or getattr(config, "_name_or_path", None)
    inner = getattr(config, "backbone_config", None)
    return str(named or getattr(inner, "model_type", None) or cast(Any, type(model)).__name__)
