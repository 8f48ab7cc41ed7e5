"""Gradients of some training steps of recipes, undivided: in this process, or in every one of a launched group.

``python -m torch.distributed.run --nproc_per_node 2 tests/training/gradients.py FOLDER``: runs every ``*.toml`` of the
folder and writes ``NAME.gradients`` beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from torch import Tensor
from transformers import TrainerCallback

from longmem.training.models import undivided
from longmem.training.recipe import Recipe
from longmem.training.run import build_trainer


def gradients(recipe: Recipe) -> list[dict[str, Tensor]]:
    """Of every step of a run that does not clip them."""
    found: list[dict[str, Tensor]] = []
    set_seed(recipe.run.seed)
    trainer = build_trainer(recipe, PartialState(cpu=True), quiet=True)

    class Seen(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            grads = [(name, weight.grad) for name, weight in trainer.trained() if weight.grad is not None]
            found.append({name: undivided(grad).cpu().clone() for name, grad in grads})

    trainer.add_callback(Seen())
    trainer.train()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for path in sorted(Path(sys.argv[1]).glob("*.toml")):
        steps = gradients(Recipe.load(path))
        if PartialState().is_main_process:
            torch.save(steps, path.with_suffix(".gradients"))
