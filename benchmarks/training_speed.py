"""Training steps per second of two checkouts, in turns: CPU seconds of a step, so that a busy machine matters little.

Usage: python -m benchmarks.training_speed BEFORE AFTER [--out results/training-speed.json]

BEFORE and AFTER are checkouts of the project. Each runs ``longmem train`` for few and for many steps in one thread; the
difference is what the steps cost. The ratio is that of the medians; above 1, AFTER is faster.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.measure import surroundings
from longmem.evaluation.results import write_json

RUNS: dict[str, tuple[int, int, list[str]]] = {
    # few steps, many steps, settings
    "tiny-cpu": (20, 420, ['data.paths=["src"]', 'data.held_out=["longmem/data/*"]', "eval.copy_score=false"]),
    "small-sidenet": (
        2,
        14,
        ['data.paths=["README.md", "docs", "src"]', 'data.valid=["CHANGELOG.md"]', "optim.rows=8"],
    ),
}


def cpu_seconds(tree: Path, recipe: str, steps: int, settings: list[str]) -> float:
    """Of a whole run of so many steps."""
    with tempfile.TemporaryDirectory() as folder:
        common = [f"optim.steps={steps}", f"run.out_dir={folder}/run", "eval.every=0", "checkpoint.every=0"]
        common += ["log.every=20"] + (["eval.tokens=1024"] if recipe != "tiny-cpu" else [])
        # a run has one budget
        text = (tree / "recipes" / f"{recipe}.toml").read_text(encoding="utf-8")
        path = Path(folder) / f"{recipe}.toml"
        path.write_text("\n".join(line for line in text.splitlines() if not line.startswith("tokens = 4_000_000")))
        command = [sys.executable, "-m", "longmem", "train", str(path), "--quiet"]
        for setting in [*settings, *common]:
            command += ["--set", setting]
        environment = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise subprocess.CalledProcessError(child.returncode, command)
        return usage.ru_utime + usage.ru_stime


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure in turns, print a line for each recipe and keep the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/training-speed.json"))
    given = parser.parse_args(arguments)
    trees = {"before": given.before.resolve(), "after": given.after.resolve()}
    found: dict[str, Any] = {}
    for recipe, (few, many, settings) in RUNS.items():
        costs: dict[str, list[float]] = {"before": [], "after": []}
        for _ in range(given.turns):
            for name, tree in trees.items():
                first, last = (cpu_seconds(tree, recipe, steps, settings) for steps in (few, many))
                costs[name].append((last - first) / (many - few))
        ratio = median(costs["before"]) / median(costs["after"])
        found[recipe] = {"cpu_seconds_a_step": costs, "steps_per_second_ratio": round(ratio, 4)}
        print(f"{recipe:>16}: {ratio:.3f} times as many steps a second as before")
    result = {
        "about": "CPU seconds of a training step in one thread, tag house-before against this version, in turns",
        "command": "python -m benchmarks.training_speed BEFORE AFTER",
        "surroundings": surroundings(torch.device("cpu")),
        "recipes": found,
    }
    write_json(given.out, result)
    return result


if __name__ == "__main__":
    main()
