"""``longmem train``: one line for each mistake, data on stdout, progress on stderr."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from tests.calling import Command
from tests.training.conftest import Make

from longmem.training.recipe import Recipe


def write(recipe: Recipe, path: Path) -> Path:
    """The recipe as a TOML file."""
    lines = [f'task = "{recipe.task}"', f'method = "{recipe.method}"']
    for name, section in recipe.model_dump(mode="json", exclude={"task", "method"}, exclude_none=True).items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in section.items())]
    path.write_text("\n".join(lines))
    tomllib.loads(path.read_text())
    return path


def test_a_run_prints_its_model_and_tells_its_progress_on_stderr(
    pretrain: Make, tmp_path: Path, command: Command
) -> None:
    path = write(pretrain(), tmp_path / "recipe.toml")
    status, out, err = command("train", path, "--set", "optim.steps=2")
    assert (status, out) == (0, f"{tmp_path}/run/final\n")
    lines = err.splitlines()
    assert any(line.startswith("pre-training ") for line in lines)
    assert any(line.startswith("step 2/2 · loss ") for line in lines)
    assert lines[-1].startswith("finished: 2 steps, 64 tokens")
    done = command("train", path, "--set", "optim.steps=2", "--json", "--quiet", "--overwrite")
    result: dict[str, Any] = done.json
    assert (done.status, done.err) == (0, "")
    assert (result["step"], result["tokens"], result["model_dir"]) == (2, 64, f"{tmp_path}/run/final")
    assert "loss" in result["evaluation"]


def test_check_and_estimate_train_nothing(adapt: Make, tmp_path: Path, command: Command) -> None:
    path = write(adapt(), tmp_path / "recipe.toml")
    assert command("train", path, "--check") == (0, f"{path}: adapt, no problems found\n", "")
    status, out, _ = command("train", path, "--estimate", "a100-80gb")
    assert status == 0 and not (tmp_path / "run").exists()
    assert [line.split()[0] for line in out.splitlines()] == ["parameters", "memory", "work", "time", "speed", "cost"]
