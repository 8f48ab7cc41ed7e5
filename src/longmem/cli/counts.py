"""Numbers of tokens on the command line: 8192, or 8k; k is 1,024 and m 1,024k."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    _ParamType = click.ParamType[int]
else:
    _ParamType = click.ParamType  # before click 8.3 it takes no parameters

_SIZES = {"k": 1 << 10, "m": 1 << 20}


class TokenCount(_ParamType):
    """One number of tokens.

    Args:
        least: the smallest that is taken.
    """

    name = "tokens"

    def __init__(self, least: int = 1) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            count = value if isinstance(value, int) else _read(value)
        except ValueError:
            self.fail(f"{value!r} is not a token count; try 8192 or 8k", param, ctx)
        if count < self.least:
            self.fail(f"{value} must be at least {self.least}", param, ctx)
        return count


def token_counts(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    """Callback of options that take several, by comma: ``1024,8k,1m``."""
    if value is None:
        return None
    try:
        return [_read(word) for word in value.split(",") if word.strip()]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of token counts; try 1024,8k,64k") from None


def _read(word: str) -> int:
    word = word.strip().lower()
    return int(word[:-1]) * _SIZES[word[-1]] if word[-1:] in _SIZES else int(word)
