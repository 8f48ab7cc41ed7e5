"""Attention over retrieved chunks, straight from the bank's storage.

B rows · H query heads · Hkv key/value heads · T tokens · D head_dim · R chunks per query · S tokens per chunk ·
K = R*S retrieved tokens · Q = B*H*T queries in one list · n queries of one block
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longmem.errors import MemoryBankError
from longmem.types import RetrievedMemory

# gathered keys or values held at once: a piece that stays in a core's cache, or keeps a GPU busy
_BLOCK_BYTES = {"cpu": 1 << 18, "cuda": 1 << 27}


class MemoryAttentionOutput(NamedTuple):
    """Attention over what each query found.

    Attributes:
        out: (B, H, T, D) in the queries' dtype; zero where nothing was found.
        lse: (B, H, T) log of the sum of exponentials, at least float32; -inf where nothing was found.
        found: (B, H, T) bool.
    """

    out: Tensor
    lse: Tensor
    found: Tensor


def memory_attention(
    queries: Tensor, retrieved: RetrievedMemory, *, scaling: float, softcap: float | None = None
) -> MemoryAttentionOutput:
    """Softmax attention of every query over its own retrieved tokens, without any position term.

    Chunks are gathered for a block of queries at a time, in forward and again in backward, so the copies per query
    (B, H, T, K, D) never exist as a whole. Only the queries get a gradient: the memory is not trained.

    Args:
        queries: (B, H, T, D).
        retrieved: what ``Memory.search`` found for them.
        scaling: factor on the scores, the backbone's own.
        softcap: scores become ``softcap * tanh(scores / softcap)`` where the backbone's do.

    Returns:
        output, its log-sum-exp (differentiable too) and where anything was found.
    """
    with torch.autocast(queries.device.type, enabled=False):
        out, lse = _MemoryAttention.apply(queries, retrieved, scaling, softcap)  # type: ignore[no-untyped-call]
    return MemoryAttentionOutput(out, lse, lse != -torch.inf)


@dataclass(frozen=True)
class _Gather:
    """Reads the chunks of one query list from storage seen as a table of half chunks.

    Attributes:
        table: (rows * slots * Hkv * 2, S*D); keys at even lines, values at odd ones.
        lines: (Q, R) long, the line of each retrieved chunk's keys.
        real: (Q, K) bool, or None where every retrieved token is real.
        shape: (K, D).
    """

    table: Tensor
    lines: Tensor
    real: Tensor | None
    shape: tuple[int, int]

    @classmethod
    def of(cls, retrieved: RetrievedMemory) -> _Gather:
        _, heads, _, chunks = retrieved.chunk_ids.shape
        _, slots, heads_kv, _, size, dim = retrieved.storage.shape
        head = torch.arange(heads, device=retrieved.chunk_ids.device) // (heads // heads_kv)
        first = retrieved.rows.view(-1, 1, 1, 1) * (slots * heads_kv) + head.view(1, -1, 1, 1)
        lines = (first + retrieved.chunk_ids * heads_kv) * 2
        mask = retrieved.mask
        return cls(
            table=retrieved.storage.view(-1, size * dim),
            lines=lines.view(-1, chunks),
            real=None if bool(mask.all()) else mask.view(-1, chunks * size),
            shape=(chunks * size, dim),
        )

    def blocks(self) -> Iterator[slice]:
        """Pieces of the query list whose gathered keys fit the block."""
        per_query = self.shape[0] * self.shape[1] * 4
        step = max(1, _BLOCK_BYTES.get(self.table.device.type, 1 << 25) // per_query)
        for start in range(0, self.lines.shape[0], step):
            yield slice(start, min(start + step, self.lines.shape[0]))

    def read(self, block: slice, which: int, dtype: torch.dtype) -> Tensor:
        """Keys (which=0) or values (1) of the block's queries, (n, K, D)."""
        lines = self.lines[block].flatten()
        return self.table.index_select(0, lines + which).to(dtype).view(-1, *self.shape)


def _scores(queries: Tensor, keys: Tensor, real: Tensor | None, scaling: float, softcap: float | None) -> Tensor:
    """(n, K) scores of queries (n, D) against their own keys (n, K, D); -inf at what is not there."""
    scores = torch.bmm(keys, queries[:, :, None]).squeeze(2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores if real is None else scores.masked_fill(~real, -torch.inf)


class _MemoryAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, retrieved: RetrievedMemory, scaling: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        gather = _Gather.of(retrieved)
        dtype = torch.promote_types(torch.promote_types(queries.dtype, retrieved.storage.dtype), torch.float32)
        flat = queries.reshape(-1, queries.shape[-1])
        out = torch.empty_like(flat)
        lse = torch.empty(flat.shape[0], dtype=dtype, device=flat.device)
        for block in gather.blocks():
            real = None if gather.real is None else gather.real[block]
            scores = _scores(flat[block].to(dtype), gather.read(block, 0, dtype), real, scaling, softcap)
            lse[block] = torch.logsumexp(scores, dim=1)
            share = _softmax(scores, lse[block])
            out[block] = torch.bmm(share[:, None], gather.read(block, 1, dtype)).squeeze(1).to(out.dtype)
        out, lse = out.view(queries.shape), lse.view(queries.shape[:3])
        ctx.save_for_backward(queries, out, lse)
        ctx.retrieved, ctx.scaling, ctx.softcap = retrieved, scaling, softcap
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, None, None, None]:
        retrieved: RetrievedMemory = ctx.retrieved
        if retrieved.live_version() != retrieved.version:
            raise MemoryBankError(
                f"memory was written between forward and backward (write {retrieved.version} read, now "
                f"{retrieved.live_version()}); call bank.add after backward"
            )
        queries, out, lse = ctx.saved_tensors
        gather, softcap, dtype = _Gather.of(retrieved), ctx.softcap, lse.dtype
        flat, lse = queries.reshape(-1, queries.shape[-1]), lse.flatten()
        grad_out, grad_lse = grad_out.reshape(flat.shape).to(dtype), grad_lse.flatten().to(dtype)
        # d loss / d score = share * (grad_out . value - grad_out . out + grad_lse)
        offset = grad_lse - (grad_out * out.reshape(flat.shape)).sum(1)
        grad = torch.empty_like(flat)
        with torch.autocast(flat.device.type, enabled=False):
            for block in gather.blocks():
                real = None if gather.real is None else gather.real[block]
                keys = gather.read(block, 0, dtype)
                scores = _scores(flat[block].to(dtype), keys, real, ctx.scaling, softcap)
                towards = torch.bmm(gather.read(block, 1, dtype), grad_out[block, :, None]).squeeze(2)
                slope = _softmax(scores, lse[block]) * (towards + offset[block, None])
                if softcap is not None:
                    slope = slope * (1 - (scores.clamp(min=-softcap) / softcap) ** 2)
                grad[block] = (torch.bmm(slope[:, None], keys).squeeze(1) * ctx.scaling).to(grad.dtype)
        return grad.view(queries.shape), None, None, None


def _softmax(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), and zero where nothing was found (there both are -inf)."""
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[:, None])
