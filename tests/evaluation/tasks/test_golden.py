"""Every task through its command, on systems of every kind: the numbers of the tagged commit ``house-before``.

``golden.json`` is what ``measured`` returned at that tag, for each task. Facts with passages in the window are newer:
passages stand in the order of their age now.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.evaluation.tasks.made import ASKED, SYSTEMS, WINDOW, make_home

from longmem.cli.main import main

GOLDEN = Path(__file__).with_name("golden.json")


def measured(home: Path, task: str, out: Path) -> dict[str, Any]:
    """Values of every example, means and differences of every group, as ``longmem eval`` writes them."""
    named = {name.name for name in home.iterdir()}
    given = [str(home / word) if word in named else word for word in [*SYSTEMS, *ASKED[task]]]
    asked = ["eval", task, "--model", str(home / "side"), *given, "--window", str(WINDOW), "--resamples", "20"]
    with pytest.raises(SystemExit) as done:
        main([*asked, "--out", str(out)])
    assert not done.value.code
    result = json.loads((out / f"{task}.json").read_text())
    metrics = [metric["name"] for metric in result["metrics"]]
    return {
        "systems": list(result["systems"]),
        "metrics": metrics,
        "examples": {
            example["id"]: [[round(value[name], 5) for name in metrics] for value in example["values"].values()]
            for example in result["examples"]
        },
        "groups": {
            group["group"]: {f"{one['system']} {one['metric']}": _rounded(one) for one in group["scores"]}
            | {"size": [group["examples"], group["units"]]}
            for group in result["groups"]
        },
        "differences": {
            f"{one['system']} - {one['against']}, {one['metric']}": _rounded(one)
            for one in result["groups"][-1]["differences"]
        },
        "extra": result["extra"],
        "said": _said(out / "answers.jsonl") if task == "dialogue" else [],
    }


def _said(answers: Path) -> list[str]:
    """The first lines of what was generated, in the order of systems and examples."""
    lines = [json.loads(line) for line in answers.read_text().split("\n") if line] if answers.exists() else []
    lines.sort(key=lambda line: (line["system"], line["example"]))
    return [next((one.strip() for one in line["said"].splitlines() if one.strip()), "") for line in lines]


def _rounded(score: dict[str, Any]) -> list[float]:
    edges = score["interval"]
    return [round(score["value"], 5), *([] if edges is None else [round(edges[name], 5) for name in ("low", "high")])]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any, made_text: Callable[..., str]) -> Path:
    home = tmp_path_factory.mktemp("golden") / "home"  # the folder's name is part of names in results
    home.mkdir()
    return make_home(home, byte_tokenizer, made_text)


@pytest.mark.parametrize("task", ASKED)
def test_every_number_is_that_of_the_tagged_commit(task: str, home: Path, tmp_path: Path) -> None:
    expected, found = json.loads(GOLDEN.read_text())[task], measured(home, task, tmp_path)
    leaves, known = _leaves(found), _leaves(expected)
    assert {at: leaves[at] for at in known} == {
        at: leaf if isinstance(leaf, str) else pytest.approx(leaf, abs=1e-4) for at, leaf in known.items()
    }
    assert found["systems"] == expected["systems"] and found["examples"].keys() == expected["examples"].keys()


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {at: leaf for name, inner in pairs for at, leaf in _leaves(inner, f"{path}/{name}").items()}
    return {path: value}
