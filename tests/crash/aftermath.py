"""What must hold of a store whose writer was killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.crash.operations import OPERATIONS, State, read_state, small_steps
from tests.store.small import open_small, state_of


def after_kill(path: Path, operation: str, states: list[State], said: int) -> int:
    """Look at a store, mend and use it; which of the ``states`` it was in.

    Args:
        states: before the operation, and after each of its promises.
        said: promises that the child made before it died.
    """
    chosen = OPERATIONS[operation]
    with chosen.settings():
        allowed = states[said : said + 2]
        found = read_state(path)
        assert found in allowed, f"{difference(found, allowed[0])} (of {said} promises)"
        final = found == states[-1]
        if found is not None and found != "damaged":
            with open_small(path) as store:  # a writer sweeps what was left, and nothing else changes
                assert state_of(store) == found
                assert_clean(store.verify())
            with open_small(path, mode="read") as store:
                assert state_of(store) == found
                report = store.verify()
                assert_clean(report)
                assert report.sealed
        if chosen.again or not final:
            with small_steps():
                chosen.run(path, lambda _: None)
            assert read_state(path) == states[-1]
        with open_small(path) as store:
            assert_clean(store.verify())
    return states.index(found)


def assert_clean(report: Any) -> None:
    """Every byte is what was written, and nothing lies around."""
    assert report.clean and not report.problems, [vars(problem) for problem in report.problems]


def difference(found: State, expected: State) -> str:
    """Where two states begin to differ, in a few words."""
    if not isinstance(found, dict) or not isinstance(expected, dict):
        return f"found {str(found)[:200]}, expected {str(expected)[:200]}"
    for namespace in sorted({*found, *expected}):
        ours = {each["name"]: each for each in found.get(namespace, [])}
        theirs = {each["name"]: each for each in expected.get(namespace, [])}
        for name in sorted({*ours, *theirs}):
            if ours.get(name) != theirs.get(name):
                one, other = ours.get(name, {}), theirs.get(name, {})
                fields = [field for field in {*one, *other} if one.get(field) != other.get(field)]
                return f"{namespace}/{name} differs in {fields}"
    return "the same"
