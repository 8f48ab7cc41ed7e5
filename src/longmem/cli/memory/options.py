"""Options that several commands share, and what their values mean."""

from __future__ import annotations

import json
import re
import time as clock
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400, "y": 365 * 86_400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdwy])")
_SECONDS = re.compile(r"\d{9,}(\.\d+)?|\d+\.\d+")


def duration(text: str) -> float | None:
    """Seconds of ``30d``, ``12h``, ``1.5y``; None for anything else."""
    match = _DURATION.fullmatch(text.strip().lower())
    return None if match is None else float(match[1]) * _UNITS[match[2]]


def moment(value: object) -> float:
    """Seconds since the epoch of a date, a date and time (local unless it says otherwise), or such seconds.

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    text = str(value).strip()
    return float(text) if _SECONDS.fullmatch(text) else datetime.fromisoformat(text).timestamp()


def expiry(value: object, now: float | None = None) -> float:
    """A moment, or a duration from now on.

    Raises:
        ValueError: it is neither.
    """
    ahead = duration(value) if isinstance(value, str) else None
    if ahead is None:
        return moment(value)
    return (clock.time() if now is None else now) + ahead


class _Parsed(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions of click only
    """A value that one of the functions above reads."""

    def __init__(self, name: str, read: Callable[[str], float | None], example: str) -> None:
        self.name = name
        self._read = read
        self._example = example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            found = self._read(str(value))
        except (ValueError, OverflowError):
            found = None
        if found is None:
            self.fail(f"{value!r} is no {self.name.lower()}; try {self._example}", param, ctx)
        return found


MOMENT = _Parsed("DATE", moment, "2026-01-31 or 2026-01-31T18:30")
DURATION = _Parsed("DURATION", duration, "30d, 12h or 1.5y")
EXPIRY = _Parsed("WHEN", expiry, "30d, 12h or 2026-01-31")


def key_values(context: click.Context, parameter: click.Parameter, values: Iterable[str]) -> dict[str, Any] | None:
    """``--metadata author=Ada --metadata year=1843 --metadata '{"draft": true}'`` as one object; None without any."""
    found: dict[str, Any] = {}
    for value in values:
        if value.lstrip().startswith("{"):
            try:
                given = json.loads(value)
            except ValueError as error:
                raise click.BadParameter(f"{value!r} is not JSON ({error})") from None
            found.update(given)
            continue
        key, sign, text = value.partition("=")
        if not sign or not key:
            raise click.BadParameter(f"{value!r} is neither KEY=VALUE nor a JSON object; try author=Ada")
        found[key] = _value(text)
    return found or None


def _value(text: str) -> Any:
    """Numbers, true, false, null, lists and objects as JSON has them; all else is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def store_option(function: Command) -> Command:
    """``--store``."""
    return click.option(
        "--store",
        "path",
        type=click.Path(path_type=Path),
        default=Path("memory"),
        show_default=True,
        envvar="LONGMEM_STORE",
        help="Folder of the store; also LONGMEM_STORE.",
    )(function)


def namespace_option(function: Command) -> Command:
    """``--namespace``, one of them."""
    return click.option(
        "--namespace",
        "-n",
        default="default",
        show_default=True,
        envvar="LONGMEM_NAMESPACE",
        help="Whose documents; also LONGMEM_NAMESPACE.",
    )(function)


def any_namespace_option(function: Command) -> Command:
    """``--namespace`` where none means all."""
    return click.option(
        "--namespace",
        "-n",
        envvar="LONGMEM_NAMESPACE",
        help="Of this namespace only; also LONGMEM_NAMESPACE. Default: of all.",
    )(function)


def json_option(function: Command) -> Command:
    """``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(function)


def where_option(function: Command) -> Command:
    """``--where``."""
    return click.option(
        "--where",
        multiple=True,
        metavar="KEY=VALUE",
        callback=key_values,
        help="Only documents with this metadata; repeatable, all must hold. VALUE is JSON, or else text.",
    )(function)


def model_options(function: Command) -> Command:
    """``--model`` and ``--device``."""
    for option in reversed(
        [
            click.option(
                "--model",
                envvar="LONGMEM_MODEL",
                help="LongMem checkpoint, run folder, or a causal LM by itself; also LONGMEM_MODEL. "
                "Default: the backbone that the store was made with.",
            ),
            click.option(
                "--device", default="auto", show_default=True, help="cpu, cuda, ...; auto takes a GPU if there is one."
            ),
        ]
    ):
        function = option(function)
    return function


def tokenizer_option(function: Command) -> Command:
    """``--tokenizer``."""
    return click.option("--tokenizer", help="Folder or hub id; default: that of the model's backbone.")(function)
