"""Gradients of some training steps of recipes, undivided: in this process, or in every one of a launched group.

``python -m torch.distributed.run --nproc_per_node 2 tests/training/gradients.py FOLDER``: runs every ``*.toml`` of the
folder and writes ``NAME.gradients`` beside it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from longmem.training import loop
from longmem.training.recipe import Recipe
from longmem.training.sharding import whole
from longmem.training.tasks import StepScores

STEPS = 3


def gradients(recipe: Recipe) -> list[dict[str, Tensor]]:
    """Before clipping, of ``STEPS`` steps."""
    accelerator = loop.make_accelerator(recipe)
    recipe.out_dir.mkdir(parents=True, exist_ok=True)
    loop._seed(recipe.run.seed)
    task = loop.prepare(recipe, accelerator)
    run = loop._Run(recipe, task, accelerator, recipe.out_dir / "checkpoints")
    run._clock = 0.0
    run.model.train()
    found = []
    clip = run.optimisers.clip

    def seen(largest: float) -> Tensor:
        grads = {name: weight.grad for name, weight in task.trained() if weight.grad is not None}
        found.append({name: grad.clone() for name, grad in whole(grads).items()})
        return clip(largest)

    run.optimisers.clip = seen  # type: ignore[method-assign]
    for step in range(STEPS):
        run.step(StepScores(), step / STEPS)
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for path in sorted(folder.glob("*.toml")):
        found = gradients(Recipe.load(path))
        if os.environ["RANK"] == "0":
            torch.save(found, path.with_suffix(".gradients"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
