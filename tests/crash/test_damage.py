"""Random damage to data files and catalog: never a wrong answer, always found, data files healed to the last bit."""

from __future__ import annotations

import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.crash import damage
from tests.crash.forks import Forks


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """A store of every variant, and the right answers beside each."""
    folder = tmp_path_factory.mktemp("originals")
    for variant in damage.VARIANTS:
        ending = forks.run(
            "tests.crash.damage:make_variant", path=folder / variant, known=folder / f"{variant}.json", variant=variant
        )
        killed = ending.signal == signal.SIGKILL and not ending.hung
        assert killed if variant in ("killed", "copied") else ending.fine, ending
    return folder


def damage_at_random(trials: int, folder: Path, originals: Path, forks: Forks) -> Counter[str]:
    """How often which file was damaged in which way, and what came of it."""
    counts: Counter[str] = Counter()
    seed = 0
    while counts["damages"] < trials:
        seed += 1
        variant = list(damage.VARIANTS)[seed % len(damage.VARIANTS)]
        ending = forks.run(
            "tests.crash.damage:trial",
            scratch=folder,
            original=originals / variant,
            known=originals / f"{variant}.json",
            variant=variant,
            seed=seed,
        )
        shutil.rmtree(folder / "trial")
        said = dict(ending.said)
        what = said.get("damaged")
        assert ending.fine, f"{variant}, seed {seed}, {what}: {ending}"
        faults = [text for kind, text in ending.said if kind == "fault"]
        assert not faults, f"{variant}, seed {seed}, {what}: {faults}"
        if what is not None:
            file = "data files" if what[0].startswith("segments/") else what[0]
            counts.update(["damages", file, what[1]])
            counts.update(f"{file}: {name}" for name, true in said["outcome"].items() if true)
    return counts


def check(counts: Counter[str]) -> None:
    assert counts["data files: found"] == counts["data files: repaired"] == counts["data files"]
    assert min(counts["data files"], counts["catalog.sqlite"]) > counts["damages"] // 4


def test_damage_is_never_answered_and_always_found(folder: Path, originals: Path, forks: Forks) -> None:
    check(damage_at_random(40, folder, originals, forks))


@pytest.mark.slow
def test_1000_damages_are_never_answered_and_always_found(
    folder: Path, originals: Path, forks: Forks, record_property: Callable[[str, object], None]
) -> None:
    counts = damage_at_random(1000, folder, originals, forks)
    for name, count in sorted(counts.items()):
        record_property(name, count)
    check(counts)
