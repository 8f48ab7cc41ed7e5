"""The shipped models score what they scored with the code of the tag ``house-before``, on the same documents."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.golden.making import HERE

MODELS = HERE.parents[1] / "models" / "small"
PERPLEXITY = "--model {models}/sidenet --control {models}/control --memory-sizes 1k,4k --max-tokens 5120 \
--num-documents 4 --group-by-prefix __ --data {shared}/data/{text}/test.tar.xz"
NEEDLE = "--model {models}/needle --lengths 4k --depths 5 --trials 8 --systems backbone,memory --batch 8 \
--data {shared}/data/books/test.tar.xz"


def nll_of(result: dict[str, Any]) -> dict[str, Any]:
    """Summed negative log-likelihood of every document, by protocol and system."""
    return {each["id"]: {"tokens": each["tokens"], "nll": each["nll"]} for each in result["documents"]}


def answers_of(result: dict[str, Any]) -> dict[str, Any]:
    """By trial and system, whether the answer was exact."""
    return {
        each["id"]: {system: values["exact"] for system, values in each["values"].items()}
        for each in result["examples"]
    }


def evaluate(task: str, options: str, shared: Path, out: Path, text: str = "books") -> dict[str, Any]:
    """The result of ``longmem eval TASK OPTIONS``."""
    arguments = options.format(models=MODELS, shared=shared, text=text).split()
    command = [sys.executable, "-m", "longmem", "eval", task, *arguments, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads((out / f"{task}.json").read_text(encoding="utf-8"))
    return result


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("text", ["books", "latex"])
def test_perplexity_of_the_shipped_pair(text: str, shared_dir: Path, tmp_path: Path) -> None:
    frozen = json.loads((HERE / f"small-{text}.json").read_text(encoding="utf-8"))
    found = nll_of(evaluate("perplexity", PERPLEXITY, shared_dir, tmp_path, text))
    assert found.keys() == frozen.keys()
    for document, expected in frozen.items():
        assert found[document]["tokens"] == expected["tokens"]
        for protocol, systems in expected["nll"].items():
            assert found[document]["nll"][protocol] == pytest.approx(systems, rel=1e-6), (document, protocol)


@pytest.mark.slow
@pytest.mark.shared
def test_answers_of_the_needle_model(shared_dir: Path, tmp_path: Path) -> None:
    found = answers_of(evaluate("needle", NEEDLE, shared_dir, tmp_path))
    assert found == json.loads((HERE / "small-needle.json").read_text(encoding="utf-8"))


if __name__ == "__main__":  # python -m tests.golden.test_shipped RESULTS: folders books, latex and needle
    results = Path(sys.argv[1])
    for name, task, read in (
        ("books", "perplexity", nll_of), ("latex", "perplexity", nll_of), ("needle", "needle", answers_of)
    ):  # fmt: skip
        short = read(json.loads((results / name / f"{task}.json").read_text(encoding="utf-8")))
        (HERE / f"small-{name}.json").write_text(json.dumps(short, indent=1) + "\n", encoding="utf-8")
