"""Where a command writes: looked at before it works for hours."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from longmem.errors import ConfigError

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def folder_option(name: str, **settings: Any) -> Callable[[Decorated], Decorated]:
    """An option that names a folder to write in: one that is there, or can be made.

    The command line ends with ``ConfigError`` where a file is in the folder's place or above it, or where nothing may
    be written.

    Args:
        name: of the option.
        settings: of ``click.option``.
    """
    return click.option(name, type=click.Path(path_type=Path), callback=_folder, **settings)


def file_option(name: str, **settings: Any) -> Callable[[Decorated], Decorated]:
    """The same for a file, whose folder is made where it is not there."""
    return click.option(name, type=click.Path(path_type=Path, dir_okay=False), callback=_file, **settings)


def _folder(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    if value is not None:
        _look_at(value, parameter.opts[0])
    return value


def _file(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    if value is not None:
        _look_at(value.parent, parameter.opts[0])
    return value


def _look_at(folder: Path, option: str) -> None:
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"{option} ({folder}): {place} is not a folder; name a folder, or a new one")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{option} ({folder}): nothing may be written in {place}; name another folder")
