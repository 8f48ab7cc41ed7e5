"""Retrieval and memory attention, forward and backward: the bank's way against the materialised gather.

The materialised way is the formula as one writes it first: all scores (tokens x chunks), a top-k over them, and a copy
of the K keys and values of every token and head.

B rows · H heads · T tokens · N chunks · S tokens per chunk · D head_dim · R retrieved chunks
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import interleaved, peak_bytes, ratio, summary
from longmem.memory import MemoryBank
from longmem.modeling.attention import memory_attention
from longmem.types import AttentionKV


def filled_bank(
    tokens: int,
    rows: int,
    heads: int,
    head_dim: int,
    chunk_size: int = 4,
    device: str = "cpu",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> MemoryBank:
    """A bank of random keys and values, full but for the first chunk, in pieces of 4,096 tokens."""
    bank = MemoryBank(rows, max(tokens, chunk_size), heads, head_dim, chunk_size, device=device, dtype=dtype)
    draw = torch.Generator().manual_seed(seed)
    for first in range(0, tokens, 4096):
        shape = (rows, heads, min(4096, tokens - first), head_dim)
        keys, values = (torch.randn(shape, generator=draw).to(device) for _ in range(2))
        bank.add(AttentionKV(keys, values))
    return bank


def blockwise(bank: MemoryBank, queries: Tensor, num_chunks: int) -> Tensor:
    """The bank's way; returns the queries' gradient."""
    asked = queries.detach().requires_grad_()
    retrieved = bank.search(asked, num_chunks)
    result = memory_attention(asked, retrieved, scaling=queries.shape[-1] ** -0.5)
    result.out.backward(queries)
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


def measure(
    memory_tokens: Sequence[int] = (16384, 65536),
    rows: int = 4,
    heads: int = 8,
    segment: int = 256,
    head_dim: int = 32,
    num_chunks: int = 16,
    repeats: int = 7,
    device: str = "cpu",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One record per memory size: seconds and peak bytes of both ways, and their ratios."""
    records = []
    for tokens in memory_tokens:
        bank = filled_bank(tokens, rows, heads, head_dim, device=device, seed=seed)
        draw = torch.Generator().manual_seed(seed + 1)
        queries = torch.randn(rows, heads, segment, head_dim, generator=draw).to(device)
        ways = {
            "blockwise": lambda bank=bank, queries=queries: blockwise(bank, queries, num_chunks),
            "materialised": lambda bank=bank, queries=queries: materialised(bank, queries, num_chunks),
        }
        torch.testing.assert_close(ways["blockwise"](), ways["materialised"](), atol=1e-4, rtol=1e-3)
        taken = interleaved({name: (lambda way=way: way() is None) for name, way in ways.items()}, repeats)
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
