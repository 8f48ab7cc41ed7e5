"""What a run says of its progress."""

from __future__ import annotations

import pytest

from longmem.progress import Progress, clock


@pytest.mark.parametrize(
    ("done", "total", "more", "line"),
    [
        (0, 8, 2, "x: 2 of 8 steps (25 %), 30 s left"),
        (4, 8, 1, "x: 5 of 8 steps (62 %), 30 s left"),  # 10 s a step: the four of before took no time of this run
        (4, 8, 0, "x: 4 of 8 steps (50 %)"),
        (8, 8, 0, "x: 8 of 8 steps (100 %)"),
        (4, 8, 6, "x: 10 of 8 steps (125 %), 0 s left"),
        (4, None, 1, "x: 5 steps in 10 s"),
    ],
)
def test_the_time_left_is_that_of_what_was_done_since(done: int, total: int | None, more: int, line: str) -> None:
    progress = Progress("x", total, "steps", quiet=True)
    progress.done = progress.before = done
    progress.advance(more)
    assert progress.line(10.0) == line


def test_in_a_log_file_a_line_comes_when_its_time_has_come(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("longmem.progress.time.monotonic", lambda: now[0])
    with Progress("encoding", 40, "tokens") as progress:
        for seconds in (9.0, 10.0, 15.0, 20.0):
            now[0] = seconds
            progress.advance(1, "book.txt")
    assert capsys.readouterr().err.splitlines() == [
        "encoding: 2 of 40 tokens (5 %), 3 min 10 s left, book.txt",
        "encoding: 4 of 40 tokens (10 %), 3 min 00 s left, book.txt",
    ]


@pytest.mark.parametrize(("seconds", "shown"), [(59.4, "59 s"), (60, "1 min 00 s"), (7265, "2 h 01 min")])
def test_a_clock_shows_what_matters(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown
