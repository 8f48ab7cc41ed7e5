"""What commands share: opening stores and models, reading texts, printing."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from longmem.errors import BackboneError, CheckpointError, DataError, StoreDamaged, StoreError, StoreLocked
from longmem.progress import Progress

if TYPE_CHECKING:
    from longmem.store.records import Layout
    from longmem.store.records import Progress as StoreProgress
    from longmem.store.store import MemoryStore

# stores and models


def open_store(path: Path, mode: str = "read", **settings: Any) -> MemoryStore:
    """A store that is there."""
    from longmem.store.store import MemoryStore

    return MemoryStore.open(path, mode=mode, create=False, **settings)  # type: ignore[arg-type]


def layout_of(path: Path, *, writing: bool = False) -> Layout | None:
    """What a store was made for; None where there is none yet.

    With ``writing`` the writer's lock is taken for a moment: another writer is named before a model is loaded.
    """
    if not (path / "catalog.sqlite").exists():
        return None
    try:
        with open_store(path, "write" if writing else "read") as store:
            return store.layout
    except (StoreLocked, StoreDamaged):
        raise
    except StoreError:  # its maker was killed before it was complete
        return None


def check_namespace(store: MemoryStore, namespace: str) -> None:
    """Refuse a namespace without documents; names those that there are.

    Raises:
        StoreError: there are none in it.
    """
    there = store.namespaces()
    if unicodedata.normalize("NFC", namespace) not in there:
        names = ", ".join(there[:20]) + (", ..." if len(there) > 20 else "")
        ways = f"there are: {names}" if there else "the store is empty, `longmem memory add` fills it"
        raise StoreError(f"{store.path}: no namespace {namespace!r}; {ways}")


@dataclass(frozen=True)
class Loaded:
    """A model, and where its tokenizer is; None where that is not known."""

    model: Any
    tokenizer: str | None


def load_model(
    name: str | None,
    layout: Layout | None,
    device: str,
    backbone: str | None = None,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    gguf_file: str | None = None,
    dtype: str = "auto",
    default: bool = False,
    closed: bool = False,
) -> Loaded:
    """The model of a store.

    Args:
        name: a checkpoint, or a causal language model by itself, which then reads memory in the layers that the store
            remembers, nothing trained; None is the backbone that the store names.
        layout: of the store; None is a new one.
        device: ``auto`` takes a GPU where there is one.
        backbone: where the backbone of a checkpoint is; None is where the checkpoint says.
        revision: of a hub id.
        subfolder: where in ``backbone``, or else in ``name``, the backbone is.
        gguf_file: the same for a GGUF file.
        dtype: of the weights; ``auto`` is as saved.
        default: without a name, a new store or one of its backbone gets the default model, which may be fetched.
        closed: the heads of a causal language model by itself take nothing from memory; a line says so.

    Raises:
        StoreError: no model is named, or the one that the store names cannot be loaded.
        ConfigError, CheckpointError, BackboneError: no such device, or no such model.
    """
    import torch
    from transformers.utils import logging

    from longmem.default_model import default_checkpoint, default_model
    from longmem.evaluation.loading import checked_device, checkpoint_folder, model_type
    from longmem.modeling.longmem import LongMem
    from longmem.modeling.memtrm import MemTRM
    from longmem.modeling.training_free import TrainingFree

    logging.disable_progress_bar()
    if default and name is None and (layout is None or default_checkpoint(layout)):
        chosen = default_model(say, layout)
        name, backbone = str(chosen.checkpoint), str(chosen.backbone)
    if name is None and layout is None:
        raise StoreError("a new store needs the model whose memory it is to hold; name it with --model")
    place, folder = checked_device(device), _absolute(name or (layout.backbone if layout else ""))
    backbone = _absolute(backbone) if backbone else None
    how: dict[str, Any] = {"revision": revision, "dtype": None if dtype == "auto" else getattr(torch, dtype)}
    within = {key: part for key, part in (("subfolder", subfolder), ("gguf_file", gguf_file)) if part is not None}
    itself = bool(within) and backbone is None  # then the name is that of a backbone
    if within and Path(place_of := backbone or folder).is_dir():
        joined, within = checkpoint_folder(str(Path(place_of, *within.values()))), {}
        folder, backbone = (joined, None) if itself else (folder, joined)
    try:
        kinds: dict[str, Any] = {"longmem": LongMem, "memtrm": MemTRM, "training_free": TrainingFree}
        kind = "" if name is None or itself else model_type(folder := checkpoint_folder(folder))
        if kind in kinds:
            other = {"backbone": backbone} if backbone else {}
            model: Any = kinds[kind].from_pretrained(folder, backbone_kwargs=within, **how, **other)
        elif backbone is not None:
            raise StoreError(f"--backbone is for a checkpoint of ours; {folder} is a causal language model by itself")
        else:
            # what a store names is looked for on this machine only: --model is there to ask for a download
            here = {} if name is not None or Path(folder).is_dir() else {"local_files_only": True}
            layers = None if layout is None else layout.memory_layers
            if closed:
                how["gate"] = 0.0
                say(f"{folder} has no trained gates, so memory reaches it as passages in its window, not by its heads; "
                    "longmem calibrate trains some")  # fmt: skip
            model = TrainingFree.from_backbone(folder, memory_layers=layers, backbone_kwargs={**here, **within}, **how)
    except (CheckpointError, BackboneError) as error:
        if name is not None:
            raise
        raise StoreError(f"the store's backbone cannot be loaded: {error}; name the model with --model") from error
    backbone = backbone or model.config.backbone_name_or_path
    if backbone and (Path(folder) / backbone).is_dir():
        # by its whole path: a new store remembers it, and is used from other folders too
        backbone = model.config.backbone_name_or_path = str((Path(folder) / backbone).resolve())
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    found = (each for each in (folder, backbone) if each and any((Path(each) / file).is_file() for file in files))
    return Loaded(model.to(place).eval(), next(found, backbone))


def _absolute(name: str) -> str:
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def load_tokenizer(name: str | None, loaded: Loaded | None = None) -> Any:
    """The tokenizer of that name, or else the model's; None where there is none.

    Raises:
        DataError: it is another model's, or there is none of that name.
    """
    from longmem.data.tokenizer import load_tokenizer as load

    chosen = name or (loaded.tokenizer if loaded else None)
    return None if chosen is None else load(chosen, None if loaded is None else loaded.model)


def read_text(path: str | Path) -> str:
    """The text of a file, or of standard input for ``-``.

    Raises:
        DataError: it is not there or not UTF-8.
    """
    named = "standard input" if str(path) == "-" else str(path)
    try:
        with click.open_file(str(path), "rb") as stream:
            data: Any = stream.read()
        return str(data.decode("utf-8"))
    except OSError as error:
        raise DataError(f"{named}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{named}: not UTF-8 text (byte {error.start}); convert it") from error


# printing: data on stdout, all else on stderr


def say(line: str) -> None:
    """A remark on stderr."""
    click.echo(line, err=True)


def print_json(value: object) -> None:
    """One JSON document; records are objects, paths are texts."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False, default=_plain))


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def print_columns(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Aligned columns, numbers to the right; a line is never cut."""
    lines = [[_cell(value) for value in row] for row in rows]
    right = [bool(lines) and all(_is_number(line[at]) for line in lines) for at in range(len(heads))]
    widths = [max(len(line[at]) for line in [list(heads), *lines]) for at in range(len(heads))]
    for line in [list(heads), *lines]:
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)]
        click.echo("  ".join(cells).rstrip())


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else one_line(str(value))


def _is_number(text: str) -> bool:
    return text == "-" or text.replace(",", "").replace(".", "").isdigit()


def date(seconds: float | None) -> str | None:
    """A moment in local time."""
    return None if seconds is None else datetime.fromtimestamp(seconds).isoformat(" ", "seconds")


def one_line(text: str) -> str:
    """Text within a line: white space as single blanks, no control characters."""
    return "".join(sign if sign.isprintable() else "·" for sign in " ".join(text.split()))


def counted(number: int, what: str) -> str:
    """``1 document``, ``2,000 documents``."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


_WORDS = {"encode": "encoding", "check": "checking", "rewrite": "rewriting", "copy": "copying"}


class ShownProgress:
    """Progress of a store's long work, on stderr: pass it as ``progress``."""

    def __init__(self) -> None:
        self._step, self._shown = "", Progress("")

    def __enter__(self) -> ShownProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shown.__exit__(kind, error, trace)

    def __call__(self, progress: StoreProgress) -> None:
        """Show how far it is."""
        if progress.step != self._step:
            self._shown.__exit__(None, None, None)
            self._step = progress.step
            self._shown = Progress(_WORDS.get(progress.step, progress.step), progress.total, progress.unit)
        self._shown.advance(progress.done - self._shown.done, one_line(progress.name)[-40:])
