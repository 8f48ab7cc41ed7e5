"""Speed and size of a store as it grows, as ratios taken in one process.

Usage: python -m benchmarks.store [--sizes 65536,262144,1048576] [--heads 4] [--quick] [--out results/store.json]

A store of every size is filled with keys and values drawn at random (what they are does not matter to exact search and
to bytes), and measured: opening, memory of the process, search for a segment and for one token against the bare matrix
product and against reading the chunk keys once, decoding. Adding is measured with a real backbone against its plain
forward.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import interleaved, ratio, spread, summary, surroundings
from longmem import AlibiGPTConfig, AlibiGPTForCausalLM, LongMem, MemoryStore
from longmem.store import NewDocument
from longmem.types import AttentionKV

SEGMENT = 256
DOCUMENT = 16_384
HEAD_DIM = 64
NUM_CHUNKS = 16


class Drawn:
    """The model's place in the store, with keys and values drawn from a table instead of computed."""

    def __init__(self, model: LongMem, seed: int) -> None:
        self.config, self.device = model.config, model.device
        self.fingerprint, self.memory_layer = model.fingerprint, model.memory_layer
        self.memory_heads, self.memory_head_dim = model.memory_heads, model.memory_head_dim
        draw = torch.Generator().manual_seed(seed)
        self.table = torch.randn(4096, 2, self.memory_heads, self.memory_head_dim, generator=draw)

    def encode(self, input_ids: Tensor) -> AttentionKV:
        """Keys and values (B, Hkv, T, D) of segments (B, T)."""
        rolled = self.table[input_ids % 4096] + 0.5 * self.table[input_ids.roll(1, 1) * 7 % 4096]
        keys, values = rolled.permute(2, 0, 3, 1, 4)
        return AttentionKV(keys, values)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run everything, print the ratios, keep the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="65536,262144,1048576", help="tokens, the smallest first")
    parser.add_argument("--heads", type=int, default=4, help=f"key/value heads of {HEAD_DIM}")
    parser.add_argument("--add-tokens", type=int, default=131_072, help="tokens that a real backbone encodes")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the stores are made (default: a temporary folder)")
    parser.add_argument("--quick", action="store_true", help="small stores, two rounds: is the bench itself alive?")
    parser.add_argument("--out", type=Path, default=Path("results/store.json"))
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    sizes = [2048, 4096] if given.quick else [int(size) for size in given.sizes.split(",")]
    repeats, add_tokens = (2, 4096) if given.quick else (given.repeats, given.add_tokens)
    torch.manual_seed(given.seed)
    model = _model(2 if given.quick else given.heads)
    root = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        result = {
            "command": " ".join(["python -m benchmarks.store", *(sys.argv[1:] if arguments is None else arguments)]),
            "seed": given.seed,
            "rounds": repeats,
            "heads": model.memory_heads,
            "head_dim": model.memory_head_dim,
            "chunk_size": model.config.chunk_size,
            "surroundings": surroundings(torch.device("cpu")),
            "add": _adding(model, root / "add", add_tokens, given.seed),
            "sizes": {},
        }
        decoding: dict[str, Any] = {}
        stores = {}
        for size in sizes:
            _say(f"a store of {size:,} tokens ...")
            stores[size] = _fill(model, root / str(size), size, given.seed)
            result["sizes"][str(size)] = _size(model, stores[size], size, repeats)
        banks = [(size, MemoryStore.open(path, model=model, mode="read")) for size, path in stores.items()]
        runs = {str(size): _decode(model, store.bank("bench")) for size, store in banks}
        taken = interleaved(runs, repeats)
        for size in runs:
            decoding[size] = {
                "seconds": summary(taken[size]),
                "speed_over_smallest": ratio(taken[str(sizes[0])], taken[size]),
            }
        for _, store in banks:
            store.close()
        result["decode"] = decoding
    finally:
        shutil.rmtree(root, ignore_errors=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines(result)))
    _say(f"kept in {given.out}")
    return result


def lines(result: dict[str, Any]) -> list[str]:
    """The result as a few readable lines."""
    add = result["add"]
    speed, relative = add["tokens_per_second"]["median"], add["over_plain_forward"]["median"]
    told = [
        f"add: {speed:,.0f} tokens/s, {relative:.2f} of the backbone's plain forward",
        f"  last quarter over first: {add['last_over_first']:.2f}",
    ]
    for size, one in result["sizes"].items():
        opened, searched = (one[f"resident_bytes_{when}"] / 2**20 for when in ("open", "searched"))
        told += [
            f"{int(size):,} tokens: open {one['open_seconds']['median'] * 1e3:.0f} ms",
            f"  first search {one['first_search_seconds']:.2f} s",
            f"  {one['bytes_per_token']:.0f} bytes a token, {one['bytes_over_theory']:.3f} of its keys and values",
            f"  memory of the process: +{opened:.0f} MiB open, +{searched:.0f} MiB when it has searched",
        ]
        for what in ("segment", "token"):
            seconds = one[what]["seconds"]["total"]["median"]
            product, reading = (one[what][over]["median"] for over in ("over_matmul", "over_reading_keys"))
            told.append(
                f"  search of one {what}: {seconds * 1e3:.1f} ms, {product:.2f} of the bare product, "
                f"{reading:.2f} of reading the keys once"
            )
        ratios = result["decode"][size]["speed_over_smallest"]
        told.append(
            f"  decoding speed over that of the smallest store: {ratios['median']:.2f} "
            f"({ratios['min']:.2f} to {ratios['max']:.2f})"
        )
    return told


def _model(heads: int) -> LongMem:
    width = heads * HEAD_DIM
    config = AlibiGPTConfig(
        vocab_size=4096,
        hidden_size=width,
        num_hidden_layers=8,
        num_attention_heads=heads,
        max_position_embeddings=SEGMENT,
    )
    return LongMem.from_backbone(AlibiGPTForCausalLM(config), num_retrieved=NUM_CHUNKS * 4, chunk_size=4).eval()


def _texts(tokens: int, seed: int) -> Iterator[NewDocument]:
    draw = torch.Generator().manual_seed(seed)
    for number, start in enumerate(range(0, tokens, DOCUMENT)):
        ids = torch.randint(4, 4096, (min(DOCUMENT, tokens - start),), generator=draw)
        yield NewDocument(f"text-{number}", None, ids)


def _fill(model: LongMem, path: Path, tokens: int, seed: int) -> Path:
    with MemoryStore.open(path, model=Drawn(model, seed)) as store:
        for _ in store.add_documents("bench", _texts(tokens, seed)):
            pass
    return path


@torch.inference_mode()
def _adding(model: LongMem, path: Path, tokens: int, seed: int) -> dict[str, Any]:
    """Tokens a second into a store, document by document, between plain forwards over as many tokens."""
    _say(f"adding {tokens:,} tokens with a real backbone ...")
    added, plain = [], []
    backbone = model.backbone.model
    with MemoryStore.open(path, model=model) as store:
        for new in _texts(tokens, seed):
            assert isinstance(new.ids, Tensor)
            start = time.perf_counter()
            list(store.add_documents("bench", [new]))
            added.append(len(new.ids) / (time.perf_counter() - start))
            start = time.perf_counter()
            for batch in new.ids[: len(new.ids) // SEGMENT * SEGMENT].view(-1, SEGMENT).split(2):
                backbone(batch, use_cache=False)
            plain.append(len(new.ids) / (time.perf_counter() - start))
    quarter = max(1, len(added) // 4)
    relative = [one / other for one, other in zip(added, plain, strict=True)]
    return {
        "tokens": tokens,
        "tokens_per_second": spread(added),
        "over_plain_forward": spread(relative),
        # against the forward beside it: a machine that slows down meanwhile slows both
        "last_over_first": (sum(relative[-quarter:]) / quarter) / (sum(relative[:quarter]) / quarter),
    }


@torch.inference_mode()
def _size(model: LongMem, path: Path, tokens: int, repeats: int) -> dict[str, Any]:
    before = _resident()

    def opened() -> None:
        with MemoryStore.open(path, model=model, mode="read") as store:
            store.bank("bench")

    opening = [each["total"] for each in interleaved({"open": opened}, repeats)["open"]]
    disk = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    theory = 2 * 2 * model.memory_heads * model.memory_head_dim
    with MemoryStore.open(path, model=model, mode="read") as store:
        bank = store.bank("bench")
        after_open = _resident()
        queries = {
            "segment": torch.randn(1, model.num_heads, SEGMENT, model.memory_head_dim),
            "token": torch.randn(1, model.num_heads, 1, model.memory_head_dim),
        }
        start = time.perf_counter()
        bank.search(queries["token"], NUM_CHUNKS)
        first = time.perf_counter() - start
        searched = _resident()
        keys = torch.randn(model.memory_heads, tokens // model.config.chunk_size, model.memory_head_dim)
        found = {}
        for what, asked in queries.items():
            taken = interleaved(
                {
                    "search": lambda asked=asked: bank.search(asked, NUM_CHUNKS).scores,
                    "matmul": lambda asked=asked: torch.matmul(asked[0], keys.transpose(1, 2)),
                    "reading": lambda: keys.sum(),
                },
                repeats,
            )
            found[what] = {
                "seconds": summary(taken["search"]),
                "over_matmul": ratio(taken["search"], taken["matmul"]),
                "over_reading_keys": ratio(taken["search"], taken["reading"]),
            }
    return {
        "tokens": tokens,
        "open_seconds": spread(opening),
        "first_search_seconds": first,
        "resident_bytes_open": after_open - before,
        "resident_bytes_searched": searched - before,
        "bytes_per_token": disk / tokens,
        "bytes_over_theory": disk / tokens / theory,
        **found,
    }


def _decode(model: LongMem, bank: Any) -> Any:
    """One decoding step behind a cached prompt."""
    prompt = torch.randint(4, 4096, (1, 128))
    token = torch.randint(4, 4096, (1, 1))

    @torch.inference_mode()
    def run() -> None:
        # the cache grows by a token a round; over a few rounds that is nothing
        model(token, past_key_values=cache, use_cache=True, memory=bank)

    with torch.inference_mode():
        cache = model(prompt, use_cache=True, memory=bank).past_key_values
    return run


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as numbers:
        return int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
