"""What a run says of its progress."""

import pytest

from longmem.cli.common import ShownProgress
from longmem.progress import Progress, clock
from longmem.store import Progress as Step


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


def test_in_a_log_file_a_line_comes_when_its_time_has_come_and_each_step_of_a_store_begins_anew(
    clocked: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with ShownProgress() as progress:
        for seconds, step, done, total, unit in (
            (10, "encode", 2000, None, "tokens"),
            (19, "encode", 2900, None, "tokens"),
            (20, "encode", 3000, None, "tokens"),
            (25, "check", 5, 40, "bytes"),
            (35, "check", 7, 40, "bytes"),
            (36, "check", 2, 40, "bytes"),  # once more from the beginning, as a repair checks
            (46, "check", 4, 40, "bytes"),
        ):
            clocked[0] = seconds
            progress(Step(step, done, total, unit, "a\tb.txt"))
    out, err = capsys.readouterr()
    assert not out and err.splitlines() == [
        "encoding: 3,000 tokens in 10 s, a b.txt",
        "checking: 7 of 40 bytes (17 %), 2 min 45 s left, a b.txt",
        "checking: 4 of 40 bytes (10 %), 3 min 00 s left, a b.txt",
    ]


def test_a_clock_shows_what_matters() -> None:
    assert list(map(clock, (59.4, 60, 3600, 7265))) == ["59 s", "1 min 00 s", "1 h 00 min", "2 h 01 min"]
