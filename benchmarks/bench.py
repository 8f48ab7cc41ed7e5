"""``make bench``: speed and memory of retrieval and of an adaptation step, as ratios taken in one process.

Usage: python -m benchmarks.bench [--device cuda] [--threads N] [--repeats N] [--quick] [--out results/bench.json]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import retrieval, step
from benchmarks.measure import surroundings
from longmem.evaluation.results import write_json


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run everything, print the ratios, keep the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds; medians are reported with min and max")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="small memories, two rounds: is the bench itself alive?")
    parser.add_argument("--out", type=Path, default=Path("results/bench.json"))
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    sizes = (1024, 2048) if given.quick else (16384, 65536)
    repeats = 2 if given.quick else given.repeats
    if given.quick:
        step.SHAPE.update(hidden_size=64, num_hidden_layers=4, vocab_size=256)
    _say(f"adaptation step at {sizes} tokens of memory, {repeats} rounds ...")
    rows, segment, layer = (2, 64, 1) if given.quick else (4, 256, 5)
    steps = step.measure(
        sizes, rows, segment, repeats=repeats, device=given.device, seed=given.seed, memory_layer=layer
    )
    _say("retrieval and memory attention ...")
    parts = retrieval.measure(sizes, rows=rows, segment=segment, repeats=repeats, device=given.device, seed=given.seed)
    result = {
        "command": " ".join(["python -m benchmarks.bench", *(sys.argv[1:] if arguments is None else arguments)]),
        "seed": given.seed,
        "rounds": repeats,
        "surroundings": surroundings(torch.device(given.device)),
        "step": steps,
        "retrieval": parts,
    }
    write_json(given.out, result)
    print("\n".join(lines(result)))
    _say(f"kept in {given.out}")
    return result


def lines(result: dict[str, Any]) -> list[str]:
    """The result as a few readable lines."""
    steps, told = result["step"], []
    for name, parts in steps["seconds"].items():
        inside = ", ".join(f"{part} {value['median']:.3f}" for part, value in parts.items() if part != "total")
        total = parts["total"]
        told.append(f"{name:<18} {total['median']:.3f} s a step ({total['min']:.3f} to {total['max']:.3f}); {inside}")
    for name in (
        "step_over_step_without_memory",
        "search_share_of_step",
        "throughput_over_empty_bank",
        "released_over_ours",
    ):
        for tokens, value in steps[name].items():
            told.append(f"{name} at {tokens} tokens: {value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})")
    for tokens, peak in steps["peak_bytes_of_step_beyond_bank"].items():
        told.append(f"peak of a step beyond a bank of {tokens} tokens: {peak / 2**20:.1f} MiB")
    for record in result["retrieval"]:
        saved = record["materialised_over_blockwise"]
        told.append(
            f"retrieval + memory attention at {record['memory_tokens']} tokens, materialised over blockwise: "
            f"time {saved['seconds']['median']:.2f}, peak memory {saved['peak_bytes']:.1f}"
        )
    return told


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
