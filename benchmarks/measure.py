"""Time and memory of things to compare, taken in turn in one process, so that a busy machine slows all alike."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
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


def ratio(above: list[dict[str, float]], below: list[dict[str, float]], part: str = "total") -> dict[str, float]:
    """Spread of the quotients round by round: what disturbs a whole round cancels."""
    return spread([one[part] / other["total"] for one, other in zip(above, below, strict=True)])


def peak_bytes(run: Run, *, warm: bool = True) -> int:
    """Most bytes that the run held at a time, beyond what there was before it.

    Args:
        warm: do it once before, so that lazily made buffers do not count; without, for what takes long.
    """
    if warm:
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


class Version:
    """A version of the library in a process of its own, which answers each line of JSON with one."""

    def __init__(self, source: Path, module: str, *arguments: str) -> None:
        paths = os.pathsep.join([str(source.resolve()), str(Path(__file__).parents[1])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], env={**os.environ, "PYTHONPATH": paths},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, command: str, **given: Any) -> dict[str, float]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([command, given]) + "\n")
        self._process.stdin.flush()
        answer: dict[str, float] = json.loads(self._process.stdout.readline())
        return answer

    def end(self) -> None:
        """End the process."""
        self._process.communicate()


def surroundings(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    import transformers

    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": _commit(),
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(each, 1) for each in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
