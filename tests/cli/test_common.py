"""What the values of options mean, and what is printed."""

import json
import time
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import click
import pytest

import longmem.progress
from longmem.cli.common import Parsed, ShownProgress, columns, duration, expiry, moment, print_json, show, token_count
from longmem.cli.common import token_counts as counts
from longmem.store import Progress


def test_durations_moments_and_expiries() -> None:
    said = {"45s": 45, "10m": 600, "12h": 43200, "30d": 2592000, "1.5w": 907200, "1Y": 31536000, " 2d ": 172800}
    assert {text: duration(text) for text in said} == said
    assert moment("2026-01-31T12:00:00+00:00") == datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()
    assert moment("2026-01-31") == datetime(2026, 1, 31).timestamp()  # local time
    assert moment("1700000000") == moment(1700000000) == 1700000000.0
    assert expiry("2d") == pytest.approx(time.time() + 172800, abs=60)
    assert expiry("2026-01-31") == moment("2026-01-31") and expiry(5) == 5.0
    for read, wrong in [(duration, text) for text in ("", "d", "30", "-1d", "3 months", "2026-01-31")] + [
        (moment, value) for value in ("yesterday", "12", True, None, float("nan"))
    ]:  # type: Any, Any
        with pytest.raises(ValueError):
            read(wrong)


@pytest.mark.parametrize(("said", "number"), [("8192", 8192), ("8k", 8192), ("2M", 2 << 20), (" 1k ", 1024), (5, 5)])
def test_a_count_may_be_short(said: object, number: int) -> None:
    assert token_count().convert(said, None, None) == number
    assert counts(None, None, f"{said},3k,3k,") == [number, 3072]  # type: ignore[arg-type]


@pytest.mark.parametrize("said", ["8q", "k", "0", "1"])
def test_what_is_no_count_is_named(said: str) -> None:
    with pytest.raises(click.BadParameter, match=f"'{said}' is no token count of at least 2; try 8192 or 8k"):
        token_count(2).convert(said, None, None)
    for some in ("8k,x", "8k,0", "-8k", ","):
        with pytest.raises(click.BadParameter, match=f"'{some}' is not a list of token counts"):
            counts(None, None, some)  # type: ignore[arg-type]


def test_a_result_is_lines_and_tables_or_one_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"name": "a" * 30, "tokens": 5, "x": 0}, {"name": "two\nlines \x1b[31m\x07", "tokens": 12345, "x": 1}]
    result = {
        "path": Path("a/b"),
        "said": {"k": 1},
        "long": {"k": "x" * 900},
        "expires": None,
        "share": 0.123456,
        "rows": rows,
    }
    show(False, result, ("name", "tokens"))
    assert capsys.readouterr().out.splitlines() == [
        "path            a/b",
        "said            k=1",
        f"long            k={'x' * 198} ...",  # JSON has all of it
        "expires         -",
        "share           0.1235",
        "name                            tokens",
        f"{'a' * 30}       5",
        f"{'two lines ·[31m·':<30}  12,345",  # text from a store cannot command a terminal
    ]
    show(True, result)
    assert json.loads(capsys.readouterr().out) == {**result, "path": "a/b"}
    print_json({1: (2, [3.5]), "p": Progress("encode", 1, None, "tokens", "x")})
    record = {"step": "encode", "done": 1, "total": None, "unit": "tokens", "name": "x"}
    assert json.loads(capsys.readouterr().out) == {"1": [2, [3.5]], "p": record}
    assert list(columns(("a",), [])) == ["a"]
    with pytest.raises(click.BadParameter, match="'x' is no number"):
        Parsed("N", float, "no number").convert("x", None, None)


def test_progress_is_a_line_on_stderr_for_every_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(longmem.progress, "EVERY", {True: 0.0, False: 0.0})
    monkeypatch.setattr("longmem.progress.time.monotonic", count(0, 10).__next__)
    with ShownProgress() as progress:
        progress(Progress("encode", 2000, None, "tokens", "b.txt"))
        progress(Progress("check", 5, 5000, "bytes", "c"))
        progress(Progress("check", 2, 5000, "bytes", "c"))  # once more from the beginning, as a repair checks
    out, err = capsys.readouterr()
    assert (out, err.splitlines()) == (
        "",
        [
            "encoding: 2,000 tokens in 10 s, b.txt",
            "checking: 5 of 5,000 bytes (0 %), c",
            "checking: 2 of 5,000 bytes (0 %), c",
        ],
    )
