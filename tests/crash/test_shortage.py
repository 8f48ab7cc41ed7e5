"""Writes fail, everywhere: the disk is full, a file may not grow, a folder is read-only.

One clear line, the state as before for the same process and for others, and the work goes on once there is room.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.crash.forks import Ending, Forks
from tests.crash.operations import OPERATIONS

WORK = "tests.crash.shortage"
Record = Callable[[str, object], None]
SIZES = [0, 60, 1500, 2047, 3000, 7000, 12_000, 20_000, 28_000, 33_000, 50_000, 70_000, 75_000, 100_000, 150_000]
"""Bytes that a file may have: below and above those of the seal, the lock, data files, shared memory, catalog, log."""
ROOM = [0, 4096, 8192, 12288, 20480, 36864, 45056, 61440, 81920, 102400, 131072, 180224, 262144]
"""Bytes that are left on the disk."""


def check(ending: Ending) -> list[tuple[str, str] | None]:
    """The errors of the trials, each one line."""
    assert ending.fine, ending
    errors = [what for kind, what in ending.said if kind == "error"]
    for name, line in (each for each in errors if each is not None):
        assert name in ("StoreFull", "StoreDamaged", "StoreError")
        assert line and "\n" not in line and len(line) < 500, line
    return errors


def kinds(errors: list[tuple[str, str] | None]) -> set[str]:
    return {error[0] for error in errors if error is not None}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_full_disk_at_any_write_changes_nothing(operation: str, folder: Path, forks: Forks) -> None:
    begin = list(OPERATIONS).index(operation) % 4 + 1
    ending = forks.run(
        f"{WORK}:failing_calls", operation=operation, scratch=folder, code="ENOSPC", lasting=True, begin=begin, step=4
    )
    errors = check(ending)
    assert kinds(errors) == {"StoreFull"}


@pytest.mark.slow
@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EROFS", "EIO"])
@pytest.mark.parametrize("lasting", [True, False], ids=["lasting", "once"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_call_of_the_file_system_fails_once(
    operation: str, lasting: bool, code: str, folder: Path, forks: Forks, record_property: Record
) -> None:
    ending = forks.run(f"{WORK}:failing_calls", operation=operation, scratch=folder, code=code, lasting=lasting)
    errors = check(ending)
    record_property("calls that failed", len(errors))
    assert kinds(errors) <= ({"StoreDamaged"} if code == "EIO" else {"StoreFull"})


@pytest.mark.parametrize("operation", OPERATIONS)
def test_files_that_may_not_grow_change_nothing(operation: str, folder: Path, forks: Forks) -> None:
    number = list(OPERATIONS).index(operation)
    ending = forks.run(f"{WORK}:limited", operation=operation, scratch=folder, limits=SIZES[number % 4 :: 4])
    assert kinds(check(ending)) <= {"StoreFull"}


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_files_that_may_not_grow_beyond_any_size(
    operation: str, folder: Path, forks: Forks, record_property: Record
) -> None:
    ending = forks.run(f"{WORK}:limited", operation=operation, scratch=folder, limits=list(range(0, 120_000, 1777)))
    errors = check(ending)
    record_property("size limits", len(errors))
    assert kinds(errors) <= {"StoreFull"}
    assert errors[0] is not None


def on_small_disk(operation: str, folder: Path, forks: Forks, free: list[int]) -> list[Any]:
    ending = forks.run(f"{WORK}:on_small_disk", operation=operation, scratch=folder, bytes=1 << 20, free=free)
    if ending.said == ["no disk"]:
        pytest.skip("this system does not let a process have a file system of its own")
    return check(ending)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_small_disk_that_is_full_changes_nothing(operation: str, folder: Path, forks: Forks) -> None:
    number = list(OPERATIONS).index(operation)
    assert kinds(on_small_disk(operation, folder, forks, ROOM[number % 4 :: 4])) <= {"StoreFull"}


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_small_disk_with_any_room_left_changes_nothing(
    operation: str, folder: Path, forks: Forks, record_property: Record
) -> None:
    errors = on_small_disk(operation, folder, forks, list(range(0, 280_000, 4096)))
    record_property("full disks", len(errors))
    assert kinds(errors) <= {"StoreFull"}
    assert errors[-1] is None


@pytest.mark.parametrize("during", [False, True], ids=["before opening", "behind the open store"])
@pytest.mark.parametrize("part", [".", "segments", "staging", "catalog.sqlite", "writer.lock"])
def test_a_part_that_may_not_be_written_changes_nothing(part: str, during: bool, folder: Path, forks: Forks) -> None:
    ending = forks.run(f"{WORK}:read_only_folder", scratch=folder, what=[part], during=during)
    assert ending.fine, ending
    ((_, error),) = ending.said
    if error is not None:
        assert error[0] == "StoreFull" and "\n" not in error[1]
    assert error is not None or (during and part in ("catalog.sqlite", "writer.lock")), "it was open already"


@pytest.mark.parametrize("killed", [False, True], ids=["closed", "left by a killed writer"])
def test_a_read_only_disk_can_be_read_and_not_written(killed: bool, folder: Path, forks: Forks) -> None:
    ending = forks.run(f"{WORK}:read_only_disk", scratch=folder, killed=killed)
    if ending.said == ["no disk"]:
        pytest.skip("this system does not let a process have a file system of its own")
    assert ending.fine, ending
    problems, error = ending.said
    assert problems == []
    assert error[0] == "StoreFull" and "\n" not in error[1]
