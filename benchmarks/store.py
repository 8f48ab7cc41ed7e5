"""Opening, adding, searching and gathering as a store grows, beside another version of this library.

Usage: python -m benchmarks.store --against ../before/src [--sizes 65536,1000000] [--open 10000000] [--rounds 15]

Each version runs in a process of its own over a store of its own with the same drawn keys and values; what they are
does not matter to exact search and to bytes. Rounds alternate, so that a busy machine slows both alike. Seconds are
those of the processor (``process_time``), in which other processes are not counted; opening is also taken by the clock.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Version, spread, surroundings

SEGMENT, DOCUMENT, NUM_CHUNKS = 256, 16_384, 16


class Drawn:
    """The model's place in a store, with keys and values drawn from a table instead of computed."""

    memory_layer, memory_layers, device, fingerprint = 0, (0,), torch.device("cpu"), "drawn"

    def __init__(self, heads: int, dim: int) -> None:
        self.memory_heads, self.memory_head_dim = heads, dim
        self.config = SimpleNamespace(chunk_size=4, max_position_embeddings=SEGMENT, _name_or_path="drawn")
        self.table = torch.randn(4096, 2, heads, dim, generator=torch.Generator().manual_seed(0))

    def encode(self, input_ids: torch.Tensor) -> SimpleNamespace:
        """Keys and values (B, H, T, D) of segments (B, T)."""
        rolled = self.table[input_ids % 4096] + 0.5 * self.table[input_ids.roll(1, 1) * 7 % 4096]
        keys, values = rolled.permute(2, 0, 3, 1, 4)
        return SimpleNamespace(keys=keys, values=values)


def serve(folder: Path) -> None:
    """One version: reads commands as JSON lines, does them, answers with seconds."""
    from longmem.store import MemoryStore, NewDocument

    torch.set_num_threads(1)
    done: dict[str, Callable[..., dict[str, float]]] = {}
    held: dict[str, Any] = {}

    def add(name: str, tokens: int, heads: int, dim: int) -> dict[str, float]:
        draw = np.random.default_rng(0)

        def documents() -> Iterator[NewDocument]:
            for number in range(-(-tokens // DOCUMENT)):
                size = min(DOCUMENT, tokens - number * DOCUMENT)
                yield NewDocument(f"{number}", ids=draw.integers(0, 1 << 20, size), time=float(number))

        model: Any = Drawn(heads, dim)
        with MemoryStore.open(folder / name, model=model) as store:
            begin = time.process_time()
            list(store.add_documents("bench", documents()))
            return {"add": time.process_time() - begin}

    def open_(name: str) -> dict[str, float]:
        begin, clock = time.process_time(), time.perf_counter()
        store = MemoryStore.open(folder / name, mode="read")
        taken = {"open": time.process_time() - begin, "open_clock": time.perf_counter() - clock}
        store.close()
        return taken

    def load(name: str, **_: Any) -> dict[str, float]:
        held["store"] = MemoryStore.open(folder / name, mode="read")
        begin = time.process_time()
        held["bank"] = held["store"].bank("bench").load()
        return {"load": time.process_time() - begin}

    def search(queries: int) -> dict[str, float]:
        bank = held["bank"]
        asked = torch.randn(1, bank.heads_kv, queries, bank.head_dim, generator=torch.Generator().manual_seed(1))
        begin = time.process_time()
        bank.search(asked, NUM_CHUNKS)
        return {f"search_{queries}": time.process_time() - begin}

    def gather(pairs: int, seed: int) -> dict[str, float]:
        bank, draw = held["bank"], np.random.default_rng(seed)
        chunks = np.sort(draw.integers(0, int(bank.chunks[0]), pairs))
        heads = draw.integers(0, bank.heads_kv, pairs)
        take = bank.take if hasattr(bank, "take") else _take(bank)
        take(chunks, heads)  # pages that nobody has read yet are the disk's time
        begin = time.process_time()
        for _ in range(200):
            take(chunks, heads)
        return {f"gather_{pairs}": (time.process_time() - begin) / 200}

    done.update(add=add, open=open_, load=load, search=search, gather=gather)
    for line in sys.stdin:
        command, given = json.loads(line)
        print(json.dumps(done[command](**given)), flush=True)


def _take(bank: Any) -> Callable[..., Any]:
    """Of a version before ``StoreBank.take``."""
    from longmem.store.runs import take_mapped  # type: ignore[attr-defined]

    return lambda chunks, heads: take_mapped(bank._runs, chunks, heads, bank.device)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="the other version's src folder (of a git worktree)")
    parser.add_argument("--sizes", default="65536,1000000", help="tokens of the stores that are searched")
    parser.add_argument("--open", type=int, default=10_000_000, help="tokens of the store that is only opened")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("results/store.json"))
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.serve:
        return serve(given.serve)
    sources = {"now": Path(__file__).parents[1] / "src", **({"before": given.against} if given.against else {})}
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.store", *(sys.argv[1:] if arguments is None else arguments)]),
        "surroundings": surroundings(torch.device("cpu")),
    }
    with tempfile.TemporaryDirectory() as folder:
        versions = {}
        for name, source in sources.items():
            (Path(folder) / name).mkdir()
            versions[name] = Version(source, "benchmarks.store", "--serve", str(Path(folder) / name))
        for tokens in [int(size) for size in given.sizes.split(",")]:
            result[f"{tokens}"] = measure(versions, f"{tokens}", tokens, given.rounds, heads=4, dim=64)
            report(tokens, result[f"{tokens}"])
        only = {"now": versions["now"]}
        for name, tokens in {"small": 65_536, "large": given.open}.items():
            only["now"]("add", name=name, tokens=tokens, heads=1, dim=16)
        taken = {
            f"{size}": [only["now"]("open", name=size)["open_clock"] for _ in range(30)] for size in ("small", "large")
        }
        result["open_seconds"] = {"65536": spread(taken["small"]), f"{given.open}": spread(taken["large"])}
        print("open, seconds by the clock:", json.dumps(result["open_seconds"]))
        for version in versions.values():
            version.end()
    given.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(versions: dict[str, Version], name: str, tokens: int, rounds: int, **shape: int) -> dict[str, Any]:
    """Seconds of every step for each version, and the quotients now / before."""
    seconds: dict[str, dict[str, list[float]]] = {version: {} for version in versions}
    steps: list[tuple[str, dict[str, Any], int]] = [
        ("add", {"name": name, "tokens": tokens, **shape}, 1),
        ("load", {"name": name}, 3),
        ("open", {"name": name}, rounds),
        ("search", {"queries": 1}, rounds),
        ("search", {"queries": SEGMENT}, max(3, rounds // 3)),
        ("gather", {"pairs": 128}, rounds),
        ("gather", {"pairs": 4096}, rounds),
    ]
    for command, given, times in steps:
        for turn in range(times):
            for version, call in versions.items():
                more = {"seed": turn} if command == "gather" else {}
                for part, value in call(command, **given, **more).items():
                    seconds[version].setdefault(part, []).append(value)
    found: dict[str, Any] = {v: {part: spread(each) for part, each in parts.items()} for v, parts in seconds.items()}
    if "before" in seconds:
        found["now_over_before"] = {
            part: spread([now / before for now, before in zip(values, seconds["before"][part], strict=True)])
            for part, values in seconds["now"].items()
        }
    return found


def report(tokens: int, found: dict[str, Any]) -> None:
    """Print a line for every step."""
    for part, value in found["now"].items():
        other = found.get("now_over_before", {}).get(part)
        ratio = (
            "" if other is None else f", now / before {other['median']:.2f} ({other['min']:.2f} to {other['max']:.2f})"
        )
        print(f"{tokens:>9} tokens  {part:<12} {1000 * value['median']:9.3f} ms{ratio}", flush=True)


if __name__ == "__main__":
    main()
