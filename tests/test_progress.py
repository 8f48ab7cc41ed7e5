"""What a run says of its progress."""

import pytest

from longmem.progress import Progress, clock


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("longmem.progress.time.monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("done", "total", "more", "line"),
    [
        (0, 8, (1, 2), "x: 3 of 8 steps (37 %), 25 s left"),  # 5 s a step since the first
        (4, 8, (1, 1), "x: 6 of 8 steps (75 %), 20 s left"),  # the four of before took no time of this run
        (0, 8, (0, 1), "x: 1 of 8 steps (12 %)"),  # nothing done yet is no beginning
        (0, 8, (3, 0), "x: 3 of 8 steps (37 %)"),  # what was done at once at first says nothing of the rest
        (4, 8, (1, 5), "x: 10 of 8 steps (125 %), 0 s left"),
        (4, None, (1,), "x: 5 steps in 20 s"),
    ],
)
def test_the_time_left_is_that_of_what_was_done_since_the_first(
    done: int, total: int | None, more: tuple[int, ...], line: str, clocked: list[float]
) -> None:
    progress = Progress("x", total, "steps", quiet=True)
    progress.done = done
    for amount in more:
        clocked[0] += 10
        progress.advance(amount)
    assert progress.line(20.0) == line


def test_in_a_log_file_a_line_comes_when_its_time_has_come(
    clocked: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("encoding", 40, "tokens") as progress:
        for seconds in (9.0, 10.0, 15.0, 20.0):
            clocked[0] = seconds
            progress.advance(1, "book.txt")
    assert capsys.readouterr().err.splitlines() == [
        "encoding: 2 of 40 tokens (5 %), 38 s left, book.txt",
        "encoding: 4 of 40 tokens (10 %), 2 min 12 s left, book.txt",
    ]


@pytest.mark.parametrize(("seconds", "shown"), [(59.4, "59 s"), (60, "1 min 00 s"), (7265, "2 h 01 min")])
def test_a_clock_shows_what_matters(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown
