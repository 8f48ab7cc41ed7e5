"""Learning-rate schedule and optimisers of a recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from longmem.training.muon import Muon
from longmem.training.recipe import OptimSection
from longmem.training.sharding import load_whole_state, undivided, whole_state


def lr_share(optim: OptimSection, done: float) -> float:
    """Share of the peak rate after ``done`` (0 to 1) of the run; 0 at its end, except for ``constant``."""
    if done < optim.warmup:
        return done / optim.warmup
    left = min(1.0, max(0.0, (1 - done) / max(1 - optim.warmup, 1e-9)))
    if optim.schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * left))
    if optim.schedule == "wsd":
        return 1.0 if optim.decay_fraction == 0 else min(1.0, max(0.0, 1 - done) / optim.decay_fraction)
    if optim.schedule == "constant":
        return 1.0
    return float(left**optim.power)


class Optimisers:
    """AdamW, or Muon and AdamW side by side, driven as one.

    Matrices of the layers go to Muon where it is asked for; embeddings, head, norms, biases and memory gates always go
    to AdamW. Weight decay applies to matrices only.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], optim: OptimSection) -> None:
        trained = [(name, weight) for name, weight in named if weight.requires_grad]
        gates = [weight for name, weight in trained if "memory_gate" in name]
        vectors = [weight for name, weight in trained if weight.ndim < 2 and "memory_gate" not in name]
        matrices = [(name, weight) for name, weight in trained if weight.ndim >= 2 and "memory_gate" not in name]
        hidden = [weight for name, weight in matrices if optim.optimiser == "muon" and _inside_layers(name, weight)]
        rest = [weight for name, weight in matrices if not (optim.optimiser == "muon" and _inside_layers(name, weight))]
        groups: list[dict[str, Any]] = [
            {"params": rest, "lr": optim.lr, "weight_decay": optim.weight_decay},
            {"params": vectors, "lr": optim.lr, "weight_decay": 0.0},
            {"params": gates, "lr": optim.gate_lr or optim.lr, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.weights = [weight for _, weight in trained]
        self.parts: list[torch.optim.Optimizer] = []
        if groups:
            self.parts.append(torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps))
        if hidden:
            self.parts.append(
                Muon(hidden, lr=optim.muon_lr, weight_decay=optim.weight_decay, momentum=optim.muon_momentum)
            )
        self._peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]

    def set_share(self, share: float) -> None:
        """Set every rate to this share of its peak."""
        for part, peaks in zip(self.parts, self._peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * share

    def step(self) -> None:
        for part in self.parts:
            part.step()
            part.zero_grad(set_to_none=True)

    def clip(self, largest: float) -> Tensor:
        """Gradient norm before clipping, (); ``largest`` 0 only measures."""
        norm = nn.utils.clip_grad_norm_(self.weights, largest if largest > 0 else math.inf)
        return undivided(norm)

    def state_dict(self, keep: bool = True) -> list[dict[str, Any]]:
        """States with undivided tensors; all processes call this, only those that ``keep`` get them."""
        return [whole_state(part, keep) for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            load_whole_state(part, state)


def _inside_layers(name: str, weight: nn.Parameter) -> bool:
    """Whether a weight is a matrix of a layer: its name has a layer number, and it is no embedding or head."""
    return weight.ndim == 2 and any(part.isdigit() for part in name.split("."))
