"""Optimiser and learning-rate schedule of a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from longmem.training.recipe import OptimSection


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


class AdamWAndMuon(torch.optim.AdamW):
    """AdamW, and Muon (Jordan et al. 2024) for the groups that say ``muon``, as one optimiser with one state."""

    def __init__(self, groups: list[dict[str, Any]], optim: OptimSection) -> None:
        super().__init__(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
        self._momentum = optim.muon_momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        everything = self.param_groups
        try:
            self.param_groups = [group for group in everything if not group["muon"]]
            super().step()
            for group in everything:
                if group["muon"]:
                    self._muon(group)
        finally:
            self.param_groups = everything

    def _muon(self, group: dict[str, Any]) -> None:
        muon = torch.optim.Muon(
            group["params"], lr=group["lr"], weight_decay=group["weight_decay"], momentum=self._momentum
        )
        for weight in group["params"]:
            # AdamW looks for a step in every state that it loads
            self.state[weight].setdefault("step", torch.zeros(()))
            muon.state[weight] = self.state[weight]  # the same dict: what it remembers is kept here
        muon.step()


def build_optimiser(named: Iterable[tuple[str, nn.Parameter]], optim: OptimSection) -> torch.optim.Optimizer:
    """Matrices inside the layers go to Muon where it is asked for, all else to AdamW. Only matrices decay."""
    trained = [(name, weight) for name, weight in named if weight.requires_grad]
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, weight in trained:
        gate, matrix = "memory_gate" in name or ".gates." in name, weight.ndim >= 2
        # a name with a number in it is of a layer, and no embedding or head
        muon = optim.optimiser == "muon" and weight.ndim == 2 and not gate and any(p.isdigit() for p in name.split("."))
        rate = optim.muon_lr if muon else optim.gate_lr or optim.lr if gate else optim.lr
        groups.setdefault((muon, rate, optim.weight_decay if matrix and not gate else 0.0), []).append(weight)
    return AdamWAndMuon(
        [
            {"params": weights, "muon": muon, "lr": rate, "weight_decay": decay}
            # the first group's rate is the one that is logged
            for (muon, rate, decay), weights in sorted(
                groups.items(), key=lambda group: group[0][:2] != (False, optim.lr)
            )
        ],
        optim,
    )
