"""An adaptation step with a full memory, against the same step without, and against the released code's way.

A step is forward, backward and the writing of memory; the optimiser, the same for all, is left out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import interleaved, peak_bytes, ratio, spread, summary
from benchmarks.released import ReleasedMemory, ReleasedStep
from benchmarks.retrieval import filled_bank
from longmem.memory import MemoryBank
from longmem.modeling.alibi_gpt import AlibiGPTConfig, AlibiGPTForCausalLM
from longmem.modeling.longmem import LongMem
from longmem.types import RetrievedMemory

SHAPE = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 8192}


def make_model(shape: dict[str, int], memory_layer: int, seed: int = 0) -> LongMem:
    """A random LongMem with the released settings."""
    torch.manual_seed(seed)
    backbone = AlibiGPTForCausalLM(AlibiGPTConfig(**shape))
    model = LongMem.from_backbone(
        backbone, memory_layer=memory_layer, side_activation="gelu", side_norm_eps=1e-5, final_state="normed"
    )
    return model.train()


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


def measure(
    memory_tokens: Sequence[int] = (16384, 65536),
    rows: int = 4,
    segment: int = 256,
    repeats: int = 7,
    device: str = "cpu",
    seed: int = 0,
    released: bool = True,
    memory_layer: int = 5,
) -> dict[str, Any]:
    """Seconds, ratios and peak bytes.

    Every row has a memory of its own with us; the released code has one for all rows. So each query searches equally
    many tokens, while our banks hold ``rows`` times as many in all.
    """
    model = make_model(SHAPE, memory_layer, seed).to(device)
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, SHAPE["vocab_size"], (rows, segment), generator=draw).to(device)
    heads, dim = model.memory_heads, model.memory_head_dim
    banks = {tokens: filled_bank(tokens, rows, heads, dim, device=device, seed=seed) for tokens in memory_tokens}
    empty = filled_bank(0, rows, heads, dim, device=device)
    runs: dict[str, Any] = {
        "without_memory": lambda: step(model, ids, None),
        "empty_bank": lambda: step(model, ids, empty, write=False),
    }
    for tokens, bank in banks.items():
        runs[f"memory_{tokens}"] = lambda bank=bank: step(model, ids, bank)
        if released and device == "cpu":
            theirs = prefilled(tokens, heads, dim, rows * segment, seed)
            runs[f"released_{tokens}"] = lambda theirs=theirs: released_step(model, ids, theirs)
    taken = interleaved(runs, repeats, warmup=2)
    plain, nothing = taken["without_memory"], taken["empty_bank"]
    result: dict[str, Any] = {
        "shape": {**SHAPE, "rows": rows, "segment": segment, "memory_layer": model.memory_layer},
        "seconds": {name: summary(rounds) for name, rounds in taken.items()},
        "step_over_step_without_memory": {},
        "search_share_of_step": {},
        "throughput_over_empty_bank": {},
        "released_over_ours": {},
    }
    for tokens in memory_tokens:
        ours = taken[f"memory_{tokens}"]
        result["step_over_step_without_memory"][tokens] = ratio(ours, plain)
        result["search_share_of_step"][tokens] = spread([each["search"] / each["total"] for each in ours])
        result["throughput_over_empty_bank"][tokens] = ratio(nothing, ours)
        if f"released_{tokens}" in taken:
            result["released_over_ours"][tokens] = ratio(taken[f"released_{tokens}"], ours)
    peaks = {0: peak_bytes(lambda: step(model, ids, None))}
    peaks |= {tokens: peak_bytes(lambda bank=bank: step(model, ids, bank)) for tokens, bank in banks.items()}
    result["peak_bytes_of_step_beyond_bank"] = peaks
    result["bank_bytes"] = {tokens: bank.nbytes for tokens, bank in banks.items()}
    return result


def prefilled(tokens: int, heads: int, head_dim: int, added: int, seed: int, chunk_size: int = 4) -> ReleasedMemory:
    """A released memory filled up to where it starts to evict."""
    memory = ReleasedMemory(tokens, heads, head_dim, chunk_size)
    draw = torch.Generator().manual_seed(seed)
    while memory.fill + added // chunk_size < memory.slots:
        memory.add(*(torch.randn(1, added, heads, head_dim, generator=draw) for _ in range(2)))
    return memory
