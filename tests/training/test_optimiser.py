"""Schedules end at zero; every trained weight has exactly one optimiser."""

from itertools import pairwise

import pytest
import torch

from longmem.training.models import build_optimiser, lr_share
from longmem.training.recipe import OptimSection


@pytest.mark.parametrize("schedule", ["polynomial", "cosine", "wsd"])
def test_rates_rise_to_their_peak_and_end_at_zero(schedule: str) -> None:
    optim = OptimSection(schedule=schedule, warmup=0.1)
    shares = [lr_share(optim, step / 1000) for step in range(1001)]
    assert shares[0] == 0 and shares[-1] == pytest.approx(0, abs=1e-12)
    assert shares.index(max(shares)) == 100 and max(shares) == pytest.approx(1)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(shares[100:]))


def test_a_step_is_that_of_torchs_own_two_optimisers() -> None:
    shapes = {"layers.0.w": (6, 4), "embedding": (8, 4), "norm": (4,), "sidenet.memory_gate": (2,)}
    start = {name: torch.randn(shape, generator=torch.manual_seed(0)) for name, shape in shapes.items()}
    mine, theirs = ({name: torch.nn.Parameter(w.clone()) for name, w in start.items()} for _ in range(2))
    optim = OptimSection(optimiser="muon", lr=1e-2, muon_lr=2e-2, gate_lr=3e-2, weight_decay=0.1)
    one = build_optimiser(mine.items(), optim)
    muon = torch.optim.Muon([theirs["layers.0.w"]], lr=2e-2, weight_decay=0.1)
    rest = [
        {"params": [theirs["embedding"]], "weight_decay": 0.1},
        {"params": [theirs["norm"]], "weight_decay": 0.0},
        {"params": [theirs["sidenet.memory_gate"]], "weight_decay": 0.0, "lr": 3e-2},
    ]
    adam = torch.optim.AdamW(rest, lr=1e-2, betas=optim.betas, eps=optim.eps)
    for _ in range(3):
        for some in (mine, theirs):
            for number, weight in enumerate(some.values()):
                weight.grad = torch.full_like(weight, 0.1 * (number + 1)) + weight.detach()
        for optimiser in (one, muon, adam):
            optimiser.step()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
