"""Bootstrap intervals of perplexities, means and paired differences.

U units (documents, examples, blocks), each with a count and, per system, a sum. Units are drawn with replacement, the
same ones for both systems of a difference. Units that are not independent, such as the chapters of one project, form
groups: groups are drawn first, then units within each drawn group.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
BATCH = 4_000_000  # counts that exist at one time

Statistic = Callable[[Floats], Floats]
"""Of the sums of each resample: (Q, draws) -> (draws,)."""


@dataclass(frozen=True)
class Interval:
    """A percentile interval.

    Attributes:
        level: 0.95 is a 95 % interval.
        units: what was drawn.
        count: of units.
        groups: of groups that were drawn before their units; as many as units where units are independent.
    """

    low: float
    high: float
    level: float
    units: str
    count: int
    resamples: int
    seed: int
    groups: int | None = None


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are drawn; the seed makes them repeatable."""

    resamples: int = 2000
    level: float = 0.95
    seed: int = 0

    def perplexity(
        self, nll: Floats, tokens: Floats, units: str, groups: Sequence[Hashable] | None = None
    ) -> Interval | None:
        """Interval of exp(sum nll / sum tokens), both (U,).

        Args:
            units: their name.
            groups: (U,), the group of each unit; None is each unit by itself.

        Returns:
            None with fewer than two units.
        """
        return self._interval([nll, tokens], lambda s: np.exp(s[0] / s[1]), units, groups)

    def relative_difference(
        self, nll: Floats, against: Floats, tokens: Floats, units: str, groups: Sequence[Hashable] | None = None
    ) -> Interval | None:
        """Interval of ``relative_difference``, all (U,)."""
        columns = [nll, against, tokens]
        return self._interval(columns, lambda s: 100 * np.expm1((s[0] - s[1]) / s[2]), units, groups)

    def mean(
        self, total: Floats, count: Floats, units: str, groups: Sequence[Hashable] | None = None
    ) -> Interval | None:
        """Interval of sum total / sum count, a mean over examples; both (U,)."""
        return self._interval([total, count], lambda s: s[0] / s[1], units, groups)

    def _interval(
        self, columns: Sequence[Floats], statistic: Statistic, units: str, groups: Sequence[Hashable] | None
    ) -> Interval | None:
        values = np.stack(columns)  # (Q, U)
        count = values.shape[1]
        if count < 2:
            return None
        number = {group: at for at, group in enumerate(dict.fromkeys(range(count) if groups is None else groups))}
        members = np.array([number[group] for group in (range(count) if groups is None else groups)])
        drawn = np.concatenate([statistic(values @ times.T) for times in self._draws(members)])
        edge = 50 * (1 - self.level)
        low, high = np.percentile(drawn, [edge, 100 - edge])
        return Interval(float(low), float(high), self.level, units, count, self.resamples, self.seed, len(number))

    def _draws(self, members: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """How often each resample has each unit, (draws, U) at a time; ``members`` (U,) is each unit's group."""
        generator, sizes = np.random.default_rng(self.seed), np.bincount(members)
        step = max(1, BATCH // len(members))
        for at in range(0, self.resamples, step):
            draws = min(step, self.resamples - at)
            of_groups = generator.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=draws)
            if len(sizes) == len(members):  # every unit is a group
                yield of_groups
                continue
            times = np.empty((draws, len(members)), dtype=np.int64)
            for group, size in enumerate(sizes.tolist()):
                # a group that was drawn twice gives twice as many units
                some = generator.multinomial(size * of_groups[:, group], np.full(size, 1 / size))
                times[:, members == group] = some
            yield times


def relative_difference(nll: Floats, against: Floats, tokens: Floats) -> float:
    """How far a perplexity lies from another, in % of the other; below zero is better. All (U,)."""
    return float(100 * np.expm1((nll.sum() - against.sum()) / tokens.sum()))
