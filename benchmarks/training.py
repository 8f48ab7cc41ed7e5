"""What trainings cost and how far they came: collected from the metrics that ``longmem train`` keeps of every run.

Usage: python -m benchmarks.training NAME=RUN_FOLDER... [--out results/training.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.measure import made_by
from longmem.evaluation.results import write_json


def run_of(folder: Path) -> dict[str, Any]:
    """Steps, tokens, seconds and the losses in nats, in training and on validation text, of one run."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines if line.strip()]
    trained = [each for each in metrics if each["kind"] == "train"]
    last = trained[-1]
    return {
        "steps": last["step"],
        "tokens": last["tokens"],
        "seconds": last["seconds"],
        "train": [[each["step"], round(each["loss"], 4)] for each in trained],
        "valid": [
            {name: value for name, value in each.items() if name == "step" or name.startswith("loss")}
            for each in metrics
            if each["kind"] == "eval"
        ],
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Collect the runs, print a line for each and keep the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN_FOLDER")
    parser.add_argument("--out", type=Path, default=Path("results/training.json"))
    given = parser.parse_args(arguments)
    named = dict(each.partition("=")[::2] for each in given.runs)
    result = made_by("training", arguments)
    result["trainings"] = {name: run_of(Path(folder)) for name, folder in named.items()}
    for name, run in result["trainings"].items():
        print(f"{name:>16}: {run['steps']:,} steps, {run['tokens']:,} tokens, {run['seconds'] / 60:.0f} min")
    write_json(given.out, result)
    return result


if __name__ == "__main__":
    main()
