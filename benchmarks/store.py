"""Opening, adding, searching and gathering as a store grows.

Usage: python -m benchmarks.store [--sizes 65536,1000000] [--open 10000000] [--rounds 15]

Keys and values are drawn; what they are does not matter to exact search and to bytes. Seconds are those of the
processor (``process_time``), in which other processes are not counted; opening is also taken by the clock. Two versions
of the library are compared by two runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.measure import made_by, spread
from longmem.evaluation.results import write_json
from longmem.store import MemoryStore, NewDocument

SEGMENT, DOCUMENT, NUM_CHUNKS = 256, 16_384, 16


class Drawn:
    """The model's place in a store, with keys and values drawn from a table instead of computed."""

    memory_layer, memory_layers, device, fingerprint = 0, (0,), torch.device("cpu"), "drawn"

    def __init__(self, heads: int, dim: int) -> None:
        self.memory_heads, self.memory_head_dim = heads, dim
        backbone = SimpleNamespace(max_position_embeddings=SEGMENT, model_type="drawn", _name_or_path="")
        backbone.get_text_config = lambda: backbone
        self.config = SimpleNamespace(chunk_size=4, backbone_config=backbone, backbone_name_or_path=None)
        self.table = torch.randn(4096, 2, heads, dim, generator=torch.Generator().manual_seed(0))

    def accepts(self, fingerprint: str) -> bool:
        return fingerprint == self.fingerprint

    def get_input_embeddings(self) -> SimpleNamespace:
        return SimpleNamespace(weight=torch.empty(1 << 20, 0))

    def encode(self, input_ids: torch.Tensor) -> SimpleNamespace:
        """Keys and values (B, H, T, D) of segments (B, T)."""
        rolled = self.table[input_ids % 4096] + 0.5 * self.table[input_ids.roll(1, 1) * 7 % 4096]
        keys, values = rolled.permute(2, 0, 3, 1, 4)
        return SimpleNamespace(keys=keys, values=values)


def fill(folder: Path, tokens: int, heads: int, dim: int) -> float:
    """Make a store of so many tokens; the seconds that adding took."""
    draw = np.random.default_rng(0)

    def documents() -> Iterator[NewDocument]:
        for number in range(-(-tokens // DOCUMENT)):
            size = min(DOCUMENT, tokens - number * DOCUMENT)
            yield NewDocument(f"{number}", ids=draw.integers(0, 1 << 20, size), time=float(number))

    model: Any = Drawn(heads, dim)
    with MemoryStore.open(folder, model=model) as store:
        begin = time.process_time()
        list(store.add_documents("bench", documents()))
        return time.process_time() - begin


def opening(folder: Path) -> dict[str, float]:
    begin, clock = time.process_time(), time.perf_counter()
    store = MemoryStore.open(folder, mode="read")
    taken = {"open": time.process_time() - begin, "open_clock": time.perf_counter() - clock}
    store.close()
    return taken


def measure(folder: Path, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of every step over a store of so many tokens."""
    seconds: dict[str, list[float]] = {"add": [fill(folder, tokens, heads=4, dim=64)]}
    for _ in range(rounds):
        for part, value in opening(folder).items():
            seconds.setdefault(part, []).append(value)
    store = MemoryStore.open(folder, mode="read")
    begin = time.process_time()
    bank: Any = store.bank("bench").load()
    seconds["load"] = [time.process_time() - begin]
    for turn in range(rounds):
        for queries in (1, SEGMENT):
            asked = torch.randn(1, bank.heads_kv, queries, bank.head_dim, generator=torch.Generator().manual_seed(1))
            begin = time.process_time()
            bank.search(asked, NUM_CHUNKS)
            seconds.setdefault(f"search_{queries}", []).append(time.process_time() - begin)
        for pairs in (128, 4096):
            draw = np.random.default_rng(turn)
            slots = np.sort(draw.integers(0, int(bank.chunks[0]), pairs))
            heads = draw.integers(0, bank.heads_kv, pairs)
            bank._take(slots, heads)  # pages that nobody has read are the disk's time
            begin = time.process_time()
            for _ in range(200):
                bank._take(slots, heads)
            seconds.setdefault(f"gather_{pairs}", []).append((time.process_time() - begin) / 200)
    store.close()
    return {part: spread(each) for part, each in seconds.items()}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="65536,1000000", help="tokens of the stores that are searched")
    parser.add_argument("--open", type=int, default=10_000_000, help="tokens of the store that is only opened")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("results/store.json"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result = made_by("store", arguments)
    with tempfile.TemporaryDirectory() as folder:
        for tokens in map(int, given.sizes.split(",")):
            result[f"{tokens}"] = found = measure(Path(folder) / f"{tokens}", tokens, given.rounds)
            for part, value in found.items():
                print(f"{tokens:>9} tokens  {part:<12} {1000 * value['median']:9.3f} ms", flush=True)
        result["open_seconds"] = {}
        for tokens in (65_536, given.open):
            fill(Path(folder) / f"open-{tokens}", tokens, heads=1, dim=16)
            taken = [opening(Path(folder) / f"open-{tokens}")["open_clock"] for _ in range(30)]
            result["open_seconds"][f"{tokens}"] = spread(taken)
        print("open, seconds by the clock:", json.dumps(result["open_seconds"]))
    write_json(given.out, result)
    return result


if __name__ == "__main__":
    main()
