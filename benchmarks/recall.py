"""Recall and speed of the indexes on a trained pair's own keys and queries; writes results/recall.json.

Times are seconds of the processor. The JSON is kept after every part, what matters most first.

Usage: python -m benchmarks.recall --model models/small/sidenet --data books=DATA/books/test.tar.xz
           --keys FOLDER [--tokens 65536,262144,1048576] [--indexes two_stage,faiss] [--out results/recall.json]

FOLDER takes the encoded keys (250 MB for a million tokens of the small pair): the second run does not encode again.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import candidates
from benchmarks.busy import by_processor
from benchmarks.measure import interleaved, ratio, spread, summary, surroundings
from benchmarks.real_keys import collect, held_back
from longmem.evaluation.results import write_json
from longmem.memory import ExactIndex, MemoryBank
from longmem.memory.blocks import Blocks
from longmem.memory.partial import PartialIndex
from longmem.memory.recall import measure_recall
from longmem.types import AttentionKV

PARTS = ("recall", "decoding", "candidates", "at_once")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure everything, print it, keep the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint of a LongMem")
    parser.add_argument("--data", action="append", required=True, metavar="NAME=FILE[,FILE...]", help="texts")
    parser.add_argument("--keys", type=Path, required=True, help="folder for the encoded keys")
    parser.add_argument("--tokens", default="65536,262144,1048576", help="sizes of memory")
    parser.add_argument("--indexes", default="two_stage,faiss")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure; default: all")
    parser.add_argument("--candidates", type=int, default=262144, help="size at which all ways are compared")
    parser.add_argument("--queries", type=int, default=256, help="tokens asked at each size")
    parser.add_argument("--repeats", type=int, default=9, help="rounds of the timings")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/recall.json"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    sizes = [int(each) for each in given.tokens.split(",")]
    names = given.indexes.split(",")
    if "faiss" in names:
        import faiss

        faiss.omp_set_num_threads(given.threads)
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.recall", *(sys.argv[1:] if arguments is None else arguments)]),
        "surroundings": surroundings(torch.device("cpu")),
        "times": "seconds of the processor, one thread" if given.threads == 1 else "processor seconds of all threads",
        "texts": {},
    }

    def keep() -> None:  # after every part: what was measured stays if the rest is interrupted
        write_json(given.out, result)

    records: dict[str, dict[str, Any]] = {}
    for named in given.data:
        name, _, files = named.partition("=")
        record = records[name] = collect(given.model, files.split(","), max(sizes), given.keys / f"{name}.pt")
        kept = ("fingerprint", "tokens", "chunk_size", "documents")
        result["texts"][name] = {field: record[field] for field in kept}
        result["texts"][name]["sizes"] = [{"tokens": size} for size in sizes]
    first = next(iter(records.values()))
    for index in names if "recall" in given.parts else []:
        for name, record in records.items():
            for found in result["texts"][name]["sizes"]:
                found[index] = at_size(record, found["tokens"], index, given.queries)
                keep()
    if "decoding" in given.parts:
        prompt = held_back(given.model, given.data[0].partition("=")[2].split(","), tokens=96)
        result["decoding"] = decoding(given.model, first, prompt, (min(sizes), max(sizes)), names, given.repeats)
        keep()
    if "candidates" in given.parts:
        for name, record in records.items():
            result["texts"][name]["candidates"] = compared(record, given.candidates)
            keep()
    if "at_once" in given.parts:
        result["queries_at_once"] = [at_once(first, size, given.repeats) for size in sizes]
        keep()
    return result


def of_size(record: dict[str, Any], tokens: int) -> tuple[Tensor, Tensor]:
    """Keys (Hkv, n, D) of the first ``tokens`` tokens, queries (H, Q, D) of the segments held back among them."""
    chunks = tokens // record["chunk_size"]
    among = record["before"] <= chunks
    return record["keys"][:, :chunks], record["queries"][among].transpose(0, 1).flatten(1, 2)


def at_size(record: dict[str, Any], tokens: int, index: str, queries: int) -> dict[str, Any]:
    """Recall of an index; printed as it comes."""
    keys, asked = of_size(record, tokens)
    report = measure_recall(index, keys, asked, tokens=queries, clock=time.process_time)
    _say(
        f"{tokens} tokens, {index}: recall {report.recall:.3f} (worst head {min(report.recall_by_head):.3f}, "
        f"worst eighth of the text {min(report.recall_along):.3f}), "
        f"attention kept {report.attention_kept:.3f}, keys read {report.keys_read:.3f}, "
        f"{report.milliseconds:.2f} ms a token, exact {report.exact_milliseconds:.2f}; "
        f"built in {report.build_seconds:.1f} s, {report.state_bytes / 2**20:.0f} MiB"
    )
    return {**asdict(report), "exact_over_index": report.exact_milliseconds / report.milliseconds}


def compared(record: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Every way that was considered, at one size."""
    keys, asked = of_size(record, tokens)
    half = asked.shape[1] // 2
    picked = torch.arange(128) * (asked.shape[1] - half) // 128 + half
    ways = candidates.compare(keys, asked[:, half - 256 : half], asked[:, picked])
    for each in ways:
        _say(f"{tokens} tokens, {each['way']}, {each['variant']}: {each['key_bytes_read']:.3f} of the key bytes")
    return {"tokens": tokens, "queries": len(picked), "ways": ways}


def at_once(record: dict[str, Any], tokens: int, repeats: int) -> dict[str, Any]:
    """Search of several queries together, in part and exactly: from where on exact search is the faster one."""
    keys, asked = of_size(record, tokens)
    keys = keys[None]
    exact, part = ExactIndex(), PartialIndex(Blocks, least=1, few=1 << 30)
    chunks = keys.shape[2]
    part.search(asked[None, :, :256], keys, [0], [chunks], 16)
    found: dict[str, Any] = {"tokens": tokens}
    for count in (1, 4, 8, 16, 64, 256):
        queries = asked[None, :, 256 : 256 + count]
        runs = {
            "exact": lambda queries=queries: exact.search(queries, keys, [0], [chunks], 16) and None,
            "two_stage": lambda queries=queries: part.search(queries, keys, [0], [chunks], 16) and None,
        }
        taken = by_processor(runs, max(3, repeats // (1 + count // 16)))
        found[str(count)] = {name: summary(rounds)["total"] for name, rounds in taken.items()}
        found[str(count)]["exact_over_two_stage"] = ratio(taken["exact"], taken["two_stage"])
        _say(f"{tokens} tokens, {count} queries: exact over two_stage {found[str(count)]['exact_over_two_stage']}")
    return found


def decoding(
    path: str, record: dict[str, Any], prompt: Tensor, sizes: tuple[int, int], names: list[str], repeats: int
) -> dict[str, Any]:
    """Tokens a second with a small and a large memory, one token at a time with a cache, in turn."""
    from longmem import LongMem

    model: Any = LongMem.from_pretrained(path)
    banks: dict[str, MemoryBank | None] = {"no memory": None}
    for tokens in sizes:
        for index in ["exact", *names]:
            banks[f"{index}, {tokens}"] = filled(model, record, tokens, index)
    runs = {name: (lambda bank=bank: _decode(model, prompt, bank)) for name, bank in banks.items()}
    taken = interleaved(runs, repeats)
    small, large = sizes
    indexes = ["exact", *names]
    found: dict[str, Any] = {"sizes": sizes, "prompt": prompt.shape[1], "rounds": repeats}
    for clock, ending in (("processor", ""), ("wall", "_by_wall_clock")):
        times = {name: [one[clock] for one in rounds] for name, rounds in taken.items()}
        fastest = [min(times[f"{index}, {small}"][turn] for index in indexes) for turn in range(repeats)]
        found["seconds_per_token" + ending] = {name: spread(values) for name, values in times.items()}
        found["speed_against_fastest_of_the_small_memory" + ending] = {
            index: spread([one / other for one, other in zip(fastest, times[f"{index}, {large}"], strict=True)])
            for index in indexes
        }
    for name, values in found["seconds_per_token"].items():
        _say(f"decoding, {name}: {1000 * values['median']:.2f} ms a token")
    for name, values in found["speed_against_fastest_of_the_small_memory"].items():
        _say(f"decoding speed at {large} tokens by {name}, of that at {small}: {values['median']:.2f}")
    return found


def filled(model: Any, record: dict[str, Any], tokens: int, index: str) -> MemoryBank:
    """A bank with these chunk keys. Each token is given its chunk's mean, so that the mean is the real one."""
    size = record["chunk_size"]
    bank = MemoryBank.for_model(model, 1, tokens, dtype=torch.float16, index=index)
    for part in record["keys"][:, : tokens // size].split(8192, dim=1):
        each = part.repeat_interleave(size, dim=1)[None]
        bank.add(AttentionKV(each, each))
    return bank


@torch.no_grad()
def _decode(model: Any, prompt: Tensor, bank: MemoryBank | None, steps: int = 34) -> dict[str, float]:
    """Mean seconds of a token behind a prompt (1, T): of the processor, and by the clock on the wall.

    The mean, not the median: what a probe costs one token in 8 is part of the price.
    """
    out = model(prompt, memory=bank, use_cache=True)
    for step in range(steps):
        if step == 2:
            began, clock = time.process_time(), time.perf_counter()
        ids = out.logits[:, -1:].argmax(-1)
        out = model(ids, memory=bank, use_cache=True, past_key_values=out.past_key_values)
    return {
        "processor": (time.process_time() - began) / (steps - 2),
        "wall": (time.perf_counter() - clock) / (steps - 2),
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
