"""Schedules end at zero; every trained weight has exactly one optimiser."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from longmem import AlibiGPTForCausalLM
from longmem.training.optimiser import Optimisers, lr_share
from longmem.training.recipe import OptimSection


@pytest.mark.parametrize("schedule", ["polynomial", "cosine", "wsd"])
def test_rates_rise_to_their_peak_and_end_at_zero(schedule: str) -> None:
    optim = OptimSection(schedule=schedule, warmup=0.1)
    shares = [lr_share(optim, step / 1000) for step in range(1001)]
    assert shares[0] == 0
    assert max(shares) == pytest.approx(1)
    assert shares.index(max(shares)) == 100
    assert shares[-1] == pytest.approx(0, abs=1e-12)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(shares[100:]))


def test_the_papers_decay_is_a_straight_line() -> None:
    optim = OptimSection(warmup=0.0)
    assert [lr_share(optim, done) for done in (0.0, 0.25, 0.5, 1.0)] == [1.0, 0.75, 0.5, 0.0]


def test_wsd_is_flat_until_its_decay() -> None:
    optim = OptimSection(schedule="wsd", warmup=0.0, decay_fraction=0.2)
    assert [lr_share(optim, done) for done in (0.0, 0.8, 0.9)] == pytest.approx([1.0, 1.0, 0.5])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_weight_is_in_one_group_and_vectors_do_not_decay(kind: str, tiny_backbone: AlibiGPTForCausalLM) -> None:
    optimisers = Optimisers(tiny_backbone.named_parameters(), OptimSection(optimiser=kind, weight_decay=0.1))
    groups = [group for part in optimisers.parts for group in part.param_groups]
    weights = [weight for group in groups for weight in group["params"]]
    assert sorted(map(id, weights)) == sorted(map(id, tiny_backbone.parameters()))
    for group in groups:
        assert {weight.ndim >= 2 for weight in group["params"]} == {group["weight_decay"] > 0}


def test_muon_takes_the_matrices_of_the_layers_and_no_embedding(tiny_backbone: AlibiGPTForCausalLM) -> None:
    _, muon = Optimisers(tiny_backbone.named_parameters(), OptimSection(optimiser="muon")).parts
    taken = {id(weight) for group in muon.param_groups for weight in group["params"]}
    names = [name for name, weight in tiny_backbone.named_parameters() if id(weight) in taken]
    assert len(names) == 4 * 6
    assert all(".h." in name for name in names)


def test_gates_have_a_rate_of_their_own_that_follows_the_schedule() -> None:
    gate, weight = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(2, 2))
    named = [("sidenet.memory_gate", gate), ("sidenet.layers.0.w", weight)]
    optimisers = Optimisers(named, OptimSection(lr=1e-3, gate_lr=1e-2))
    optimisers.set_share(0.5)
    rates = {id(p): group["lr"] for group in optimisers.parts[0].param_groups for p in group["params"]}
    assert (rates[id(gate)], rates[id(weight)]) == (5e-3, 5e-4)
