"""Time and memory of things to compare, taken in turn in one process, so that a busy machine slows all alike."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]
"""Does the work once. It may return a dict of numbers: parts of its time, in seconds."""


def interleaved(runs: Mapping[str, Run], repeats: int, warmup: int = 1) -> dict[str, list[dict[str, float]]]:
    """Seconds of every run, ``repeats`` rounds of all of them in order, after ``warmup`` rounds.

    Returns:
        for each name one dict per round: ``total`` and the parts that the run reported.
    """
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for turn in range(warmup + repeats):
        for name, run in runs.items():
            _wait()
            start = time.perf_counter()
            parts = run()
            _wait()
            total = time.perf_counter() - start
            if turn >= warmup:
                taken[name].append({"total": total, **(parts if isinstance(parts, dict) else {})})
    return taken


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """The spread of the total and of each part."""
    return {part: spread([each[part] for each in rounds]) for part in rounds[0]}


def ratio(above: list[dict[str, float]], below: list[dict[str, float]]) -> dict[str, float]:
    """Spread of the quotients round by round: what disturbs a whole round cancels."""
    return spread([one["total"] / other["total"] for one, other in zip(above, below, strict=True)])


def peak_bytes(run: Run) -> int:
    """Most bytes that the run held at a time, beyond what there was before it.

    It is done once before, so that lazily made buffers do not count.
    """
    run()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = [each for each in recorded.profiler.kineto_results.events() if each.name() == "[memory]"]
    held = peak = 0
    for each in sorted(events, key=lambda one: one.start_ns()):
        held += each.nbytes()
        peak = max(peak, held)
    return peak


def made_by(module: str, arguments: Sequence[str] | None, device: str = "cpu") -> dict[str, Any]:
    """The beginning of a result: the command as it was typed, and what its numbers depend on."""
    typed = sys.argv[1:] if arguments is None else arguments
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "command": " ".join([f"python -m benchmarks.{module}", *typed]),
        "surroundings": {
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "commit": commit.stdout.strip() or None,
            "machine": torch.cuda.get_device_name() if device.startswith("cuda") else _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average": [round(each, 1) for each in os.getloadavg()],
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
