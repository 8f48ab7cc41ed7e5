"""From options to an open store and the model that it needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longmem.errors import BackboneError, CheckpointError, DataError, StoreError

if TYPE_CHECKING:
    from longmem.store.records import Layout
    from longmem.store.store import MemoryStore


def open_to_read(path: Path) -> MemoryStore:
    """The store, for looking only."""
    from longmem.store.store import MemoryStore

    return MemoryStore.open(path, mode="read", create=False)


def open_to_write(path: Path) -> MemoryStore:
    """A store that is there, for changes that need no model."""
    from longmem.store.store import MemoryStore

    return MemoryStore.open(path, create=False)


def layout_of(path: Path, *, writing: bool) -> Layout | None:
    """What the store was made for; None where there is none yet.

    With ``writing`` the writer's lock is taken for a moment: who may not write shall not load a model first.
    """
    from longmem.store.catalog import CATALOG, unfinished

    if not (path / CATALOG).exists() or unfinished(path):
        return None
    with open_to_write(path) if writing else open_to_read(path) as store:
        return store.layout


def check_namespace(store: MemoryStore, namespace: str) -> None:
    """Refuse a namespace that holds nothing.

    Raises:
        StoreError: names those that there are.
    """
    there = store.namespaces()
    if namespace not in there:
        names = ", ".join(there[:20]) + (", ..." if len(there) > 20 else "")
        raise StoreError(
            f"{store.path}: no namespace {namespace!r}; there are: {names}"
            if there
            else f"{store.path}: no namespace {namespace!r}; the store is empty, `longmem memory add` fills it"
        )


@dataclass(frozen=True)
class Loaded:
    """A model, and the name of its tokenizer; None where nothing says which."""

    model: Any
    tokenizer: str | None


def load_model(name: str | None, layout: Layout | None, device: str) -> Loaded:
    """The model whose memory it is.

    Args:
        name: a checkpoint of ours, or a causal language model by itself, which then reads memory in the layer that is
            remembered, nothing trained; None is the backbone that the store names.
        layout: of the store; None is a new one.
        device: ``auto`` takes a GPU where there is one.

    Raises:
        StoreError: nothing says which model.
        CheckpointError, BackboneError: it cannot be loaded.
    """
    from transformers.utils import logging

    from longmem.evaluation.loading import checkpoint_folder

    logging.disable_progress_bar()
    if name is None and layout is None:
        raise StoreError("a new store needs the model whose memory it is to hold; name it with --model")
    try:
        folder = checkpoint_folder(_absolute(name or _named(layout)))
        # what a store names is looked for on this machine only: nobody asked for a download
        here = {} if name is not None or Path(folder).is_dir() else {"local_files_only": True}
        model = _on_device(_load(folder, layout, here), device)
    except (CheckpointError, BackboneError) as error:
        if name is not None:
            raise
        raise StoreError(f"the store's backbone cannot be loaded: {error}; name the model with --model") from error
    backbone = model.config.backbone_name_or_path
    if backbone and (Path(folder) / backbone).is_dir():
        # by its whole path: a new store remembers it, and is used from elsewhere too
        backbone = model.config.backbone_name_or_path = str((Path(folder) / backbone).resolve())
    return Loaded(model, next((each for each in (folder, backbone) if each and _has_tokenizer(each)), backbone))


def _load(folder: str, layout: Layout | None, here: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    from longmem.modeling.training_free import TrainingFree  # and with it all model types of ours

    try:
        kind = AutoConfig.from_pretrained(folder, **here).model_type
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: no model there ({_first_line(error)}); name another one") from error
    if kind in ("longmem", "memtrm", "training_free"):
        return AutoModelForCausalLM.from_pretrained(folder)
    layer = None if layout is None else layout.memory_layer
    return TrainingFree.from_backbone(folder, memory_layer=layer, backbone_kwargs=here)


def _on_device(model: Any, device: str) -> Any:
    import torch

    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        return model.to(torch.device(place)).eval()
    except (RuntimeError, AssertionError) as error:
        raise StoreError(f"device ({device}) cannot be used ({_first_line(error)}); try --device cpu") from error


def _has_tokenizer(name: str) -> bool:
    return any((Path(name) / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json"))


def load_tokenizer(*names: str | None) -> Any:
    """The first tokenizer that is named; None where none is."""
    name = next((each for each in names if each), None)
    if name is None:
        return None
    from longmem.data.tokenizer import load_tokenizer as load

    return load(name)


def tokenizer_at_hand(layout: Layout | None) -> str | None:
    """The tokenizer of the store's backbone, where that is a folder of this machine."""
    return layout.backbone if layout is not None and _has_tokenizer(layout.backbone) else None


def _named(layout: Layout | None) -> str:
    return "" if layout is None else layout.backbone


def _absolute(name: str) -> str:
    """A folder by its whole path."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_text(path: Path) -> str:
    """A file's text, or that of standard input.

    Raises:
        DataError: it is not there or not UTF-8.
    """
    try:
        with click.open_file(str(path), "rb") as stream:
            data: Any = stream.read()
        return str(data.decode("utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); convert it") from error


def say(line: str) -> None:
    """A remark for whoever sits there, on stderr."""
    click.echo(line, err=True)
