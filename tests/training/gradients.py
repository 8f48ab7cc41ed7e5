"""Gradients of some training steps of recipes, undivided: in this process, or in every one of a launched group.

``python -m torch.distributed.run --nproc_per_node 2 tests/training/gradients.py FOLDER``: runs every ``*.toml`` of the
folder and writes ``NAME.gradients`` beside it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longmem.training import run
from longmem.training.models import undivided
from longmem.training.recipe import Recipe


def gradients(recipe: Recipe) -> list[dict[str, Tensor]]:
    """Of every step of a run, before they are clipped."""
    found: list[dict[str, Tensor]] = []
    build = run.build_trainer

    def watched(*arguments: Any, **settings: Any) -> Any:
        trainer = build(*arguments, **settings)
        clip = trainer._clip_grad_norm

        def seen(model: Any) -> Any:
            grads = [(name, weight.grad) for name, weight in trainer.trained() if weight.grad is not None]
            found.append({name: undivided(grad).cpu().clone() for name, grad in grads})
            return clip(model)

        trainer._clip_grad_norm = seen
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "build_trainer", watched)
        run.train(recipe, overwrite=True, quiet=True)
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for path in sorted(folder.glob("*.toml")):
        found = gradients(Recipe.load(path))
        if os.environ["RANK"] == "0":
            torch.save(found, path.with_suffix(".gradients"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
