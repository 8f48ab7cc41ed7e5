"""``make bench``: speed and memory of retrieval and of an adaptation step, as ratios taken in one process.

Usage: python -m benchmarks.bench [--device cuda] [--threads N] [--repeats N] [--quick] [--out results/bench.json]

An adaptation step with a full memory is compared with the same step without, and with the released code's way. A step
is forward, backward and the writing of memory; the optimiser, the same for all, is left out. Retrieval and memory
attention, forward and backward, are compared with the materialised way, the formula as one writes it first: all scores
(tokens x chunks), a top-k over them, and a copy of the K keys and values of every token and head.

B rows · H heads · T tokens · N chunks · S tokens per chunk · D head_dim · R retrieved chunks
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import interleaved, made_by, peak_bytes, ratio, spread, summary
from benchmarks.released import ReleasedMemory, ReleasedStep
from longmem import AlibiGPTConfig, AlibiGPTForCausalLM, LongMem, MemoryBank
from longmem.evaluation.results import write_json
from longmem.modeling.attention import memory_attention
from longmem.types import AttentionKV, RetrievedMemory

SHAPE = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 8192}
QUICK = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 256}
NUM_CHUNKS = 16


def filled_bank(
    tokens: int, rows: int, heads: int, head_dim: int, chunk_size: int = 4, device: str = "cpu", seed: int = 0
) -> MemoryBank:
    """A bank of random keys and values, full but for the first chunk, in pieces of 4,096 tokens."""
    bank = MemoryBank(rows, max(tokens, chunk_size), heads, head_dim, chunk_size, device=device)
    draw = torch.Generator().manual_seed(seed)
    for first in range(0, tokens, 4096):
        shape = (rows, heads, min(4096, tokens - first), head_dim)
        keys, values = (torch.randn(shape, generator=draw).to(device) for _ in range(2))
        bank.add(AttentionKV(keys, values))
    return bank


# a step


def make_model(shape: dict[str, int], memory_layer: int | None = None, seed: int = 0) -> LongMem:
    """A random LongMem with the released settings."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"side_activation": "gelu", "side_norm_eps": 1e-5, "final_state": "normed"}
    backbone: Any = AlibiGPTForCausalLM(AlibiGPTConfig(**shape))
    return LongMem.from_backbone(backbone, memory_layer=memory_layer, **settings).train()


class Watched:
    """A bank that notes how long its searches take."""

    def __init__(self, bank: MemoryBank) -> None:
        self.bank, self.chunk_size, self.seconds = bank, bank.chunk_size, 0.0

    def search(self, queries: Tensor, num_chunks: int, rows: Tensor | None = None) -> RetrievedMemory:
        start = time.perf_counter()
        found = self.bank.search(queries, num_chunks, rows)
        if queries.is_cuda:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - start
        return found


def step(model: LongMem, ids: Tensor, bank: MemoryBank | None, write: bool = True) -> dict[str, float]:
    """One of our steps; returns the seconds of its search and of its writing."""
    model.zero_grad(set_to_none=True)
    memory = None if bank is None else Watched(bank)
    out = model(input_ids=ids, labels=ids, memory=memory, use_cache=False)
    out.loss.backward()
    start = time.perf_counter()
    if bank is not None and write:
        bank.add(out.kv)
    return {"search": memory.seconds if memory else 0.0, "add": time.perf_counter() - start}


def released_step(model: LongMem, ids: Tensor, memory: ReleasedMemory) -> dict[str, float]:
    """One step the released code's way."""
    model.zero_grad(set_to_none=True)
    return ReleasedStep(model, memory)(ids, ids)


def prefilled(tokens: int, heads: int, head_dim: int, added: int, seed: int, chunk_size: int = 4) -> ReleasedMemory:
    """A released memory filled up to where it starts to evict."""
    memory = ReleasedMemory(tokens, heads, head_dim, chunk_size)
    draw = torch.Generator().manual_seed(seed)
    while memory.fill + added // chunk_size < memory.slots:
        memory.add(*(torch.randn(1, added, heads, head_dim, generator=draw) for _ in range(2)))
    return memory


def steps(
    sizes: Sequence[int], rows: int, segment: int, shape: dict[str, int], repeats: int, device: str, seed: int
) -> dict[str, Any]:
    """Seconds, ratios and peak bytes.

    Every row has a memory of its own with us; the released code has one for all rows. So each query searches equally
    many tokens, while our banks hold ``rows`` times as many in all.
    """
    model = make_model(shape, seed=seed).to(device)
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, shape["vocab_size"], (rows, segment), generator=draw).to(device)
    heads, dim = model.memory_heads, model.memory_head_dim
    banks = {tokens: filled_bank(tokens, rows, heads, dim, device=device, seed=seed) for tokens in sizes}
    empty = filled_bank(0, rows, heads, dim, device=device)
    runs: dict[str, Any] = {
        "without_memory": lambda: step(model, ids, None),
        "empty_bank": lambda: step(model, ids, empty, write=False),
    }
    for tokens, bank in banks.items():
        runs[f"memory_{tokens}"] = lambda bank=bank: step(model, ids, bank)
        if device == "cpu":
            theirs = prefilled(tokens, heads, dim, rows * segment, seed)
            runs[f"released_{tokens}"] = lambda theirs=theirs: released_step(model, ids, theirs)
    taken = interleaved(runs, repeats, warmup=2)
    peaks = {0: peak_bytes(lambda: step(model, ids, None))}
    peaks |= {tokens: peak_bytes(lambda bank=bank: step(model, ids, bank)) for tokens, bank in banks.items()}
    ours = {tokens: taken[f"memory_{tokens}"] for tokens in sizes}
    return {
        "shape": {**shape, "rows": rows, "segment": segment, "memory_layer": model.memory_layer},
        "seconds": {name: summary(rounds) for name, rounds in taken.items()},
        "step_over_step_without_memory": {n: ratio(mine, taken["without_memory"]) for n, mine in ours.items()},
        "search_share_of_step": {n: spread([each["search"] / each["total"] for each in ours[n]]) for n in sizes},
        "throughput_over_empty_bank": {n: ratio(taken["empty_bank"], mine) for n, mine in ours.items()},
        "released_over_ours": {
            n: ratio(taken[f"released_{n}"], mine) for n, mine in ours.items() if f"released_{n}" in taken
        },
        "peak_bytes_of_step_beyond_bank": peaks,
        "bank_bytes": {tokens: bank.nbytes for tokens, bank in banks.items()},
    }


# retrieval


def blockwise(bank: MemoryBank, queries: Tensor, num_chunks: int) -> Tensor:
    """The bank's way; returns the queries' gradient."""
    asked = queries.detach().requires_grad_()
    retrieved = bank.search(asked, num_chunks)
    memory_attention(asked, retrieved, scaling=queries.shape[-1] ** -0.5).out.backward(queries)
    assert asked.grad is not None
    return asked.grad


def materialised(bank: MemoryBank, queries: Tensor, num_chunks: int) -> Tensor:
    """The formula as one writes it first; returns the queries' gradient."""
    asked = queries.detach().requires_grad_()
    store = bank.search(queries[:, :, :1], 1).storage[:, :-1]
    keys, values = (store[:, :, :, which].transpose(1, 2) for which in (0, 1))  # (B, H, N, S, D)
    with torch.no_grad():
        scores = torch.einsum("bhtd,bhnd->bhtn", asked, keys.mean(3))
        ids = scores.topk(num_chunks, dim=-1).indices
    row = torch.arange(keys.shape[0], device=keys.device).view(-1, 1, 1, 1)
    head = torch.arange(keys.shape[1], device=keys.device).view(1, -1, 1, 1)
    found_keys, found_values = (part[row, head, ids].flatten(3, 4) for part in (keys, values))
    weights = (torch.einsum("bhtd,bhtkd->bhtk", asked, found_keys) * queries.shape[-1] ** -0.5).softmax(-1)
    torch.einsum("bhtk,bhtkd->bhtd", weights, found_values).backward(queries)
    assert asked.grad is not None
    return asked.grad


def retrieval(
    sizes: Sequence[int], rows: int, segment: int, repeats: int, device: str, seed: int
) -> list[dict[str, Any]]:
    """One record per memory size: seconds and peak bytes of both ways, and their ratios."""
    records = []
    for tokens in sizes:
        bank = filled_bank(tokens, rows, 8, 32, device=device, seed=seed)
        queries = torch.randn(rows, 8, segment, 32, generator=torch.Generator().manual_seed(seed + 1)).to(device)
        ways = {
            "blockwise": lambda bank=bank, queries=queries: blockwise(bank, queries, NUM_CHUNKS),
            "materialised": lambda bank=bank, queries=queries: materialised(bank, queries, NUM_CHUNKS),
        }
        torch.testing.assert_close(ways["blockwise"](), ways["materialised"](), atol=1e-4, rtol=1e-3)
        taken = interleaved(ways, repeats)
        peaks = {name: peak_bytes(way) for name, way in ways.items()}
        records.append(
            {
                "memory_tokens": tokens,
                "bank_bytes": bank.nbytes,
                "seconds": {name: summary(rounds)["total"] for name, rounds in taken.items()},
                "peak_bytes": peaks,
                "materialised_over_blockwise": {
                    "seconds": ratio(taken["materialised"], taken["blockwise"]),
                    "peak_bytes": peaks["materialised"] / peaks["blockwise"],
                },
            }
        )
    return records


def lines(result: dict[str, Any]) -> list[str]:
    """The result as a few readable lines."""
    found, told = result["step"], []
    for name, parts in found["seconds"].items():
        inside = ", ".join(f"{part} {value['median']:.3f}" for part, value in parts.items() if part != "total")
        total = parts["total"]
        told.append(f"{name:<18} {total['median']:.3f} s a step ({total['min']:.3f} to {total['max']:.3f}); {inside}")
    ratios = ("step_over_step_without_memory", "search_share_of_step", "throughput_over_empty_bank")
    for name in (*ratios, "released_over_ours"):
        for tokens, value in found[name].items():
            told.append(f"{name} at {tokens} tokens: {value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})")
    for tokens, peak in found["peak_bytes_of_step_beyond_bank"].items():
        told.append(f"peak of a step beyond a bank of {tokens} tokens: {peak / 2**20:.1f} MiB")
    for record in result["retrieval"]:
        saved = record["materialised_over_blockwise"]
        told.append(
            f"retrieval + memory attention at {record['memory_tokens']} tokens, materialised over blockwise: "
            f"time {saved['seconds']['median']:.2f}, peak memory {saved['peak_bytes']:.1f}"
        )
    return told


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
    sizes, rows, segment = ((1024, 2048), 2, 64) if given.quick else ((16384, 65536), 4, 256)
    repeats = 2 if given.quick else given.repeats
    common: dict[str, Any] = {"repeats": repeats, "device": given.device, "seed": given.seed}
    print(f"a step and retrieval at {sizes} tokens of memory, {repeats} rounds ...", file=sys.stderr, flush=True)
    result = made_by("bench", arguments, given.device) | {
        "seed": given.seed,
        "rounds": repeats,
        "step": steps(sizes, rows, segment, QUICK if given.quick else SHAPE, **common),
        "retrieval": retrieval(sizes, rows, segment, **common),
    }
    write_json(given.out, result)
    print("\n".join(lines(result)))
    return result


if __name__ == "__main__":
    main()
