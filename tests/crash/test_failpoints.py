"""A writer is killed at every named point of every operation: the store is exactly as before or after, and whole."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.crash.aftermath import after_kill
from tests.crash.forks import ROOT, Forks
from tests.crash.operations import OPERATIONS, State, read_state, states_of
from tests.store.small import quick_folder

from longmem.errors import StoreError
from longmem.store.durable import FAILPOINTS, _Armed

WORK = "tests.crash.operations"
EVERYWHERE = {"create.folder", "lock.taken", "seal.", "file.", "commit.", "close."}
"""Points of nearly all operations."""


class Prepared:
    """Every operation's store before it, its states, and how often it comes to which failpoint."""

    def __init__(self, folder: Path, forks: Forks) -> None:
        self._folder = folder
        self._forks = forks
        self._states: dict[str, list[State]] = {}
        self._counts: dict[str, dict[str, int]] = {}

    def copy(self, operation: str, to: Path) -> Path:
        """What is there before an operation, the store at ``store``."""
        made = self._folder / operation
        if not made.exists():
            made.mkdir()
            OPERATIONS[operation].prepare(made / "store")
        shutil.copytree(made, to)
        return to / "store"

    def states(self, operation: str) -> list[State]:
        """Before the operation, and after each of its promises."""
        if operation not in self._states:
            (self._folder / "states").mkdir(exist_ok=True)
            with quick_folder() as folder:
                self._states[operation] = states_of(OPERATIONS[operation], folder / "store")
        return self._states[operation]

    def counts(self, operation: str) -> dict[str, int]:
        """How often it comes to each failpoint."""
        if operation not in self._counts:
            with quick_folder() as folder:
                path = self.copy(operation, folder / "trial")
                ending = self._forks.run(f"{WORK}:count", operation=operation, path=path)
                assert ending.fine, ending
                self._counts[operation] = ending.said[0]
        return self._counts[operation]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Prepared:
    return Prepared(tmp_path_factory.mktemp("prepared"), forks)


def trials(name: str, prepared: Prepared, every: bool) -> list[tuple[str, int]]:
    """Operations that come to a failpoint, and the how manieth time to die at."""
    reached = [(operation, prepared.counts(operation).get(name, 0)) for operation in OPERATIONS]
    if every:
        return [(operation, nth) for operation, count in reached for nth in range(1, count + 1)]
    found = [(operation, count) for operation, count in reached if count]
    if name.startswith(tuple(EVERYWHERE)):  # three operations, others for every point
        begin = FAILPOINTS.index(name) % max(1, len(found))
        found = [(found * 2)[begin + step] for step in range(min(3, len(found)))]
    return [(operation, nth) for operation, count in found for nth in sorted({1, count})]


def kill(name: str, operation: str, nth: int, folder: Path, prepared: Prepared, forks: Forks) -> None:
    path = prepared.copy(operation, folder / "trial")
    ending = forks.run(f"{WORK}:do", operation=operation, path=path, failpoint=f"{name}:{nth}")
    assert ending.signal == signal.SIGKILL, f"{operation} was not killed at {name}:{nth}: {ending}"
    after_kill(path, operation, prepared.states(operation), len(ending.said))
    shutil.rmtree(folder / "trial")


@pytest.mark.parametrize("name", FAILPOINTS)
def test_killed_at_a_named_point_leaves_exactly_before_or_after(
    name: str, folder: Path, prepared: Prepared, forks: Forks
) -> None:
    chosen = trials(name, prepared, every=False)
    assert chosen, f"no operation comes to {name}"
    for operation, nth in chosen:
        kill(name, operation, nth, folder, prepared, forks)


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_at_every_point_every_time(
    operation: str, folder: Path, prepared: Prepared, forks: Forks, record_property: Callable[[str, object], None]
) -> None:
    for name, count in prepared.counts(operation).items():
        for nth in range(1, count + 1):
            kill(name, operation, nth, folder, prepared, forks)
    record_property("kills", sum(prepared.counts(operation).values()))


def test_all_operations_come_to_named_points_only(prepared: Prepared) -> None:
    reached = {name for operation in OPERATIONS for name in prepared.counts(operation)}
    assert reached == set(FAILPOINTS)


def test_the_environment_arms_a_point(folder: Path, prepared: Prepared) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.crash.operations import OPERATIONS as o; "
        "o['forget'].run(Path(sys.argv[1]), print)"
    )
    path = prepared.copy("forget", folder / "trial")
    environment = {**os.environ, "LONGMEM_FAILPOINT": "forget.committed", "OMP_NUM_THREADS": "1"}
    child = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, env=environment, check=False)
    assert child.returncode == -signal.SIGKILL
    assert read_state(path) == prepared.states("forget")[-1]


def test_an_unknown_point_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(
        StoreError, match=r"LONGMEM_FAILPOINT \(nowhere:2\) names no failpoint; there are: create.folder"
    ):
        _Armed("nowhere:2")
