"""Bootstrap intervals of means, perplexities and paired differences.

U units (documents, examples, blocks) are drawn with replacement, the same ones for both systems of a difference. Units
that are not independent, such as the chapters of one project, form groups: groups are drawn first, then units within
each drawn group.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
BATCH = 4_000_000  # counts that exist at one time


def percent(difference: Any) -> Any:
    """How far a perplexity is from another, in % of the other, by the difference of nats per token."""
    return 100 * np.expm1(difference)


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are drawn; the seed makes them repeatable."""

    resamples: int = 2000
    level: float = 0.95
    seed: int = 0

    def interval(
        self,
        totals: Floats,
        counts: Floats,
        units: str,
        groups: Sequence[Hashable] | None = None,
        of: Callable[[Floats], Floats] = np.asarray,
    ) -> dict[str, Any] | None:
        """Percentile interval of ``of(sum totals / sum counts)``, both (U,); None with fewer than two units.

        Args:
            units: what a unit is, for the result file.
            groups: (U,), the group of each unit; None is each unit by itself.
            of: ``np.exp`` gives the interval of a perplexity, ``percent`` that of a difference.
        """
        if len(totals) < 2:
            return None
        names = range(len(totals)) if groups is None else groups
        number = {group: at for at, group in enumerate(dict.fromkeys(names))}
        draws, values = self._draws(np.array([number[name] for name in names])), np.stack([totals, counts])
        drawn = np.concatenate([of(total / count) for total, count in (values @ times.T for times in draws)])
        edge = 50 * (1 - self.level)
        low, high = np.percentile(drawn, [edge, 100 - edge]).tolist()
        about = {"level": self.level, "units": units, "count": len(totals), "resamples": self.resamples}
        return {"low": low, "high": high, **about, "seed": self.seed, "groups": len(number)}

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
                times[:, members == group] = generator.multinomial(size * of_groups[:, group], np.full(size, 1 / size))
            yield times
