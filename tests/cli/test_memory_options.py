"""What the values of options mean, and how progress is shown."""

from __future__ import annotations

import io
import sys
from datetime import UTC, datetime
from typing import Any

import pytest

from longmem.cli.memory import printing
from longmem.cli.memory.options import duration, expiry, moment
from longmem.cli.memory.printing import ShownProgress, as_plain, one_line, print_columns
from longmem.store.records import Progress


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("45s", 45), ("10m", 600), ("12h", 43200), ("30d", 2592000), ("1.5w", 907200), ("1Y", 31536000), (" 2d ", 172800)],
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "d", "30", "-1d", "3 months", "2026-01-31"])
def test_what_is_no_duration(text: str) -> None:
    assert duration(text) is None


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


def test_columns_are_aligned_and_nothing_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    print_columns(("name", "tokens"), [("a" * 300, 5), ("b", 12345)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "a" * 300 + "       5"
    assert lines[2] == "b" + " " * 299 + "  12,345"


def test_text_from_a_store_cannot_command_a_terminal() -> None:
    assert one_line("a\n\tb \x1b[31mred\x07") == "a b ·[31mred·"


def test_records_become_plain_json() -> None:
    assert as_plain(Progress("encode", 1, None, "tokens", "x")) == {
        "step": "encode", "done": 1, "total": None, "unit": "tokens", "name": "x",
    }  # fmt: skip
    assert as_plain({1: (2, [3.5]), "p": object}) == {"1": [2, [3.5]], "p": str(object)}


def test_without_a_terminal_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ShownProgress() as progress:
        progress(Progress("encode", 10, 100, "tokens", "a.txt"))
        monkeypatch.setattr(printing, "_EVERY", 0.0)
        progress(Progress("encode", 2000, None, "tokens", "b.txt"))
        progress(Progress("check", 5, 5000, "bytes", "c"))
    assert capsys.readouterr() == ("", "encoded 2,000 tokens, at b.txt\nchecked 5 of 5,000 bytes, at c\n")


def test_on_a_terminal_progress_is_a_bar_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    with ShownProgress() as progress:
        progress(Progress("encode", 10, 100, "tokens", "[a].txt"))
        progress(Progress("encode", 100, 100, "tokens", "b.txt"))
        progress(Progress("check", 5, None, "bytes", "c"))
    drawn: Any = shown.getvalue()
    assert "encode b.txt" in drawn
    assert "100 of 100 tokens" in drawn
    assert "5 bytes" in drawn
    assert capsys.readouterr().out == ""
