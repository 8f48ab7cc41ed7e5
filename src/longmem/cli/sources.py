"""Texts for commands that have no recipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from longmem.errors import DataError

_IN_A_RECIPE = {
    "; check the path, or the recipe's data.paths and data.valid": "; check the path",
    "convert it, exclude it, or set data.undecodable = 'skip' or 'replace'": "convert it, or name other files",
    "; set data.suffixes": "; name other files by themselves",
    "; set data.field": "; rename the field that has it to 'text'",
}


@contextmanager
def no_recipe() -> Iterator[None]:
    """The readers' errors speak of a recipe's settings; here they name the way out that is left without one.

    Raises:
        DataError: in other words.
    """
    try:
        yield
    except DataError as error:
        line = str(error)
        for setting, way_out in _IN_A_RECIPE.items():
            line = line.replace(setting, way_out)
        raise DataError(line) from error
