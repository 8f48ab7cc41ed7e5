"""Gradients of some training steps of recipes, undivided: in this process, or in every one of a launched group.

``python -m torch.distributed.run --nproc_per_node 2 tests/training/gradients.py FOLDER``: runs every ``*.toml`` of the
folder and writes ``NAME.gradients`` beside it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from longmem.training import run
from longmem.training.models import undivided
from longmem.training.recipe import Recipe


class Watch(TrainerCallback):
    """Keeps the gradients of every step, before they are clipped."""

    def __init__(self, trainer: Any) -> None:
        self.found: list[dict[str, Tensor]] = []
        self._trainer = trainer
        clip = trainer._clip_grad_norm

        def seen(model: Any) -> Any:
            grads = [(name, weight.grad) for name, weight in trainer.trained() if weight.grad is not None]
            self.found.append({name: undivided(grad).cpu().clone() for name, grad in grads})
            return clip(model)

        trainer._clip_grad_norm = seen


def gradients(recipe: Recipe) -> list[dict[str, Tensor]]:
    """Of every step of a run."""
    watches: list[Watch] = []
    build = run.build_trainer

    def watched(*arguments: Any, **settings: Any) -> Any:
        trainer = build(*arguments, **settings)
        watches.append(Watch(trainer))
        return trainer

    run.build_trainer = watched
    try:
        run.train(recipe, overwrite=True, quiet=True)
    finally:
        run.build_trainer = build
    return watches[0].found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for path in sorted(folder.glob("*.toml")):
        found = gradients(Recipe.load(path))
        if os.environ["RANK"] == "0":
            torch.save(found, path.with_suffix(".gradients"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
