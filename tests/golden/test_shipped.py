"""The shipped models score what they scored with the code of the tag ``house-before``, on the same documents."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.golden.making import HERE

from longmem.data.text import Document
from longmem.data.tokens import tokenize_documents
from longmem.evaluation.perplexity import PerplexitySettings, perplexity
from longmem.evaluation.results import Bootstrap
from longmem.evaluation.systems import load_systems

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


def test_every_system_over_the_shipped_backbone_scores_as_before(made_text: Callable[..., str]) -> None:
    systems = load_systems(
        str(MODELS / "sidenet"),
        control=str(MODELS / "control"),
        memtrm=f"{MODELS}-memtrm",
        training_free=["0.4"],
        memory_sizes=[64, 256],
        window=128,
        rows=2,
    )
    made = zip(("one__a.txt", "one__b.txt", "two__a.txt"), ((250, 1), (120, 2), (180, 3)), strict=True)
    texts = [Document(name, made_text(*size), "") for name, size in made]
    documents = tokenize_documents(texts, systems[0].tokenizer, group_separator="__")
    found = perplexity(systems, documents, PerplexitySettings(bootstrap=Bootstrap(resamples=20)))
    frozen = json.loads((HERE / "small-every-system.json").read_text(encoding="utf-8"))
    for document, expected in zip(found["documents"], frozen["documents"], strict=True):
        for name in ("id", "tokens", "words", "bytes", "digest"):
            assert document[name] == expected[name]
        for protocol, nll in expected["nll"].items():
            assert document["nll"][protocol] == pytest.approx(nll, rel=1e-6)
    for protocol, numbers in frozen["protocols"].items():
        scores = found["protocols"][protocol]["all"]
        for name in ("perplexity", "bits_per_byte"):
            assert {s["system"]: s[name] for s in scores["systems"]} == pytest.approx(numbers[name], rel=1e-6)
        for (system, against, percent), d in zip(numbers["percent"], scores["differences"], strict=True):
            assert (d["system"], d["against"]) == (system, against)
            assert d["percent"] == pytest.approx(percent, rel=1e-6, abs=1e-6)
        for (low, tokens, value), part in zip(numbers["by_position"], scores["by_position"], strict=True):
            assert (part["low"], part["tokens"]) == (low, tokens)
            assert part["perplexity"]["memory_256"] == pytest.approx(value, rel=1e-6)


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("name", ["books", "latex", "needle"])
def test_perplexity_and_answers_of_the_shipped_models(name: str, shared_dir: Path, tmp_path: Path) -> None:
    frozen = json.loads((HERE / f"small-{name}.json").read_text(encoding="utf-8"))
    if name == "needle":
        assert answers_of(evaluate("needle", NEEDLE, shared_dir, tmp_path)) == frozen
        return
    found = nll_of(evaluate("perplexity", PERPLEXITY, shared_dir, tmp_path, name))
    assert found.keys() == frozen.keys()
    for document, expected in frozen.items():
        assert found[document]["tokens"] == expected["tokens"]
        for protocol, systems in expected["nll"].items():
            assert found[document]["nll"][protocol] == pytest.approx(systems, rel=1e-6), (document, protocol)


if __name__ == "__main__":  # python -m tests.golden.test_shipped RESULTS: folders books, latex and needle
    for name, task in (("books", "perplexity"), ("latex", "perplexity"), ("needle", "needle")):
        result = json.loads((Path(sys.argv[1]) / name / f"{task}.json").read_text(encoding="utf-8"))
        short = answers_of(result) if name == "needle" else nll_of(result)
        (HERE / f"small-{name}.json").write_text(json.dumps(short, indent=1) + "\n", encoding="utf-8")
