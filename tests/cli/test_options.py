"""What the values of options mean."""

from __future__ import annotations

from datetime import UTC, datetime

import click
import pytest

from longmem.cli.options import duration, expiry, moment, token_count, token_counts


@pytest.mark.parametrize(("said", "count"), [("8192", 8192), ("8k", 8192), ("2M", 2 << 20), (" 1k ", 1024), (5, 5)])
def test_a_count_may_be_short(said: object, count: int) -> None:
    assert token_count().convert(said, None, None) == count


@pytest.mark.parametrize(
    ("said", "line"),
    [("8q", "'8q' is not a token count; try 8192 or 8k"), ("k", "try 8192 or 8k"), ("0", "0 must be at least 2")],
)
def test_what_is_no_count_is_named(said: str, line: str) -> None:
    with pytest.raises(click.BadParameter, match=line):
        token_count(2).convert(said, None, None)


def test_several_counts_stand_between_commas() -> None:
    command = click.Command("any")
    context, option = click.Context(command), click.Option(["--sizes"])
    assert token_counts(context, option, "1024, 8k,1m,") == [1024, 8192, 1 << 20]
    assert token_counts(context, option, None) is None
    with pytest.raises(click.BadParameter, match="'8k,x' is not a list of token counts"):
        token_counts(context, option, "8k,x")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("45s", 45), ("10m", 600), ("12h", 43200), ("30d", 2592000), ("1.5w", 907200), ("1Y", 31536000), (" 2d ", 172800)],
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "d", "30", "-1d", "3 months", "2026-01-31"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError):
        duration(text)


def test_moments_are_dates_or_seconds_since_the_epoch() -> None:
    assert moment("2026-01-31T12:00:00+00:00") == datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()
    assert moment("2026-01-31") == datetime(2026, 1, 31).timestamp()  # local time
    assert moment("20260131") == moment("2026-01-31")
    assert moment("1700000000") == moment(1700000000) == 1700000000.0
    assert moment("17.5") == 17.5
    for wrong in ("yesterday", "12", True, None):
        with pytest.raises(ValueError):
            moment(wrong)


def test_an_expiry_is_ahead_or_a_moment() -> None:
    assert expiry("2d", now=1000.0) == 1000.0 + 172800
    assert expiry("2026-01-31", now=1000.0) == moment("2026-01-31")
    assert expiry(5, now=1000.0) == 5.0
