"""Generating and reading with memory, against an empty bank and against the same backbone with full attention.

Usage: python -m benchmarks.decode [--device cuda] [--dtype bfloat16] [--threads N] [--repeats N] [--quick]
           [--only decoding] [--no-long-reading] [--out results/decode.json]

A random Llama decodes one token at a time, all ways in turn in one process. LongMem has the last tokens of its context
in the local window and all of it in a bank; the backbone alone has either that window and nothing else, or full
attention (SDPA) over a static key/value cache that holds the whole context. What is in banks and caches is random: how
long a step takes does not depend on it. Reading is done for real: LongMem's way into memory, the plain backbone's
window by window in batches of the same size, and the plain backbone's in one piece with full attention.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from benchmarks.measure import Run, interleaved, peak_bytes, ratio, spread, summary, surroundings
from benchmarks.retrieval import filled_bank
from longmem import LongMem
from longmem.evaluation.results import write_json
from longmem.generation import read
from longmem.generation.reading import TOKENS_AT_ONCE
from longmem.memory.session import SessionMemory
from longmem.types import Memory

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1 << 17,
}
QUICK = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}


def make_model(device: torch.device, dtype: torch.dtype, seed: int = 0, **shape: int) -> LongMem:
    """Random, with the paper's settings of memory."""
    torch.manual_seed(seed)
    backbone = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **shape}, pad_token_id=0, eos_token_id=None))
    return LongMem.from_backbone(backbone.to(device, dtype).eval()).eval()


class Decoder:
    """Decodes greedily from where it was prepared, and goes back there when it is done.

    Args:
        forward: a LongMem with its memory, or a backbone.
        cache: filled with what is attended to directly.
        back: puts the cache back.
        token: (1, 1), the first input.
        steps: tokens of a run.
    """

    def __init__(
        self, forward: Callable[..., Any], cache: Any, back: Callable[[], object], token: Tensor, steps: int
    ) -> None:
        self._forward, self.cache, self._back, self._token, self._steps = forward, cache, back, token, steps

    @torch.no_grad()
    def __call__(self) -> None:
        token = self._token
        for _ in range(self._steps):
            out = self._forward(input_ids=token, past_key_values=self.cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        self._back()

    @property
    def cache_bytes(self) -> int:
        """Of its keys and values."""
        return sum(each.nbytes for layer in self.cache.layers for each in (layer.keys, layer.values))


def windowed(model: LongMem, memory: Memory | None, local: Tensor, steps: int, *, alone: bool = False) -> Decoder:
    """With (1, t) local tokens read; ``alone``: the backbone without SideNet and memory."""
    cache = DynamicCache(config=model.backbone.model.config)

    def forward(**inputs: Any) -> Any:
        return model.backbone.model(**inputs) if alone else model(**inputs, memory=memory)

    with torch.no_grad():
        forward(input_ids=local, past_key_values=cache, use_cache=True)
    return Decoder(forward, cache, lambda: cache.crop(-steps), local[:, -1:], steps)


def full(model: LongMem, context: int, token: Tensor, steps: int) -> Decoder:
    """The backbone with full attention over a cache of ``context`` tokens."""
    backbone = model.backbone.model
    cache = StaticCache(config=backbone.config, max_cache_len=context + steps)
    with torch.no_grad():
        backbone(input_ids=token, past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()

    def back() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(context)  # type: ignore[union-attr]

    back()
    return Decoder(backbone, cache, back, token, steps)


def decoding(
    model: LongMem, contexts: tuple[int, ...], *, window: int, steps: int, repeats: int, seed: int
) -> dict[str, Any]:
    """Seconds and bytes per token of every way, and their ratios."""
    draw = torch.Generator().manual_seed(seed)
    vocabulary = int(model.backbone.model.config.vocab_size)
    local = torch.randint(0, vocabulary, (1, window), generator=draw).to(model.device)
    heads, dim = model.memory_heads, model.memory_head_dim
    place: dict[str, Any] = {"device": str(model.device), "dtype": model.dtype, "seed": seed}
    banks = {size: filled_bank(size, 1, heads, dim, **place) for size in (0, *contexts)}
    session = SessionMemory(banks[contexts[-1]], filled_bank(window, 1, heads, dim, **place))
    ways = {"backbone_window": windowed(model, None, local, steps, alone=True)}
    held = {"backbone_window": 0}
    for size, bank in banks.items():
        name = f"bank_{size}" if size else "empty_bank"
        ways[name], held[name] = windowed(model, bank, local, steps), bank.nbytes if size else 0
    name = f"session_over_{contexts[-1]}"
    ways[name], held[name] = windowed(model, session, local, steps), banks[contexts[-1]].nbytes + session.bank.nbytes
    for size in contexts:
        ways[f"full_{size}"], held[f"full_{size}"] = full(model, size, local[:, -1:], steps), 0
    taken = interleaved(ways, repeats)
    beyond = {name: peak_bytes(way) for name, way in ways.items()}
    empty = taken["empty_bank"]
    return {
        "window": window,
        "tokens_per_round": steps,
        "seconds_per_token": {
            name: {part: value / steps for part, value in summary(rounds)["total"].items()}
            for name, rounds in taken.items()
        },
        "speed_over_empty_bank": {name: ratio(empty, taken[name]) for name in taken if name.startswith(("ba", "se"))},
        "full_attention_over_longmem": {size: ratio(taken[f"full_{size}"], taken[f"bank_{size}"]) for size in contexts},
        "cache_bytes": {name: way.cache_bytes for name, way in ways.items()},
        "memory_bytes": held,
        "peak_bytes_of_step": beyond,
        "peak_bytes": {name: held[name] + way.cache_bytes + beyond[name] for name, way in ways.items()},
    }


def reading(
    model: LongMem, contexts: tuple[int, ...], *, segment: int, repeats: int, seed: int, long_reading: bool
) -> dict[str, Any]:
    """Seconds of reading the longest context, tokens a second of all ways, and peak bytes."""
    draw = torch.Generator().manual_seed(seed)
    vocabulary, longest, short = int(model.backbone.model.config.vocab_size), contexts[-1], contexts[0]
    ids = torch.randint(0, vocabulary, (longest,), generator=draw).to(model.device)

    def ours(size: int) -> Run:
        return lambda: read(
            model,
            SessionMemory.for_model(model, capacity_tokens=size),
            ids[:size],
            document="context",
            segment=segment,
        )

    @torch.no_grad()
    def by_windows(size: int) -> None:
        for part in ids[:size].view(-1, segment).split(max(1, TOKENS_AT_ONCE // segment)):
            model.backbone.model(input_ids=part, use_cache=False, logits_to_keep=1)

    @torch.no_grad()
    def at_once(size: int) -> None:
        model.backbone.model(input_ids=ids[None, :size], use_cache=True, logits_to_keep=1)

    taken = interleaved(
        {
            "longmem": lambda: ours(longest)() is None,
            "backbone_by_windows": lambda: by_windows(longest),
            f"full_{short}": lambda: at_once(short),
        },
        repeats,
        warmup=0,
    )
    peaks = {
        f"longmem_{short}": peak_bytes(ours(short), warm=False),
        f"backbone_by_windows_{short}": peak_bytes(lambda: by_windows(short), warm=False),
        f"full_{short}": peak_bytes(lambda: at_once(short), warm=False),
    }
    result = {
        "tokens": longest,
        "segment": segment,
        "seconds": {name: summary(rounds)["total"] for name, rounds in taken.items()},
        "tokens_per_second": {
            name: spread([(short if name.startswith("full") else longest) / one["total"] for one in rounds])
            for name, rounds in taken.items()
        },
        "speed_over_backbone_by_windows": ratio(taken["backbone_by_windows"], taken["longmem"]),
        "peak_bytes": peaks,
    }
    if long_reading:  # so long that it is done once
        start = time.perf_counter()
        peaks[f"full_{longest}"] = peak_bytes(lambda: at_once(longest), warm=False)
        seconds = time.perf_counter() - start
        result["seconds"][f"full_{longest}"] = spread([seconds])
        result["tokens_per_second"][f"full_{longest}"] = spread([longest / seconds])
    return result


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run everything, print the figures, keep the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of decoding; medians with min and max")
    parser.add_argument("--reading-repeats", type=int, default=2, help="rounds of reading")
    parser.add_argument("--no-long-reading", action="store_true", help="do not read 65k tokens with full attention")
    parser.add_argument("--only", choices=("decoding", "reading"), help="leave the other out; reading takes far longer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="small sizes, two rounds: is the bench itself alive?")
    parser.add_argument("--out", type=Path, default=Path("results/decode.json"))
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    shape = {**SHAPE, **(QUICK if given.quick else {})}
    contexts = (512, 1024) if given.quick else (16384, 65536)
    window, segment, steps = (32, 64, 2) if given.quick else (512, 1024, 16)
    model = make_model(torch.device(given.device), getattr(torch, given.dtype), given.seed, **shape)
    repeats = 2 if given.quick else given.repeats
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.decode", *(sys.argv[1:] if arguments is None else arguments)]),
        "seed": given.seed,
        "rounds": repeats,
        "surroundings": surroundings(torch.device(given.device)),
        "shape": {**shape, "dtype": given.dtype, "memory_layer": model.memory_layer},
    }
    if given.only != "reading":
        _say(f"decoding at {contexts} tokens of context ...")
        result["decoding"] = decoding(model, contexts, window=window, steps=steps, repeats=repeats, seed=given.seed)
    if given.only != "decoding":
        _say("reading ...")
        result["reading"] = reading(
            model,
            contexts,
            segment=segment,
            repeats=given.reading_repeats,
            seed=given.seed,
            long_reading=not given.no_long_reading,
        )
    write_json(given.out, result)
    print("\n".join(lines(result)))
    _say(f"kept in {given.out}")
    return result


def lines(result: dict[str, Any]) -> list[str]:
    """The result as a few readable lines."""
    told = []
    if decoded := result.get("decoding"):
        for name, seconds in decoded["seconds_per_token"].items():
            told.append(
                f"{name:<20} {1e3 * seconds['median']:.1f} ms a token ({1e3 * seconds['min']:.1f} to "
                f"{1e3 * seconds['max']:.1f}), peak {decoded['peak_bytes'][name] / 2**20:,.0f} MiB beyond the weights"
            )
        for name, value in decoded["speed_over_empty_bank"].items():
            told.append(f"speed of {name} over empty bank: {_spelled(value)}")
        for size, value in decoded["full_attention_over_longmem"].items():
            told.append(f"full attention over LongMem at {size} tokens: {value['median']:.1f} times as long")
    if read_in := result.get("reading"):
        for name, value in read_in["tokens_per_second"].items():
            told.append(f"reading, {name}: {value['median']:,.0f} tokens/s")
        told.append(f"reading over backbone by windows: {_spelled(read_in['speed_over_backbone_by_windows'])}")
        told += [f"reading, {name}: peak {peak / 2**20:,.0f} MiB" for name, peak in read_in["peak_bytes"].items()]
    return told


def _spelled(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
