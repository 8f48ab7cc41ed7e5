"""Options that several commands share, and what their values mean."""

from __future__ import annotations

import json
import math
import os
import re
import time as clock
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import click

from longmem.errors import ConfigError, DataError

Command = TypeVar("Command", bound=Callable[..., Any])

FOLDER = click.Path(path_type=Path)
DTYPES = ("auto", "float32", "bfloat16", "float16")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400, "y": 365 * 86_400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdwy])")
_SECONDS = re.compile(r"\d{9,}(\.\d+)?|\d+\.\d+")
_SIZES = {"k": 1 << 10, "m": 1 << 20}


# values


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


def tokens(word: str) -> int:
    """``8192``, or ``8k``: k is 1,024 and m is 1,024k; ValueError for anything else."""
    word = word.strip().lower()
    return int(word[:-1]) * _SIZES[word[-1]] if word[-1:] in _SIZES else int(word)


class _Parsed(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """A value that one of the functions above reads."""

    def __init__(self, name: str, read: Callable[[str], float], said: str, *, least: float | None = None) -> None:
        self.name, self._read, self._said, self._least = name, read, said, least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            found = value if isinstance(value, int | float) else self._read(str(value))
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is {self._said}", param, ctx)
        if self._least is not None and found < self._least:
            self.fail(f"{value} must be at least {self._least}", param, ctx)
        return found


MOMENT = _Parsed("DATE", moment, "no date; try 2026-01-31 or 2026-01-31T18:30")
DURATION = _Parsed("DURATION", duration, "no duration; try 30d, 12h or 1.5y")
EXPIRY = _Parsed("WHEN", expiry, "no when; try 30d, 12h or 2026-01-31")


def token_count(least: int = 1) -> _Parsed:
    """The type of an option that takes one number of tokens."""
    return _Parsed("tokens", tokens, "not a token count; try 8192 or 8k", least=least)


def by_comma(kind: Callable[[str], Any], said: str) -> Callable[..., Any]:
    """Callback of options that take several values by comma; None stays None."""

    def read(context: click.Context, parameter: click.Parameter, value: str | None) -> list[Any] | None:
        try:
            return None if value is None else [kind(word.strip()) for word in value.split(",") if word.strip()]
        except ValueError:
            raise click.BadParameter(f"{value!r} is not a list of {said}") from None

    return read


token_counts = by_comma(tokens, "token counts; try 1024,8k,64k")


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


def _writable(context: click.Context, parameter: click.Parameter, folder: Path | None) -> Path | None:
    """A folder that is there or can be made: looked at before a command works for hours."""
    if folder is None:
        return None
    option, place = parameter.opts[0], folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"{option} ({folder}): {place} is not a folder; name a folder, or a new one")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{option} ({folder}): nothing may be written in {place}; name another folder")
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
        "--dtype", type=click.Choice(DTYPES), default="auto", help="Of the weights; auto: as saved."
    ),
    "device": click.option("--device", default="auto", help="cpu, cuda, ...; auto takes a GPU if there is one."),
    "tokenizer": click.option("--tokenizer", help="Folder or hub id; default: that of the model's backbone."),
    "seed": click.option("--seed", type=click.IntRange(min=0), default=0, help="Of all that is drawn."),
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
