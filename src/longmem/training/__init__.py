"""Training: recipes and the trainer that runs them."""

from longmem.training.adapt import LongMemTrainer
from longmem.training.recipe import Recipe
from longmem.training.run import TrainResult, train

__all__ = ["LongMemTrainer", "Recipe", "TrainResult", "train"]
