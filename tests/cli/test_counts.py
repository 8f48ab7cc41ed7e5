"""Numbers of tokens as options take them."""

from __future__ import annotations

import click
import pytest

from longmem.cli.counts import TokenCount, token_counts


@pytest.mark.parametrize(("said", "count"), [("8192", 8192), ("8k", 8192), ("2M", 2 << 20), (" 1k ", 1024), (5, 5)])
def test_a_count_may_be_short(said: object, count: int) -> None:
    assert TokenCount().convert(said, None, None) == count


@pytest.mark.parametrize(
    ("said", "line"),
    [("8q", "'8q' is not a token count; try 8192 or 8k"), ("k", "try 8192 or 8k"), ("0", "0 must be at least 2")],
)
def test_what_is_no_count_is_named(said: str, line: str) -> None:
    with pytest.raises(click.BadParameter, match=line):
        TokenCount(2).convert(said, None, None)


def test_several_counts_stand_between_commas() -> None:
    command = click.Command("any")
    context, option = click.Context(command), click.Option(["--sizes"])
    assert token_counts(context, option, "1024, 8k,1m,") == [1024, 8192, 1 << 20]
    assert token_counts(context, option, None) is None
    with pytest.raises(click.BadParameter, match="'8k,x' is not a list of token counts"):
        token_counts(context, option, "8k,x")
