"""How much of what exact search finds an index finds, on keys and queries of a model's own.

H query heads · Hkv key/value heads · n chunks · D head_dim · Q queries · R retrieved chunks
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longmem.errors import MemoryBankError
from longmem.memory.index import ExactIndex, Index, make_index


@dataclass(frozen=True)
class RecallReport:
    """What an index found of the best chunks, one query at a time, as in decoding.

    Attributes:
        index: its name.
        chunks: n.
        heads_kv: Hkv.
        num: R.
        queries: tokens that asked, each with one query per head.
        recall: share of the exact best ``num`` chunks that was found, over all heads and queries.
        recall_by_head: the same for each query head.
        recall_along: the same for each eighth of the queries in order, over all heads.
        attention_kept: of the softmax over the exact best chunks (scores divided by sqrt(D)), the share on those found.
        keys_read: bytes that a query reads to search, as a share of the chunk keys' bytes; 1 is all of them.
        state_bytes: what the index holds beside the keys.
        build_seconds: of the search that built it, less one that found it built; 0 if nothing is built.
        milliseconds: a token's search, all heads, mean, with what is searched exactly to learn from.
        exact_milliseconds: the same by exact search, taken in turn with it.
    """

    index: str
    chunks: int
    heads_kv: int
    num: int
    queries: int
    recall: float
    recall_by_head: list[float]
    recall_along: list[float]
    attention_kept: float
    keys_read: float
    state_bytes: int
    build_seconds: float
    milliseconds: float
    exact_milliseconds: float


@torch.no_grad()
def measure_recall(
    index: str | Index,
    keys: Tensor,
    queries: Tensor,
    num: int = 16,
    *,
    tokens: int = 256,
    heard: int = 256,
    clock: Callable[[], float] = time.perf_counter,
) -> RecallReport:
    """Compare an index with exact search.

    The first half of the queries, at most ``heard``, is searched first, as a prompt would be: an index that adapts to
    queries may learn from them. Of the second half at most ``tokens``, evenly spaced, are searched one by one.

    Args:
        index: a name (see ``make_index``), or an index that was never used.
        keys: (Hkv, n, D), mean key of every chunk.
        queries: (H, Q, D) in the order of the text they come from; H a multiple of Hkv.
        num: R.
        tokens: most queries per head to be compared.
        heard: most queries per head to be searched before.
        clock: what takes the times, in seconds; ``time.process_time`` leaves out what others do on a busy machine.

    Raises:
        MemoryBankError: keys and queries do not fit each other, or are too few.
    """
    heads_kv, chunks, dim = keys.shape
    heads, count, theirs = queries.shape
    if heads % heads_kv or theirs != dim:
        raise MemoryBankError(
            f"queries {tuple(queries.shape)} must be (H, Q, {dim}), H a multiple of the keys' {heads_kv} heads"
        )
    if count < 2 or chunks < num:
        raise MemoryBankError(
            f"{count} queries and {chunks} chunks are too few to measure recall@{num}: at least 2 and {num} are needed"
        )
    tried = make_index(index)
    keys, queries = keys[None], queries.to(keys.device)
    slots = torch.arange(chunks, device=keys.device)
    tried.written(keys, torch.zeros_like(slots), slots)
    before, after = queries[:, : count // 2], queries[:, count // 2 :]
    _search(tried, keys, before[:, -heard:], num)
    picked = torch.arange(min(tokens, after.shape[1]), device=keys.device)
    asked = after[:, picked * after.shape[1] // len(picked)]
    exact = ExactIndex()
    best_scores, best = _search(exact, keys, asked, num)

    found = torch.zeros_like(best, dtype=torch.bool)
    began = clock()
    _search(tried, keys, asked[:, :1], num)
    first = clock() - began
    taken: list[float] = []
    exactly: list[float] = []
    for at in range(len(picked)):
        query = asked[:, at : at + 1]
        began = clock()
        slots = _search(tried, keys, query, num)[1]
        taken.append(clock() - began)
        found[:, at] = (best[:, at, :, None] == slots[:, 0, None, :]).any(-1)
        if at % 4 == 0:
            began = clock()
            _search(exact, keys, query, num)
            exactly.append(clock() - began)
    weights = (best_scores * dim**-0.5).softmax(-1)
    return RecallReport(
        index=index if isinstance(index, str) else type(index).__name__,
        chunks=chunks,
        heads_kv=heads_kv,
        num=num,
        queries=len(picked),
        recall=float(found.float().mean()),
        recall_by_head=found.float().mean((1, 2)).tolist(),
        recall_along=[float(part.float().mean()) for part in found.chunk(8, dim=1)],
        attention_kept=float((weights * found).sum(-1).mean()),
        keys_read=float(getattr(tried, "share_read", lambda: 1.0)()),
        state_bytes=int(getattr(tried, "state_bytes", lambda: 0)()),
        build_seconds=max(0.0, first - statistics.median(taken)) if hasattr(tried, "state_bytes") else 0.0,
        milliseconds=1000 * statistics.mean(taken),
        exact_milliseconds=1000 * statistics.mean(exactly),
    )


def _search(index: Index, keys: Tensor, queries: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Scores and slots (H, Q, R) for queries (H, Q, D) over keys (1, Hkv, n, D), as a bank asks."""
    heads, count, dim = queries.shape
    grouped = queries.reshape(1, keys.shape[1], -1, dim)
    scores, slots = index.search(grouped, keys, [0], [keys.shape[2]], num)
    wanted = (heads, count, num)
    if queries.device.type == "cuda":
        torch.cuda.synchronize()
    return scores.view(wanted), slots.view(wanted)
