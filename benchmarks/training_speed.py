"""Training steps of two checkouts, in turns: CPU seconds of a step in one thread, which a busy machine changes little.

Usage: python -m benchmarks.training_speed BEFORE AFTER [--out results/training-speed.json]

BEFORE and AFTER are checkouts of the project. A step is what passes between two steps of AdamW, which every recipe
takes once a step. The ratio is that of the medians over all steps and turns; above 1, AFTER is faster.
"""

from __future__ import annotations

import argparse
import itertools
import json
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

RUNS: dict[str, tuple[int, list[str]]] = {
    "tiny-cpu": (150, ['data.paths=["src"]', 'data.held_out=["longmem/data/*"]', "optim.precision=fp32"]),
    "small-sidenet": (24, ['data.paths=["docs"]', 'data.valid=["CHANGELOG.md"]', "optim.rows=4", "optim.tokens=24576"]),
}
CHILD = """
import json, sys, time, torch
marks, step = [], torch.optim.AdamW.step
def seen(self, *arguments, **settings):
    marks.append(time.process_time())
    return step(self, *arguments, **settings)
torch.optim.AdamW.step = seen
from longmem.cli.main import main
try:
    main(sys.argv[2:])
finally:
    open(sys.argv[1], "w").write(json.dumps(marks))
"""


def step_seconds(tree: Path, recipe: str, steps: int, settings: list[str]) -> list[float]:
    """CPU seconds of every step but the first ones."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = [f"run.out_dir={folder}/run", "eval.every=0", "eval.tokens=256", "checkpoint.every=0", "log.every=20"]
        if recipe == "tiny-cpu":
            quiet += [f"optim.steps={steps}", "eval.copy_score=false"]
        path = tree / "recipes" / f"{recipe}.toml"
        command = [sys.executable, "-c", CHILD, f"{folder}/marks", "train", str(path), "--quiet"]
        for setting in [*settings, *quiet]:
            command += ["--set", setting]
        environment = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, check=True)
        marks = json.loads(Path(folder, "marks").read_text())
    return [after - before for before, after in itertools.pairwise(marks[3:])]


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
    for recipe, (steps, settings) in RUNS.items():
        turns: dict[str, list[list[float]]] = {"before": [], "after": []}
        for _ in range(given.turns):
            for name, tree in trees.items():
                turns[name].append(step_seconds(tree, recipe, steps, settings))
        medians = {name: median(step for turn in each for step in turn) for name, each in turns.items()}
        found[recipe] = {
            "steps_per_second_ratio": round(medians["before"] / medians["after"], 4),
            "cpu_seconds_of_a_step": {name: round(value, 5) for name, value in medians.items()},
            "of_each_turn": {name: [round(median(turn), 5) for turn in each] for name, each in turns.items()},
        }
        print(f"{recipe:>16}: {found[recipe]['steps_per_second_ratio']:.3f} times as many steps a second as before")
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
