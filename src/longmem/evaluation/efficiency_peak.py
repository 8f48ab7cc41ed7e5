"""Peak memory of one run: in a process of its own on the CPU, from the allocator's own count on a GPU.

``python -m longmem.evaluation.efficiency_peak`` is that process: JSON from stdin says what to run, JSON comes back.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longmem.evaluation.efficiency_run import Setting, Source, as_job, context_ids, from_job, run
from longmem.modeling.longmem import LongMem


@dataclass(frozen=True)
class Peak:
    """Most bytes held at a time: by the process (or on the device) in all, and beyond what it held with the weights."""

    total: int
    beyond: int


def peak_in_child(source: Source, setting: Setting, system: str, context: int, threads: int) -> Peak | str:
    """Load the model in a fresh process, run once, and read the high-water mark of its resident memory.

    Returns:
        the peak, or in one line why there is none.
    """
    job = as_job(source, setting, system, context) | {"threads": threads}
    command = [sys.executable, "-m", "longmem.evaluation.efficiency_peak"]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        why = "killed, out of memory?" if done.returncode in (-9, 137) else last
        return f"its process ended with status {done.returncode}: {why}"
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return Peak(found["total"], found["beyond"])


def peak_on_device(model: LongMem, system: str, context: int, setting: Setting, seed: int) -> Peak:
    """Of the GPU's allocator, in this process."""
    ids = context_ids(model, context, seed)
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    run(model, system, ids, setting)
    total = torch.cuda.max_memory_allocated(model.device)
    return Peak(total, total - before)


def resident() -> tuple[int, int]:
    """Bytes of this process in RAM now, and the most there ever were (or since ``forget_peak``)."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        # not getrusage: its mark is inherited from the parent process through fork and exec
        now, most = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return now, max(now, most)
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return most, most


def forget_peak() -> None:
    """Let the high-water mark begin anew, where the system allows it: loading a model takes more than having it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def main() -> None:
    """The child: JSON in, JSON out."""
    job: dict[str, Any] = json.load(sys.stdin)
    torch.set_num_threads(job.pop("threads"))
    source, setting, system, context = from_job(job)
    model = source.load()
    ids = context_ids(model, context, source.seed)
    run(model, system, ids[:, : min(context, 2 * model.config.chunk_size)], setting)  # libraries load what they need
    forget_peak()
    before, _ = resident()
    run(model, system, ids, setting)
    _, most = resident()
    sys.stdout.write(json.dumps({"total": most, "beyond": most - before}) + "\n")


if __name__ == "__main__":
    main()
