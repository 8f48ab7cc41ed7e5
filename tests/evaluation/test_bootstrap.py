"""Intervals: they contain what they must, are paired, and repeat."""

from __future__ import annotations

import math

import numpy as np
import pytest

from longmem.evaluation.bootstrap import Bootstrap, relative_difference


def sample(units: int = 12) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(5)
    tokens = generator.integers(500, 5000, units).astype(float)
    return tokens * generator.normal(3.0, 0.4, units), tokens


def test_interval_of_identical_models_contains_zero() -> None:
    nll, tokens = sample()
    interval = Bootstrap().relative_difference(nll, nll.copy(), tokens, "documents")
    assert interval is not None
    assert interval.low <= 0 <= interval.high


def test_constant_gain_is_found_exactly_because_units_are_paired() -> None:
    nll, tokens = sample()
    interval = Bootstrap().relative_difference(nll - 0.1 * tokens, nll, tokens, "documents")
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((100 * math.expm1(-0.1),) * 2)
    alone = Bootstrap().perplexity(nll, tokens, "documents")
    assert alone is not None
    assert alone.high > 1.05 * alone.low


def test_difference_by_hand() -> None:
    tokens = np.array([100.0, 300.0])
    better, worse = tokens * math.log(9), tokens * math.log(10)
    assert relative_difference(better, worse, tokens) == pytest.approx(-10.0)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator, hits, trials = np.random.default_rng(0), 0, 200
    for seed in range(trials):
        tokens = np.full(40, 1000.0)
        gains = generator.normal(-0.02, 0.03, 40)
        interval = Bootstrap(resamples=400, seed=seed).relative_difference(
            tokens * gains, 0 * tokens, tokens, "documents"
        )
        assert interval is not None
        hits += interval.low <= 100 * math.expm1(-0.02) <= interval.high
    assert 0.88 < hits / trials < 0.99


def test_one_unit_has_no_interval() -> None:
    assert Bootstrap().perplexity(np.array([3.0]), np.array([1.0]), "documents") is None


def test_groups_widen_an_interval_and_groups_of_one_unit_do_not_change_it() -> None:
    """Twelve documents of two projects that differ: a thirteenth may be of either, or of a third."""
    tokens = np.full(12, 1000.0)
    nll = tokens * np.repeat([3.0, 2.0], 6) + np.arange(12)
    alone = Bootstrap().perplexity(nll, tokens, "documents")
    apart = Bootstrap().perplexity(nll, tokens, "documents", [f"project {i}" for i in range(12)])
    grouped = Bootstrap().perplexity(nll, tokens, "documents", ["a"] * 6 + ["b"] * 6)
    assert alone is not None and apart is not None and grouped is not None
    assert (alone.low, alone.high, alone.groups) == (apart.low, apart.high, 12)
    assert (grouped.count, grouped.groups) == (12, 2)
    assert grouped.low == pytest.approx(math.exp(2), rel=0.02) and grouped.high == pytest.approx(math.exp(3), rel=0.02)
    assert grouped.low < alone.low < alone.high < grouped.high
