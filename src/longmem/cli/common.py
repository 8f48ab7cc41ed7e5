"""What commands on memory share: options and their values, opening stores and models, printing."""

from __future__ import annotations

import json
import math
import re
import time as clock
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from longmem.errors import BackboneError, CheckpointError, DataError, StoreDamaged, StoreError, StoreLocked
from longmem.progress import Progress

if TYPE_CHECKING:
    from longmem.store.records import Layout
    from longmem.store.records import Progress as StoreProgress
    from longmem.store.store import MemoryStore

Command = TypeVar("Command", bound=Callable[..., Any])

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400, "y": 365 * 86_400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdwy])")
_SECONDS = re.compile(r"\d{9,}(\.\d+)?|\d+\.\d+")

# values of options


def duration(text: str) -> float:
    """Seconds of ``30d``, ``12h``, ``1.5y``; ValueError for anything else."""
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(text)
    return float(match[1]) * _UNITS[match[2]]


def moment(value: object) -> float:
    """Seconds since the epoch of a date, a date and time (local unless it says otherwise), or such seconds.

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"{value} is no moment")
        return float(value)
    text = str(value).strip()
    return float(text) if _SECONDS.fullmatch(text) else datetime.fromisoformat(text).timestamp()


def expiry(value: object, now: float | None = None) -> float:
    """A moment, or a duration from ``now`` on; ValueError if it is neither."""
    if isinstance(value, str) and _DURATION.fullmatch(value.strip().lower()):
        return (clock.time() if now is None else now) + duration(value)
    return moment(value)


class _Parsed(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """A value that one of the functions above reads."""

    def __init__(self, name: str, read: Callable[[str], float], example: str) -> None:
        self.name, self._read, self._example = name, read, example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return value if isinstance(value, float) else self._read(str(value))
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is no {self.name.lower()}; try {self._example}", param, ctx)


MOMENT = _Parsed("DATE", moment, "2026-01-31 or 2026-01-31T18:30")
DURATION = _Parsed("DURATION", duration, "30d, 12h or 1.5y")
EXPIRY = _Parsed("WHEN", expiry, "30d, 12h or 2026-01-31")


def key_values(context: click.Context, parameter: click.Parameter, values: Iterable[str]) -> dict[str, Any] | None:
    """``--metadata author=Ada --metadata year=1843 --metadata '{"draft": true}'`` as one object; None without any.

    Values are JSON where they can be, else text.
    """
    found: dict[str, Any] = {}
    for value in values:
        checked(value, f"{parameter.opts[0]} ({value!r})")
        key, sign, text = value.partition("=")
        try:
            if value.lstrip().startswith("{"):
                found.update(json.loads(value))
                continue
        except ValueError as error:
            raise click.BadParameter(f"{value!r} is not JSON ({error})") from None
        if not sign or not key:
            raise click.BadParameter(f"{value!r} is neither KEY=VALUE nor a JSON object; try author=Ada")
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
    return found or None


# options

FOLDER = click.Path(path_type=Path)
_OPTIONS: dict[str, Any] = {
    "store": click.option(
        "--store", "path", type=FOLDER, default=Path("memory"), show_default=True, envvar="LONGMEM_STORE",
        help="Folder of the store; also LONGMEM_STORE.",
    ),
    "namespace": click.option(
        "--namespace", "-n", default="default", show_default=True, envvar="LONGMEM_NAMESPACE",
        help="Whose documents; also LONGMEM_NAMESPACE.",
    ),
    "any_namespace": click.option(
        "--namespace", "-n", envvar="LONGMEM_NAMESPACE",
        help="Of this namespace only; also LONGMEM_NAMESPACE. Default: of all.",
    ),
    "where": click.option(
        "--where", multiple=True, metavar="KEY=VALUE", callback=key_values,
        help="Only documents with this metadata; repeatable, all must hold. VALUE is JSON, or else text.",
    ),
    "older_than": click.option("--older-than", type=DURATION, help="Only documents at least so old: 30d, 12h."),
    "before": click.option("--before", type=MOMENT, help="Only documents from before this date."),
    "model": click.option(
        "--model", envvar="LONGMEM_MODEL",
        help="LongMem checkpoint, run folder, or a causal LM by itself; also LONGMEM_MODEL. Default: the backbone that "
        "the store was made with.",
    ),
    "backbone": click.option("--backbone", help="Where the backbone is, if not where the checkpoint says."),
    "revision": click.option("--revision", help="Of a hub id."),
    "subfolder": click.option("--subfolder", help="Where in its folder or hub id the backbone is."),
    "gguf_file": click.option("--gguf-file", help="Name of the GGUF file in the backbone's folder or hub id."),
    "dtype": click.option(
        "--dtype", type=click.Choice(("auto", "float32", "bfloat16", "float16")), default="auto", show_default=True,
        help="Of the weights; auto: as saved.",
    ),
    "device": click.option(
        "--device", default="auto", show_default=True, help="cpu, cuda, ...; auto takes a GPU if there is one."
    ),
    "tokenizer": click.option("--tokenizer", help="Folder or hub id; default: that of the model's backbone."),
    "json": click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
}  # fmt: skip


def options(*names: str) -> Callable[[Command], Command]:
    """The options of these names, in this order; ``any_namespace`` is ``namespace`` where none means all."""

    def decorate(function: Command) -> Command:
        for name in reversed(names):
            function = _OPTIONS[name](function)
        return function

    return decorate


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


def checked(text: str, what: str) -> str:
    """The same text; Python hands on bytes of the command line that are not UTF-8 as what no text can hold.

    Raises:
        DataError: it has such bytes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = f"byte 0x{ord(text[error.start]) & 0xFF:02x} at offset {error.start}"
        raise DataError(f"{what} is not UTF-8 text ({byte}); convert it") from error
    return text


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
