"""Intervals: they contain what they must, are paired, and repeat."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from longmem.evaluation.results import Bootstrap, percent


def edges(found: dict[str, Any] | None) -> tuple[float, float]:
    assert found is not None
    return found["low"], found["high"]


def test_a_constant_gain_is_found_exactly_because_units_are_paired() -> None:
    generator = np.random.default_rng(5)
    tokens = generator.integers(500, 5000, 12).astype(float)
    nll = tokens * generator.normal(3.0, 0.4, 12)
    gain = Bootstrap().interval(-0.1 * tokens, tokens, "documents", of=percent)
    assert edges(gain) == pytest.approx((100 * math.expm1(-0.1),) * 2)
    low, high = edges(Bootstrap().interval(nll, tokens, "documents", of=np.exp))
    assert high > 1.05 * low
    assert percent(math.log(9) - math.log(10)) == pytest.approx(-10.0)
    assert Bootstrap().interval(np.array([3.0]), np.array([1.0]), "documents") is None


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator, hits, trials, tokens = np.random.default_rng(0), 0, 200, np.full(40, 1000.0)
    for seed in range(trials):
        gains = tokens * generator.normal(-0.02, 0.03, 40)
        low, high = edges(Bootstrap(400, seed=seed).interval(gains, tokens, "documents", of=percent))
        hits += low <= 100 * math.expm1(-0.02) <= high
    assert 0.88 < hits / trials < 0.99


def test_groups_widen_an_interval_and_groups_of_one_unit_do_not_change_it() -> None:
    """Twelve documents of two projects that differ: a thirteenth may be of either, or of a third."""
    tokens = np.full(12, 1000.0)
    nll = tokens * np.repeat([3.0, 2.0], 6) + np.arange(12)
    alone, apart, grouped = (
        Bootstrap().interval(nll, tokens, "documents", groups, np.exp)
        for groups in (None, [f"project {i}" for i in range(12)], ["a"] * 6 + ["b"] * 6)
    )
    assert alone is not None and grouped is not None
    assert alone == apart and (alone["groups"], grouped["count"], grouped["groups"]) == (12, 12, 2)
    assert edges(grouped) == pytest.approx((math.exp(2), math.exp(3)), rel=0.02)
    assert grouped["low"] < alone["low"] < alone["high"] < grouped["high"]
