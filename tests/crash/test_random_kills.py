"""A writer is killed at random moments of a long life, and another one goes on with what it left, again and again."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.crash.aftermath import assert_clean, difference
from tests.crash.forks import Forks
from tests.crash.operations import read_state
from tests.crash.script import Moment, Step, moments_of, random_steps
from tests.store.small import open_small, state_of

LIFE = 30
"""Steps."""
LEFT_BY_KILLS = {"staging", "orphan"}


class Life:
    """A store and the child that changes it, killed and replaced by the next one.

    Attributes:
        kills: of children, so far.
        done: the child came to the end of the life.
    """

    def __init__(self, path: Path, seed: int, forks: Forks) -> None:
        self._path = path
        self._seed = seed
        self._draw = random.Random(seed)
        self._forks = forks
        self._steps: list[Step] = random_steps(seed, LIFE)
        self._moments: list[Moment] = moments_of(path.with_name("undisturbed"), self._steps)
        shutil.rmtree(path.with_name("undisturbed"))
        self._at = 0
        self._span = self._undisturbed_seconds() * 8 / LIFE
        self.kills = 0
        self.done = False

    def _undisturbed_seconds(self) -> float:
        path = self._path.with_name("timed")
        ending = self._forks.run("tests.crash.script:live", path=path, steps=self._steps, begin=0)
        assert ending.fine, ending
        assert read_state(path) == self._moments[-1].state
        shutil.rmtree(path)
        return ending.seconds

    def kill_once(self) -> None:
        """Let a child go on until it is killed, and look at what it left."""
        before = self._at
        ending = self._forks.run(
            "tests.crash.script:live",
            kill_after=self._draw.uniform(0, self._span),
            path=self._path,
            steps=self._steps,
            begin=self._moments[before].resume,
        )
        assert ending.fine or (ending.signal == signal.SIGKILL and not ending.hung), ending
        for step, left in (each for each in ending.said if each != "open"):
            self._at = max(
                self._at, next(at for at, each in enumerate(self._moments) if (each.step, each.left) == (step, left))
            )
        # a machine that is busy now must not keep the child from ever getting on
        self._span *= 1.5 if self._at == before else 0.9
        self.kills += ending.signal is not None
        self.done = ending.fine
        self._look()

    def _look(self) -> None:
        allowed = self._moments[self._at : self._at + 2]
        found = read_state(self._path)
        states = [each.state for each in allowed]
        assert found in states, (
            f"{difference(found, states[0])}; after {self._steps[: allowed[-1].step + 1][-2:]}, life {self._seed}, "
            f"kill {self.kills}"
        )
        self._at += states.index(found)
        if found is None:
            return
        if self._draw.random() < 0.5:  # what was left stays for the next child
            with open_small(self._path, mode="read") as store:
                problems = store.verify().problems
                assert {each.kind for each in problems} <= LEFT_BY_KILLS, [vars(each) for each in problems]
        else:
            with open_small(self._path) as store:
                assert state_of(store) == found
                assert_clean(store.verify())


def kill_at_random_moments(kills: int, folder: Path, forks: Forks) -> None:
    number = count = 0
    while count < kills:
        number += 1
        life = Life(folder / f"{number}" / "store", number, forks)
        while not life.done and count + life.kills < kills:
            life.kill_once()
        count += life.kills
        shutil.rmtree(folder / f"{number}")
    assert count == kills


def test_killed_at_random_moments(folder: Path, forks: Forks) -> None:
    kill_at_random_moments(20, folder, forks)


@pytest.mark.slow
def test_killed_at_300_random_moments(
    folder: Path, forks: Forks, record_property: Callable[[str, object], None]
) -> None:
    kill_at_random_moments(300, folder, forks)
    record_property("kills", 300)
