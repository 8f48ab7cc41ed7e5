"""Training: recipes, the loop, checkpoints."""

from longmem.training.loop import TrainResult, train
from longmem.training.recipe import Recipe

__all__ = ["Recipe", "TrainResult", "train"]
