"""Speed and size of a store as it grows, as ratios taken in one process.

Usage: python -m benchmarks.store [--heads 4,16] [--sizes 65536,262144,1048576] [--large 10485760] [--quick]

For every number of heads a store of every size is filled with keys and values drawn at random (what they are does not
matter to exact search and to bytes), and measured: opening, memory of the process, search for a segment and for one
token against the bare matrix product and against reading the chunk keys once, decoding. Adding is measured with a real
backbone against its plain forward, into an empty store and into the largest one, by the clock and by the processor;
search and decoding by the processor alone, in which others' work on the machine is not counted. One more store has
few heads and many tokens. The JSON is kept after every step.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.busy import by_processor
from benchmarks.measure import interleaved, ratio, spread, summary, surroundings
from longmem import AlibiGPTConfig, AlibiGPTForCausalLM, LongMem, MemoryStore
from longmem.evaluation.results import write_json
from longmem.store import NewDocument
from longmem.store.encode import CPU_BATCH_TOKENS
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
    parser.add_argument("--heads", default="4,16", help=f"key/value heads of {HEAD_DIM}, one model for each number")
    parser.add_argument("--large", type=int, default=10_485_760, help="tokens of one more store; 0: none")
    parser.add_argument("--large-heads", type=int, default=1)
    parser.add_argument("--large-dtype", default="int8")
    parser.add_argument("--add-tokens", type=int, default=49_152, help="tokens that a real backbone encodes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the stores are made (default: a temporary folder)")
    parser.add_argument("--quick", action="store_true", help="small stores, two rounds: is the bench itself alive?")
    parser.add_argument("--out", type=Path, default=Path("results/store.json"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    if given.quick:
        given.sizes, given.heads, given.large, given.add_tokens, given.repeats = "2048,4096", "2", 8192, 2048, 2
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.store", *(sys.argv[1:] if arguments is None else arguments)]),
        "seed": given.seed,
        "rounds": given.repeats,
        "head_dim": HEAD_DIM,
        "surroundings": surroundings(torch.device("cpu")),
        "models": [],
    }
    plan = [(int(heads), "float16", [int(size) for size in given.sizes.split(",")]) for heads in given.heads.split(",")]
    if given.large:
        plan.append((given.large_heads, given.large_dtype, [given.large]))
    for heads, dtype, sizes in plan:
        root = Path(tempfile.mkdtemp(dir=given.folder))
        try:
            for found in _model_at(heads, dtype, sizes, given, root):
                result["models"] = [each for each in result["models"] if each is not found] + [found]
                write_json(given.out, result)
        finally:
            shutil.rmtree(root, ignore_errors=True)
    print("\n".join(lines(result)))
    _say(f"kept in {given.out}")
    return result


def _model_at(
    heads: int, dtype: str, sizes: list[int], given: argparse.Namespace, root: Path
) -> Iterator[dict[str, Any]]:
    """One record, given out again whenever there is more in it."""
    torch.manual_seed(given.seed)
    model = _model(heads)
    found: dict[str, Any] = {
        "heads": heads,
        "dtype": dtype,
        "chunk_size": model.config.chunk_size,
        "layers": model.config.backbone_config.num_hidden_layers,
        "memory_layer": model.memory_layer,
        "sizes": {},
        "decode": {},
    }
    stores = {}
    for size in sizes:
        _say(f"{heads} heads, a store of {size:,} tokens ...")
        stores[size] = root / str(size)
        _fill(model, stores[size], size, given.seed, dtype)
        found["sizes"][str(size)] = _size(model, stores[size], size, dtype, given.repeats)
        yield found
    if len(sizes) < 2:
        return
    banks = [(size, MemoryStore.open(path, model=model, mode="read")) for size, path in stores.items()]
    taken = by_processor({str(size): _decode(model, store.bank("bench")) for size, store in banks}, 4 * given.repeats)
    for name, rounds in taken.items():
        found["decode"][name] = {
            "seconds": summary(rounds)["total"],
            "speed_over_smallest": ratio(taken[str(sizes[0])], rounds),
        }
    for _, store in banks:
        store.close()
    yield found
    if heads != int(given.heads.split(",")[0]):
        return  # one model says how fast adding is
    found["add"] = _adding(model, {"empty": root / "add", str(sizes[-1]): stores[sizes[-1]]}, given)
    yield found


def lines(result: dict[str, Any]) -> list[str]:
    """The result as a few readable lines."""
    return [line for model in result["models"] for line in _lines(model)]


def _lines(model: dict[str, Any]) -> Iterator[str]:
    yield f"{model['heads']} heads of {HEAD_DIM}, {model['dtype']}"
    for where, add in model.get("add", {}).get("into", {}).items():
        speed, relative = add["tokens_per_second"]["median"], add["over_plain_forward"]["median"]
        yield f"  add to a store of {where} tokens: {speed:,.0f} tokens/s, {relative:.2f} of the plain forward"
    for size, one in model["sizes"].items():
        opened, searched = (one[f"resident_bytes_{when}"] / 2**20 for when in ("open", "searched"))
        yield f"  {int(size):,} tokens: open {one['open_seconds']['median'] * 1e3:.0f} ms"
        yield f"    first search {one['first_search_seconds']:.2f} s"
        yield f"    {one['bytes_per_token']:.0f} bytes a token, {one['bytes_over_theory']:.3f} of theory"
        yield f"    memory of the process: +{opened:.0f} MiB open, +{searched:.0f} MiB when it has searched"
        for what in ("segment", "token"):
            seconds = one[what]["seconds"]["median"]
            product, reading = (one[what][over]["median"] for over in ("over_matmul", "over_reading_keys"))
            yield (
                f"    search of one {what}: {seconds * 1e3:.1f} ms, {product:.2f} of the bare product, "
                f"{reading:.2f} of reading the keys once"
            )
        if size in model["decode"]:
            ratios = model["decode"][size]["speed_over_smallest"]
            yield (
                f"    decoding speed over that of the smallest store: {ratios['median']:.2f} "
                f"({ratios['min']:.2f} to {ratios['max']:.2f})"
            )


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


def _texts(tokens: int, seed: int, document: int = DOCUMENT) -> Iterator[NewDocument]:
    draw = torch.Generator().manual_seed(seed)
    for number, start in enumerate(range(0, tokens, document)):
        ids = torch.randint(4, 4096, (min(document, tokens - start),), generator=draw)
        yield NewDocument(f"text-{seed}-{number}", None, ids)


def _fill(model: LongMem, path: Path, tokens: int, seed: int, dtype: Any) -> None:
    with MemoryStore.open(path, model=Drawn(model, seed), dtype=dtype) as store:
        for _ in store.add_documents("bench", _texts(tokens, seed)):
            pass


@torch.inference_mode()
def _adding(model: LongMem, paths: dict[str, Path], given: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second into stores, document by document, in turn with plain forwards over as many tokens."""
    _say(f"adding {given.add_tokens:,} tokens with a real backbone ...")
    backbone = model.backbone.model
    document = min(DOCUMENT // 2, given.add_tokens // 4)
    stores = {name: MemoryStore.open(path, model=model) for name, path in paths.items()}
    taken: dict[str, list[float]] = {name: [] for name in (*paths, "plain")}
    worked: dict[str, list[float]] = {name: [] for name in taken}
    for turn, new in enumerate(_texts(given.add_tokens + document, given.seed + 1, document)):
        ids = cast(Tensor, new.ids)

        def plain(ids: Tensor = ids) -> None:
            for batch in ids[: len(ids) // SEGMENT * SEGMENT].view(-1, SEGMENT).split(CPU_BATCH_TOKENS // SEGMENT):
                backbone(batch, use_cache=False)

        def add(store: MemoryStore, new: NewDocument = new) -> None:
            list(store.add_documents("bench", [new]))

        runs = {name: partial(add, store) for name, store in stores.items()} | {"plain": plain}
        for name, run in runs.items():
            start, busy = time.perf_counter(), time.process_time()
            run()
            if turn:  # the first one warms up
                taken[name].append(len(ids) / (time.perf_counter() - start))
                worked[name].append(len(ids) / (time.process_time() - busy))
    for store in stores.values():
        store.close()
    into = {
        name: {
            "tokens_per_second": spread(taken[name]),
            "over_plain_forward": spread(_over(taken[name], taken["plain"])),
            "over_plain_forward_processor": spread(_over(worked[name], worked["plain"])),
        }
        for name in paths
    }
    empty, full = paths
    return {
        "tokens": given.add_tokens,
        "plain_tokens_per_second": spread(taken["plain"]),
        "into": into,
        "full_over_empty": spread(_over(taken[full], taken[empty])),
        "full_over_empty_processor": spread(_over(worked[full], worked[empty])),
    }


def _over(above: list[float], below: list[float]) -> list[float]:
    """Round by round: a machine that slows down meanwhile slows what ran beside it too."""
    return [one / other for one, other in zip(above, below, strict=True)]


@torch.inference_mode()
def _size(model: LongMem, path: Path, tokens: int, dtype: str, repeats: int) -> dict[str, Any]:
    before = _resident()

    def opened() -> None:
        with MemoryStore.open(path, model=model, mode="read") as store:
            store.bank("bench")

    opening = [each["total"] for each in interleaved({"open": opened}, repeats)["open"]]
    disk = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    theory = 2 * model.memory_heads * model.memory_head_dim * (1 if dtype == "int8" else 2)
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
            taken = by_processor(
                {
                    "search": lambda asked=asked: bank.search(asked, NUM_CHUNKS),
                    "matmul": _product(asked[0], keys),
                    "reading": lambda: keys.sum(),
                },
                repeats,
            )
            found[what] = {
                "seconds": summary(taken["search"])["total"],
                "matmul_seconds": summary(taken["matmul"])["total"],
                "reading_seconds": summary(taken["reading"])["total"],
                "over_matmul": ratio(taken["search"], taken["matmul"]),
                "over_reading_keys": ratio(taken["search"], taken["reading"]),
            }
    return {
        "tokens": tokens,
        "open_seconds": spread(opening),
        "first_search_seconds": first,
        "resident_bytes_open": after_open - before,
        "resident_bytes_searched": searched - before,
        "chunk_key_bytes": keys.numel() * keys.element_size(),
        "bytes_per_token": disk / tokens,
        "bytes_over_theory": disk / tokens / theory,
        **found,
    }


def _product(queries: Tensor, keys: Tensor) -> Callable[[], None]:
    """All scores of queries (H, T, D) over keys (H, n, D), a block of them at a time, none looked at."""
    width = max(1, (1 << 24) // queries.shape[1])
    scores = torch.empty(queries.shape[1] * min(width, keys.shape[1]))

    def run() -> None:
        for own, theirs in zip(queries, keys, strict=True):
            for part in theirs.split(width):
                torch.mm(own, part.T, out=scores[: len(own) * len(part)].view(len(own), len(part)))

    return run


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
