"""Adding to a bank, searching it and attending to what was found, against another version of longmem.

Each version runs in a process of its own; the two answer in turn, so that a busy machine slows both alike. The same
random keys, values and queries; 8 heads of 32, chunks of 4, 16 chunks read; one
thread, seconds of the processor.

Usage: python -m benchmarks.memory_speed OTHER/src [--tokens 65536,1048576] [--rounds 9] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

HEADS, DIM, SIZE, FOUND = 8, 32, 4, 16
SHAPES = {"token": (1, 1), "segment": (4, 256)}
"""Rows and queries: of a token that is decoded, and of a segment in training."""


def answer() -> None:
    """One version's process: ``fill`` makes a bank of so many tokens, and every command is a round."""
    from longmem.memory import MemoryBank
    from longmem.modeling.attention import memory_attention
    from longmem.types import AttentionKV

    torch.set_num_threads(1)
    bank: Any = None
    draw = torch.Generator().manual_seed(0)
    queries = {name: torch.randn(rows, HEADS, length, DIM, generator=draw) for name, (rows, length) in SHAPES.items()}
    segment = AttentionKV(*(torch.randn(1, HEADS, 4096, DIM, generator=draw) for _ in range(2)))
    for line in sys.stdin:
        command, given = json.loads(line)
        if command == "fill":
            bank = MemoryBank(1, given["tokens"], HEADS, DIM, SIZE)
            for _ in range(given["tokens"] // 4096 + 1):
                bank.add(segment)
        seconds: dict[str, float] = {}
        for name, asked in queries.items():
            rows = torch.zeros(len(asked), dtype=torch.long)
            start = time.process_time()
            found = bank.search(asked, FOUND, rows)
            seconds[f"search_{name}"] = time.process_time() - start
            start = time.process_time()
            memory_attention(asked, found, scaling=DIM**-0.5)
            seconds[f"gather_{name}"] = time.process_time() - start
        start = time.process_time()
        bank.add(segment)
        seconds["add_4096"] = time.process_time() - start
        print(json.dumps(seconds), flush=True)


def main() -> None:
    from benchmarks.measure import Version, spread, surroundings

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--tokens", default="65536,1048576")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("results/memory-speed.json"))
    given = parser.parse_args()
    sources = {"before": given.other, "now": Path(__file__).parents[1] / "src"}
    versions = {name: Version(source, "benchmarks.memory_speed", "--serve") for name, source in sources.items()}
    command = f"python -m benchmarks.memory_speed OTHER/src --tokens {given.tokens} --rounds {given.rounds}"
    record: dict[str, Any] = {"command": command, "surroundings": surroundings(torch.device("cpu")), "tokens": {}}
    for tokens in given.tokens.split(","):
        for version in versions.values():
            version("fill", tokens=int(tokens))
        rounds = [{name: version("round") for name, version in versions.items()} for _ in range(given.rounds)]
        now, before = ([each[name] for each in rounds] for name in ("now", "before"))
        record["tokens"][tokens] = {
            part: {
                "milliseconds": spread([1e3 * each[part] for each in now]),
                "now_over_before": spread([one[part] / other[part] for one, other in zip(now, before, strict=True)]),
            }
            for part in now[0]
        }
        print(
            tokens,
            {part: round(each["now_over_before"]["median"], 3) for part, each in record["tokens"][tokens].items()},
        )
    given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    answer() if "--serve" in sys.argv else main()
