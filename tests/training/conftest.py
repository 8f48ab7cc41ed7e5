"""Tiny runs: a folder of made text, and settings that train on it in a second."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from longmem.training.recipe import Recipe

Make = Callable[..., Recipe]

OPTIM = {"steps": 8, "rows": 2, "lr": 1e-2, "dropout": 0.1, "precision": "fp32"}
OFTEN = {
    "eval": {"every": 4, "tokens": 128, "rows": 2}, "checkpoint": {"every": 4, "keep_last": 5}, "log": {"every": 1},
}  # fmt: skip

ASK = {
    "kinds": ["passkey"], "rows": 4, "repeats": 2, "context": 48, "text_tokens": 512, "least_tokens": 32,
    "most_tokens": 256, "grows": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in the same order every time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory, made_text: Callable[..., str]) -> Path:
    """Six documents to train on, one to measure on."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(6):
        (folder / f"doc{number}.txt").write_text(made_text(90 + 40 * number, seed=number))
    (folder / "held.txt").write_text(made_text(150, seed=100))
    return folder


@pytest.fixture
def recipes(tmp_path: Path, text_dir: Path, backbone_dir: Path) -> dict[str, Make]:
    """``recipes[task]("name", method, optim={"steps": 3})``: a recipe with these changes; both tasks."""
    paths = {"paths": [str(text_dir)], "held_out": ["held.txt"], "cache_dir": str(tmp_path / "cache"), "window": 16}
    both: dict[str, Any] = {"data": paths, "optim": OPTIM, **OFTEN}
    own: dict[str, dict[str, Any]] = {
        "pretrain": {
            "data": {"vocab_size": 280, "repeat_fraction": 0.3},
            "model": {"hidden_size": 16, "layers": 2, "heads": 2},
        },
        "adapt": {
            "backbone": {"path": str(backbone_dir)},
            "sidenet": {"memory_layers": [1], "num_retrieved": 8, "memory_size": 64},
            "optim": {"accumulate": 2},
        },
    }

    def make(task: str, name: str = "run", method: str = "longmem", **changes: dict[str, Any]) -> Recipe:
        settings = {"run": {"name": name, "out_dir": str(tmp_path / name)}, **both}
        for some in (own[task], changes):
            settings |= {section: {**settings.get(section, {}), **values} for section, values in some.items()}
        return Recipe.parse({"task": task, "method": method, **settings})

    return {task: partial(make, task) for task in own}


@pytest.fixture
def pretrain(recipes: dict[str, Make]) -> Make:
    return recipes["pretrain"]


@pytest.fixture
def adapt(recipes: dict[str, Make]) -> Make:
    return recipes["adapt"]


def records(out_dir: Path, kind: str) -> list[dict[str, Any]]:
    """What a run wrote into its metrics."""
    lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def write(recipe: Recipe, path: Path) -> Path:
    """The recipe as a TOML file."""
    lines = [f'task = "{recipe.task}"', f'method = "{recipe.method}"']
    for name, section in recipe.model_dump(mode="json", exclude={"task", "method"}, exclude_none=True).items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in section.items())]
    path.write_text("\n".join(lines))
    return path
