"""Times on a machine that others use too: seconds of the processor, in which others' work is not counted.

Right for what computes in memory, with one thread; what waits for a disk has to be timed by the clock.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from benchmarks.measure import Run, interleaved


def by_processor(runs: Mapping[str, Run], repeats: int) -> dict[str, list[dict[str, float]]]:
    """As ``interleaved``: ``total`` in seconds of the processor, ``clock`` beside it in seconds of the clock."""

    def timed(run: Run) -> Run:
        def once() -> dict[str, float]:
            began = time.process_time()
            run()
            return {"processor": time.process_time() - began}

        return once

    taken = interleaved({name: timed(run) for name, run in runs.items()}, repeats)
    return {
        name: [{"total": each["processor"], "clock": each["total"]} for each in rounds]
        for name, rounds in taken.items()
    }
