"""Bootstrap intervals of perplexities and of their paired differences.

U units (documents, or blocks of a document), each with a number of tokens and, per model, a summed negative
log-likelihood. Units are drawn with replacement, the same ones for both models of a difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
BATCH = 4_000_000  # drawn counts held at one time


@dataclass(frozen=True)
class Interval:
    """A percentile interval; ``units`` says what was resampled and ``count`` how many of them there were."""

    low: float
    high: float
    level: float
    units: str
    count: int
    resamples: int
    seed: int

    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are drawn; the seed makes them repeatable."""

    resamples: int = 2000
    level: float = 0.95
    seed: int = 0

    def perplexity(self, nll: Floats, tokens: Floats, units: str) -> Interval | None:
        """Interval of exp(sum nll / sum tokens); nll (U,), tokens (U,). None with fewer than two units."""
        return self._interval([np.exp(s[0] / s[-1]) for s in self._sums(np.stack([nll, tokens]))], len(nll), units)

    def relative_difference(self, nll: Floats, against: Floats, tokens: Floats, units: str) -> Interval | None:
        """Interval of ``relative_difference``: nll (U,), against (U,), tokens (U,), paired by unit."""
        drawn = [100 * np.expm1((s[0] - s[1]) / s[2]) for s in self._sums(np.stack([nll, against, tokens]))]
        return self._interval(drawn, len(nll), units)

    def mean(self, total: Floats, count: Floats, units: str) -> Interval | None:
        """Interval of sum total / sum count: a mean over examples, drawn by unit. Both (U,)."""
        return self._interval([s[0] / s[-1] for s in self._sums(np.stack([total, count]))], len(total), units)

    def _sums(self, columns: Floats) -> Iterator[Floats]:
        """Columns (Q, U) summed over each resample, (Q, resamples), in batches."""
        generator, units = np.random.default_rng(self.seed), columns.shape[1]
        if units < 2:
            return
        step = max(1, BATCH // units)
        for at in range(0, self.resamples, step):
            draws = min(step, self.resamples - at)
            counts = generator.multinomial(units, np.full(units, 1 / units), size=draws)
            yield columns @ counts.T

    def _interval(self, drawn: list[Floats], count: int, units: str) -> Interval | None:
        if not drawn:
            return None
        edge = 50 * (1 - self.level)
        low, high = np.percentile(np.concatenate(drawn), [edge, 100 - edge])
        return Interval(float(low), float(high), self.level, units, count, self.resamples, self.seed)


def relative_difference(nll: Floats, against: Floats, tokens: Floats) -> float:
    """How far a perplexity lies from another, in % of the other; below zero is better. All (U,)."""
    return float(100 * np.expm1((nll.sum() - against.sum()) / tokens.sum()))
