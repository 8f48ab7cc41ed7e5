"""What commands share: values and options, stores and models, what is printed. Torch waits until a command runs."""

from __future__ import annotations

import json
import math
import os
import re
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from longmem.errors import BackboneError, CheckpointError, ConfigError, StoreDamaged, StoreError, StoreLocked
from longmem.progress import Progress

if TYPE_CHECKING:
    from longmem.store import MemoryStore
    from longmem.store import Progress as StoreProgress
    from longmem.store.disk import Layout

Command = TypeVar("Command", bound=Callable[..., Any])

FOLDER = click.Path(path_type=Path)
AT_LEAST_1 = click.IntRange(min=1)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400, "y": 365 * 86_400}
_MOMENTS = ("added", "created", "expires", "time")
LONGEST_METADATA = 200  # characters in a line: of a server's stored responses it is a whole conversation
_SIZES = {"k": 1 << 10, "m": 1 << 20}

# values of options


def duration(text: str) -> float:
    """Seconds of ``30d``, ``12h``, ``1.5y``; ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdwy])", text.strip().lower())
    if found is None:
        raise ValueError(text)
    return float(found[1]) * _UNITS[found[2]]


def moment(value: object) -> float:
    """Seconds since the epoch of a date, a date and time (local unless it says otherwise), or such seconds.

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    text = str(value).strip()
    return float(text) if re.fullmatch(r"\d{9,}(\.\d+)?|\d+\.\d+", text) else datetime.fromisoformat(text).timestamp()


def expiry(value: object) -> float:
    """A duration from now on, or a moment; ValueError if it is neither."""
    try:
        return time.time() + duration(str(value))
    except ValueError:
        return moment(value)


def edge(conditions: Mapping[str, Any]) -> float | None:
    """The moment before which documents are meant, of ``--older-than`` and ``--before``; None where all are."""
    edges = (conditions["before"], conditions["older_than"])
    return min((each for each in edges if each is not None), default=None)


def tokens(word: str) -> int:
    """``8192``, or ``8k``: k is 1,024 and m is 1,024k; ValueError for anything else."""
    word = word.strip().lower()
    return int(word[:-1]) * _SIZES[word[-1]] if word[-1:] in _SIZES else int(word)


def _utf8(text: str) -> str:
    """The same text; what Python makes of other bytes on the command line cannot be encoded, a ValueError."""
    text.encode()
    return text


class Parsed(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """A value that ``read`` makes of a word; what raises ValueError "is ``said``"."""

    def __init__(self, name: str, read: Callable[[str], Any], said: str) -> None:
        self.name, self._read, self._said = name, read, said

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._read(value) if isinstance(value, str) else value
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is {self._said}", param, ctx)


def _setting(word: str) -> tuple[str, Any]:
    """A setting of how memory is read and its value; ValueError for any other."""
    from longmem.modeling.checkpoints import CHANGEABLE

    name, _, value = word.partition("=")
    if name not in CHANGEABLE:
        raise ValueError
    return name, json.loads(value)


TEXT = Parsed("TEXT", _utf8, "not UTF-8 text; convert it")
MOMENT = Parsed("DATE", moment, "no date; try 2026-01-31 or 2026-01-31T18:30")


def at_least(least: float, read: Callable[[str], float] = tokens) -> Callable[[str], float]:
    """``read``, with a ValueError for a smaller number and for NaN too."""

    def checked(word: str) -> float:
        if not (count := read(word)) >= least:
            raise ValueError(word)
        return count

    return checked


EXPIRY = Parsed("WHEN", at_least(time.time(), expiry), "no time to come; try 30d, 12h or 2099-12-31")


def token_count(least: int = 1) -> Parsed:
    """The type of an option that takes one number of tokens."""
    return Parsed("tokens", at_least(least), f"no token count of at least {least}; try 8192 or 8k")


def by_comma(kind: Callable[[str], Any], said: str) -> Callable[..., Any]:
    """Callback of options that take one or more values by comma, each once; None stays None."""

    def read(context: click.Context, parameter: click.Parameter, value: str | None) -> list[Any] | None:
        if value is None:
            return None
        try:
            if found := [kind(word.strip()) for word in value.split(",") if word.strip()]:
                return list(dict.fromkeys(found))
        except (ValueError, OverflowError):
            pass
        raise click.BadParameter(f"{value!r} is not a list of {said}")

    return read


token_counts = by_comma(at_least(1), "token counts; try 1024,8k,64k")


def _key_values(context: click.Context, parameter: click.Parameter, values: Iterable[str]) -> dict[str, Any] | None:
    """``author=Ada``, ``year=1843`` and ``{"draft": true}`` as one object; None without any.

    Values are JSON where they can be, else text.
    """
    found: dict[str, Any] = {}
    for value in values:
        key, sign, text = value.partition("=")
        try:
            found |= json.loads(value) if value.lstrip().startswith("{") else {key: json.loads(text)}
        except ValueError:
            if not sign or not key or value.lstrip().startswith("{"):
                raise click.BadParameter(f"{value!r} is neither KEY=VALUE nor a JSON object; try author=Ada") from None
            found[key] = text
    return found or None


def _writable(context: click.Context, parameter: click.Parameter, folder: Path | None) -> Path | None:
    """A folder that is there or can be made: looked at before a command works for hours."""
    if folder is not None:
        path = folder.absolute()
        place = next(each for each in (path, *path.parents) if os.path.lexists(each))
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            way_out = "name a folder that can be written in, or a new one"
            raise ConfigError(f"{parameter.opts[0]} ({folder}): {place} is not such a folder; {way_out}")
    return folder


def folder_option(name: str, **settings: Any) -> Callable[[Command], Command]:
    """An option that names a folder to write in; ``ConfigError`` where that is not possible."""
    return click.option(name, type=FOLDER, callback=_writable, **settings)


# options

_OPTIONS: dict[str, Any] = {
    "store": click.option(
        "--store", "path", type=FOLDER, default=Path("memory"), envvar="LONGMEM_STORE",
        help="Folder of the store; also LONGMEM_STORE.",
    ),
    "namespace": click.option(
        "--namespace", "-n", default="default", envvar="LONGMEM_NAMESPACE",
        help="Whose documents; also LONGMEM_NAMESPACE.",
    ),
    "any_namespace": click.option(
        "--namespace", "-n", envvar="LONGMEM_NAMESPACE",
        help="Of this namespace only; also LONGMEM_NAMESPACE. Default: of all.",
    ),
    "metadata": click.option(
        "--metadata", multiple=True, metavar="KEY=VALUE", type=TEXT, callback=_key_values,
        help="Or a JSON object; repeatable.",
    ),
    "where": click.option(
        "--where", multiple=True, metavar="KEY=VALUE", type=TEXT, callback=_key_values,
        help="Only documents with this metadata; repeatable, all must hold. VALUE is JSON, or else text.",
    ),
    "older_than": click.option(
        "--older-than",
        type=Parsed("DURATION", lambda text: time.time() - duration(text), "no duration; try 30d, 12h or 1.5y"),
        help="Only documents at least so old: 30d, 12h.",
    ),
    "before": click.option("--before", type=MOMENT, help="Only documents from before this date."),
    "model": click.option(
        "--model", envvar="LONGMEM_MODEL",
        help="LongMem checkpoint, run folder, or a causal LM by itself; also LONGMEM_MODEL. Default: the backbone that "
        "the store was made with.",
    ),
    "backbone": click.option("--backbone", help="Where the backbone is, if not where the checkpoint says."),
    "revision": click.option("--revision", help="Of a hub id."),
    "dtype": click.option(
        "--dtype", type=click.Choice(("auto", "float32", "bfloat16", "float16")), default="auto",
        help="Of the weights; auto: as saved.",
    ),
    "device": click.option("--device", default="auto", help="cpu, cuda, ...; auto takes a GPU if there is one."),
    "tokenizer": click.option("--tokenizer", help="Folder or hub id; default: that of the model's backbone."),
    "set": click.option(
        "--set", "reading", multiple=True, callback=lambda ctx, param, pairs: dict(pairs),
        type=Parsed("NAME=VALUE", _setting, "not a setting that may change and a number for it; try recency=0"),
        help="How memory is read, in place of the model's own recency, num_retrieved, memory_temperature; repeatable.",
    ),
    "max_new_tokens": click.option("--max-new-tokens", "-m", type=AT_LEAST_1, default=256, help="Of an answer."),
    "seed": click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Of all that is drawn."),
    "json": click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
}  # fmt: skip


def options(*names: str) -> Callable[[Command], Command]:
    """The options of these names, in this order; ``any_namespace`` is ``namespace`` where none means all."""
    return together(*(_OPTIONS[name] for name in names))


def together(*several: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Options as one decorator, in this order."""

    def decorate(function: Command) -> Command:
        for option in reversed(several):
            function = option(function)
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
    try:
        with open_store(path, "write" if writing else "read") as store:
            return store.layout
    except (StoreLocked, StoreDamaged):
        raise
    except StoreError:  # also where its maker was killed before it was complete
        return None


def check_namespace(store: MemoryStore, namespace: str) -> None:
    """Refuse a namespace without documents with a StoreError; it names those that there are."""
    there = store.namespaces()
    if unicodedata.normalize("NFC", namespace) not in there:
        names = ", ".join(there[:20]) + (", ..." if len(there) > 20 else "")
        ways = f"there are: {names}" if there else "the store is empty, `longmem memory add` fills it"
        raise StoreError(f"{store.path}: no namespace {namespace!r}; {ways}")


def load_model(
    name: str | None,
    layout: Layout | None,
    *,
    device: str = "auto",
    backbone: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    reading: Mapping[str, Any] | None = None,
    talking: bool = False,
) -> tuple[Any, str]:
    """The model that the options name, for a store of this layout, and where its tokenizer is.

    A causal language model by itself reads memory in the layers that the store remembers, nothing trained. Without a
    name it is the backbone that the store was made with.

    Args:
        layout: None is a new store.
        reading: settings in place of the model's own.
        talking: without a name, a new store or one of its backbone gets the default model, which may be fetched; and
            heads that nothing was trained for take nothing from memory.

    Raises:
        StoreError: no model is named, or the one that the store names cannot be loaded.
        ConfigError, CheckpointError, BackboneError: no such device, or no such model.
    """
    from longmem import LongMem, MemTRM, TrainingFree
    from longmem.modeling.checkpoints import checked_device, checkpoint_folder, model_type, tokenizer_beside
    from longmem.modeling.loading import default_checkpoint, default_model

    if talking and name is None and (layout is None or default_checkpoint(layout)):
        chosen = default_model(say, layout)
        name, backbone = str(chosen.checkpoint), str(chosen.backbone)
    if name is None and layout is None:
        raise StoreError("a new store needs the model whose memory it is to hold; name it with --model")
    place, folder = checked_device(device), name or (layout.backbone if layout else "")
    how: dict[str, Any] = {"revision": revision, "dtype": dtype, **(reading or {})}
    try:
        folder = folder if name is None else checkpoint_folder(folder)
        kinds = {each.config_class.model_type: each for each in (LongMem, MemTRM, TrainingFree)}
        kind: Any = kinds.get("" if name is None else model_type(folder))
        if kind is not None:
            model = kind.from_pretrained(folder, backbone=backbone, **how)
        elif backbone is not None:
            raise StoreError(f"--backbone is for a checkpoint of ours; {folder} is a causal language model by itself")
        else:
            if name is None and not Path(folder).is_dir():
                how["local_files_only"] = True  # --model is there to ask for a download
            if talking:
                how["gate"] = 0.0
                say(f"{folder} has no trained gates, so memory reaches it as passages in its window, not by its heads; "
                    "longmem calibrate trains some")  # fmt: skip
            layers = None if layout is None else layout.memory_layers
            model = TrainingFree.from_backbone(folder, memory_layers=layers, **how)
    except (CheckpointError, BackboneError) as error:
        if name is not None:
            raise
        raise StoreError(f"the store's backbone cannot be loaded: {error}; name the model with --model") from error
    return model.to(place).eval(), tokenizer_beside(folder, model.config.backbone_name_or_path)


def open_with_model(
    given: dict[str, Any], mode: str = "write", *, create: bool = False, talking: bool = False, **settings: Any
) -> MemoryStore:
    """The store ``path``, with the model and the tokenizer that the other options in ``given`` name."""
    from longmem.data.tokens import load_tokenizer
    from longmem.store.store import MemoryStore

    where = {name: given[name] for name in ("device", "backbone", "reading") if name in given}
    layout = layout_of(given["path"], writing=mode == "write")
    model, beside = load_model(given["model"], layout, talking=talking, **where)
    if "tokenizer" in given:
        settings["tokenizer"] = load_tokenizer(given["tokenizer"] or beside, model)
    return MemoryStore.open(given["path"], mode=mode, model=model, create=create, **settings)  # type: ignore[arg-type]


# printing: data on stdout, all else on stderr


def say(line: str) -> None:
    """A remark on stderr."""
    click.echo(line, err=True)


def print_json(value: object) -> None:
    """One JSON document; records are objects, paths are texts."""
    click.echo(json.dumps(value, indent=1, ensure_ascii=False, default=_plain))


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def show(as_json: bool, value: dict[str, Any], heads: Sequence[str] = ()) -> None:
    """Print a result as JSON; or its lists of records as tables with these columns, and all else a line for each."""
    if as_json:
        print_json(value)
        return
    for key, each in value.items():
        if heads and isinstance(each, list):
            records = [record if isinstance(record, dict) else _plain(record) for record in each]
            rows = [[cell(record[head], head) for head in heads] for record in records]
            for line in columns(heads, rows) if rows else []:
                click.echo(line)
        else:
            click.echo(f"{key:<14}  {cell(each, key)}")


def columns(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Aligned columns, numbers to the right; a line is never cut."""
    lines = [list(heads), *map(list, rows)]
    for at, column in enumerate(zip(*lines, strict=True)):
        right = len(lines) > 1 and all(re.fullmatch(r"[\d,.%+-]+", each) for each in column[1:])
        width = max(map(len, column))
        for line in lines:
            line[at] = line[at].rjust(width) if right else line[at].ljust(width)
    yield from ("  ".join(line).rstrip() for line in lines)


def cell(value: object, key: str = "") -> str:
    """A value as text within a line; ``key`` tells moments from other numbers."""
    if value is None or value == {}:
        return "-"
    if isinstance(value, float):
        return datetime.fromtimestamp(value).isoformat(" ", "seconds") if key in _MOMENTS else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict):
        value = ", ".join(f"{name}={each}" for name, each in value.items())
        value = value if len(value) <= LONGEST_METADATA else f"{value[:LONGEST_METADATA]} ..."
    return one_line(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))


def one_line(text: str) -> str:
    """Text within a line: white space as single blanks, no control characters."""
    return "".join(sign if sign.isprintable() else "·" for sign in " ".join(text.split()))


def counted(number: int, what: str) -> str:
    """``1 document``, ``2,000 documents``."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


class ShownProgress(Progress):
    """Progress of a store's long work, a line on stderr for every step; called with how far it is."""

    def __init__(self) -> None:
        super().__init__("")

    def __call__(self, progress: StoreProgress) -> None:
        words = {"encode": "encoding", "check": "checking", "rewrite": "rewriting", "copy": "copying"}
        if self.what != words[progress.step] or progress.done < self.done:  # a repair checks once more
            self.__exit__()
            super().__init__(words[progress.step], progress.total, progress.unit)
        self.advance(progress.done - self.done, one_line(progress.name)[-40:])
