"""Muon (Jordan et al. 2024) in the weights' own precision.

``torch.optim.Muon`` orthogonalises in bfloat16 whatever the weights are; on a CPU without bf16 units that alone takes
several times as long as the whole training step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from longmem.training.sharding import like, undivided

_A, _B, _C = 3.4445, -4.7750, 2.0315
"""Coefficients of the quintic Newton-Schulz iteration, as published."""


def orthogonalised(update: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: every singular value of (..., m, n) near 1."""
    tall = update.shape[-2] > update.shape[-1]
    x: Tensor = update.mT if tall else update
    if x.device.type != "cpu":
        x = x.bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    x = x.to(update.dtype)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose step is orthogonalised; for the matrices inside layers.

    Args:
        params: 2-D weights.
        lr: step of a square matrix; a tall one moves sqrt(rows / columns) times as far.
        weight_decay: decoupled.
        momentum: of the running gradient.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 0.02, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[Any, list[tuple[nn.Parameter, Tensor]]] = {}
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                buffer = state["momentum_buffer"]
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(buffer, group["momentum"])
                by_shape.setdefault((weight.shape, weight.device), []).append((weight, update))
            for (shape, _), pairs in by_shape.items():
                # equal shapes in one batched product; a part of a matrix cannot be orthogonalised
                steps = orthogonalised(torch.stack([undivided(update) for _, update in pairs]))
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for (weight, _), step in zip(pairs, steps, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(like(weight, step), alpha=-group["lr"] * scale)
