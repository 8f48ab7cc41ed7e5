"""Where a command writes: looked at before it works for hours."""

from __future__ import annotations

import os
from pathlib import Path

import click

from longmem.errors import ConfigError


def folder_to_write(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """Callback of ``--out`` and its like: a folder that is there, or can be made.

    Raises:
        ConfigError: a file is where the folder or one above it should be, or nothing may be written there.
    """
    if value is not None:
        _look_at(value, parameter.opts[0])
    return value


def file_to_write(context: click.Context, parameter: click.Parameter, value: Path) -> Path:
    """The same for a file, whose folder is made where it is not there.

    Raises:
        ConfigError: see ``folder_to_write``.
    """
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
