"""SideNets trained on the spot from a recipe and a budget, one for each value of what needs training."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longmem.errors import ConfigError
from longmem.training.recipe import Recipe

FIELDS = ("memory_layer", "init", "fusion")
"""Settings of ``[sidenet]`` that can only be compared by training."""


@dataclass(frozen=True)
class Run:
    """A SideNet to train.

    Attributes:
        axis: what is changed; empty for the default.
        label: its value.
        recipe: complete, with its own folder.
    """

    axis: str
    label: str
    recipe: Recipe

    @property
    def model(self) -> Path:
        return self.recipe.out_dir / "final"


def plan_runs(recipe: str | Path, tokens: int, values: dict[str, Sequence[Any]], out: Path) -> list[Run]:
    """The default first, then one run for each value that is not the recipe's own.

    Args:
        recipe: TOML of an adaptation; everything but budget, folder and the changed setting stays.
        tokens: budget of every run, the default included, so that they compare.
        values: of ``FIELDS``.
        out: folder under which the runs are.

    Raises:
        ConfigError: the recipe trains no SideNet, or a value breaks a rule.
    """
    try:
        settings = tomllib.loads(Path(recipe).read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{recipe}: cannot be read as a recipe ({error}); see recipes/ for some") from error
    if settings.get("task") != "adapt" or settings.get("method", "longmem") != "longmem":
        raise ConfigError(f"{recipe}: trains no SideNet; ablations need a recipe with task = 'adapt'")
    Recipe.parse(settings)  # says what is wrong with it as it is
    default = _run(settings, "", "", tokens, out / "default")
    own = {name: getattr(default.recipe.sidenet, name) for name in FIELDS}
    runs = [default]
    for axis, wanted in values.items():
        for value in wanted:
            if value != own[axis]:
                runs.append(_run(settings, axis, value, tokens, out / f"{axis}-{value}"))
    return runs


def train_runs(runs: Sequence[Run], *, quiet: bool = True) -> None:
    """Train what is not trained yet; an interrupted run goes on where it stopped."""
    from longmem.training.loop import train

    for run in runs:
        if not (run.model / "config.json").is_file():
            train(run.recipe, resume=True, overwrite=not (run.recipe.out_dir / "checkpoints").exists(), quiet=quiet)


def _run(settings: dict[str, Any], axis: str, value: Any, tokens: int, folder: Path) -> Run:
    optim = {name: kept for name, kept in settings.get("optim", {}).items() if name not in ("steps", "max_minutes")}
    changed = settings | {
        "optim": optim | {"tokens": tokens},
        # the budget is part of the name: another one is another run
        "run": settings.get("run", {}) | {"out_dir": str(folder.with_name(f"{folder.name}-{tokens}"))},
    }
    if axis:
        changed["sidenet"] = settings.get("sidenet", {}) | {axis: value}
    return Run(axis, str(value), Recipe.parse(changed))
