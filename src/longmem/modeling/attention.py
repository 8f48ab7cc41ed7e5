"""Attention over retrieved chunks, straight from the bank's storage; and the log-sum-exp of a layer's own scores.

B rows · H query heads · Hkv key/value heads · T tokens · D head_dim · R chunks per query · S tokens per chunk ·
K = R*S retrieved tokens · Q = B*H*T queries in one list · n queries of one block
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longmem.errors import MemoryBankError
from longmem.types import RetrievedMemory

# gathered keys and values held at once: what stays in a CPU's cache, or keeps a GPU busy
_BLOCK_BYTES = {"cpu": 1 << 21, "cuda": 1 << 28}
_KERNELS_RUN_ON = "cuda"  # a test that interprets the fused kernels sets "cpu"


class MemoryAttentionOutput(NamedTuple):
    """Attention over what each query found.

    Attributes:
        out: (B, H, T, D) in the queries' dtype; zero where nothing was found.
        lse: (B, H, T) log of the sum of exponentials, at least float32; -inf where nothing was found.
        found: (B, H, T) bool.
        parts: (B, H, T, R) how the attention of a query is divided among its chunks, if that was asked for; 0 where
            masked, and a sum of 1 over R wherever anything was found.
    """

    out: Tensor
    lse: Tensor
    found: Tensor
    parts: Tensor | None


def memory_attention(
    queries: Tensor,
    retrieved: RetrievedMemory,
    *,
    scaling: float,
    softcap: float | None = None,
    recency: float = 0.0,
    temperature: float = 1.0,
    explain: bool = False,
) -> MemoryAttentionOutput:
    """Softmax attention of every query over its own retrieved tokens, without any position term.

    Chunks are gathered for a block of queries at a time, in forward and again in backward, so the copies per query
    (B, H, T, K, D) never exist as a whole. On a GPU with triton, fused kernels read the storage with no copies at all.
    Only the queries get a gradient, through output and log-sum-exp: the memory is not trained.

    Args:
        queries: (B, H, T, D).
        retrieved: what ``Memory.search`` found for them.
        scaling, softcap: of the scores, the backbone's own; see ``QKV``.
        recency: how much newer chunks are preferred, see ``recency_bonus``.
        temperature: what scores are divided by, for ``out`` and ``parts`` alone: ``lse``, from which shares follow, is
            that of the scores as they are.
        explain: also give ``parts``.
    """
    bonus = recency_bonus(retrieved, recency, scaling, softcap) if recency else None

    def attend(temperature: float, explain: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        cap, more = (None if each is None else each / temperature for each in (softcap, bonus))
        found = _MemoryAttention.apply(queries, retrieved, scaling / temperature, cap, more, explain)  # type: ignore[no-untyped-call]
        return cast("tuple[Tensor, Tensor, Tensor | None]", found)

    with torch.autocast(queries.device.type, enabled=False):
        out, lse, parts = attend(temperature, explain)
        if temperature != 1:
            _, lse, _ = attend(1.0, False)
    return MemoryAttentionOutput(out, lse, lse != -torch.inf, parts)


@torch.no_grad()
def recency_bonus(retrieved: RetrievedMemory, recency: float, scaling: float, softcap: float | None = None) -> Tensor:
    """(B, H, T, R), what is added to the scores of every chunk that was found; a constant in backward.

    Let s be a chunk's score by its mean key, and n the best such score among chunks of a later period. The chunk loses
    ``recency * min(1, exp(n - s))``: all of ``recency`` to a newer chunk that matches as well, next to nothing to newer
    ones that match far less. Then one constant is added to all chunks of a query, such that the log-sum-exp of their
    scores is what it was: memory as a whole gets about the share that it had (mean keys stand for the tokens).
    """
    scores = retrieved.scores * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~retrieved.chunk_mask, -1e30)  # finite: where nothing was found the bonus is 0
    period = retrieved.period
    periods, order = period.sort(dim=-1)
    # the best score from each place on, in the order of time; beyond the last one there is nothing
    best = scores.gather(-1, order).flip(-1).cummax(-1).values.flip(-1)
    best = torch.nn.functional.pad(best, (0, 1), value=-1e30)
    later = best.gather(-1, torch.searchsorted(periods, period, right=True))
    lost = recency * (later - scores).clamp(max=0).exp() * retrieved.chunk_mask
    return scores.logsumexp(-1, keepdim=True) - (scores - lost).logsumexp(-1, keepdim=True) - lost


@dataclass(frozen=True)
class _Gather:
    """Reads the chunks that a list of queries found. Storage is seen as a table with one line per chunk and head.

    Attributes:
        table: (rows * slots * heads of all remembered layers, 2*S*D), a line per row, slot and head: keys, then values.
        lines: (Q, R) long, the line of each retrieved chunk.
        real: (Q, R, S) bool, or None where every retrieved token is real.
        bonus: (Q, R, 1), added to the scores of chunks; None for nothing.
        shape: of a gathered chunk, (R, 2, S, D).
    """

    table: Tensor
    lines: Tensor
    real: Tensor | None
    bonus: Tensor | None
    shape: tuple[int, int, int, int]

    @classmethod
    def of(cls, retrieved: RetrievedMemory, bonus: Tensor | None) -> _Gather:
        chunks, (size, dim) = retrieved.chunk_ids.shape[3], retrieved.storage.shape[4:]
        sizes = retrieved.sizes.view(-1, chunks, 1)
        # the usual case, a memory of full chunks, needs no mask at all
        full = bool((sizes == size).all())
        return cls(
            table=retrieved.storage.view(-1, 2 * size * dim),
            lines=retrieved.lines.view(-1, chunks),
            real=None if full else torch.arange(size, device=sizes.device) < sizes,
            bonus=None if bonus is None else bonus.view(-1, chunks, 1),
            shape=(chunks, 2, size, dim),
        )

    def blocks(self) -> Iterator[slice]:
        """Pieces of the query list whose gathered chunks fit the block."""
        step = max(1, _BLOCK_BYTES.get(self.table.device.type, 1 << 25) // (4 * math.prod(self.shape)))
        for start in range(0, self.lines.shape[0], step):
            yield slice(start, min(start + step, self.lines.shape[0]))

    def read(self, block: slice, dtype: torch.dtype) -> Tensor:
        """Keys and values of the block's queries as they lie in the chunks, (n, R*2*S, D): one read per chunk."""
        chunks, pair, size, dim = self.shape
        read = self.table.index_select(0, self.lines[block].flatten())
        return read.to(dtype).view(-1, chunks * pair * size, dim)

    def scores(self, products: Tensor, block: slice, scaling: float, softcap: float | None) -> Tensor:
        """(n, R, S) attention scores from key products (n, R, S); -inf at what is not there."""
        scores = products * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if self.bonus is not None:
            scores = scores + self.bonus[block]
        return scores if self.real is None else scores.masked_fill(~self.real[block], -torch.inf)


class _MemoryAttention(torch.autograd.Function):
    # The keys and values of a chunk are read together, and every product is taken with both: ``products[..., 0, :]``
    # are with the keys, ``products[..., 1, :]`` with the values. Half of each is left out. That is cheaper than
    # separating keys from values first. Row vector times matrix is by far the faster order in ``bmm``.

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        retrieved: RetrievedMemory,
        scaling: float,
        softcap: float | None,
        bonus: Tensor | None,
        explain: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.retrieved, ctx.scaling, ctx.softcap, ctx.bonus = retrieved, scaling, softcap, bonus
        # the kernels keep no scores, of which parts are made
        ctx.kernels = kernels = None if explain else _kernels(queries, retrieved.storage)
        if kernels is not None:
            out, lse = kernels.forward(queries, retrieved, scaling, softcap, bonus)
            ctx.save_for_backward(queries, out, lse)
            return out, lse, None
        gather = ctx.gather = _Gather.of(retrieved, bonus)
        dtype = torch.promote_types(torch.promote_types(queries.dtype, retrieved.storage.dtype), torch.float32)
        flat = queries.reshape(-1, queries.shape[-1])
        out = torch.empty_like(flat)
        lse = torch.empty(flat.shape[0], dtype=dtype, device=flat.device)
        parts = torch.empty(gather.lines.shape, dtype=dtype, device=flat.device) if explain else None
        for block in gather.blocks():
            pairs = gather.read(block, dtype)
            products = torch.bmm(flat[block, None].to(dtype), pairs.transpose(1, 2)).view(-1, *gather.shape[:3])
            scores = gather.scores(products[:, :, 0], block, scaling, softcap)
            lse[block] = torch.logsumexp(scores, dim=(1, 2))
            shares = torch.zeros_like(products)
            shares[:, :, 1] = _softmax(scores, lse[block])
            out[block] = torch.bmm(shares.flatten(1)[:, None], pairs).squeeze(1).to(out.dtype)
            if parts is not None:
                parts[block] = shares[:, :, 1].sum(-1)
        out, lse = out.view(queries.shape), lse.view(queries.shape[:3])
        ctx.save_for_backward(queries, out, lse)
        if parts is not None:
            parts = parts.view(retrieved.chunk_ids.shape)
            ctx.mark_non_differentiable(parts)
        return out, lse, parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        retrieved: RetrievedMemory = ctx.retrieved
        if retrieved.live_version() != retrieved.version:
            raise MemoryBankError(
                f"memory was written between forward and backward (write {retrieved.version} was read, now it is "
                f"{retrieved.live_version()}); call bank.add after backward"
            )
        queries, out, lse = ctx.saved_tensors
        if ctx.kernels is not None:
            tensors = (queries, out, lse, grad_out, grad_lse)
            grad = ctx.kernels.backward(tensors, retrieved, ctx.scaling, ctx.softcap, ctx.bonus)
            return grad, None, None, None, None, None
        gather, scaling, softcap, dtype = ctx.gather, ctx.scaling, ctx.softcap, lse.dtype
        flat, lse = queries.reshape(-1, queries.shape[-1]), lse.flatten()
        grad_out, grad_lse = grad_out.reshape(flat.shape).to(dtype), grad_lse.flatten().to(dtype)
        # d loss / d score = share * (grad_out . value - grad_out . out + grad_lse)
        offset = grad_lse - (grad_out * out.reshape(flat.shape)).sum(1)
        grad = torch.empty_like(flat)
        with torch.autocast(flat.device.type, enabled=False):
            for block in gather.blocks():
                pairs = gather.read(block, dtype)
                # the query meets the keys, the gradient of its output meets the values
                asked = torch.stack((flat[block].to(dtype), grad_out[block]), dim=1)
                products = torch.bmm(asked, pairs.transpose(1, 2)).view(-1, 2, *gather.shape[:3])
                scores = gather.scores(products[:, 0, :, 0], block, scaling, softcap)
                slope = _softmax(scores, lse[block]) * (products[:, 1, :, 1] + offset[block, None, None])
                if softcap is not None:  # the slope of tanh; clamped since scores are -inf at what is not there
                    capped = scores if gather.bonus is None else scores - gather.bonus[block]
                    slope = slope * (1 - (capped.clamp(min=-softcap) / softcap) ** 2)
                slopes = torch.zeros_like(products[:, 0])
                slopes[:, :, 0] = slope * scaling
                grad[block] = torch.bmm(slopes.flatten(1)[:, None], pairs).squeeze(1).to(grad.dtype)
        return grad.view(queries.shape), None, None, None, None, None


def _kernels(queries: Tensor, storage: Tensor) -> ModuleType | None:
    """The fused kernels, where they can be used."""
    kernels = _installed_kernels() if queries.device.type == _KERNELS_RUN_ON else None
    return kernels if kernels is not None and kernels.serves(queries, storage) else None


@functools.cache
def _installed_kernels() -> ModuleType | None:
    try:
        from longmem.modeling import memory_attention_triton
    except ImportError:  # torch brings triton in its builds for Linux with CUDA only
        return None
    return memory_attention_triton


def _softmax(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse) of (n, R, S) and (n,); zero where nothing was found (there both are -inf)."""
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[:, None, None])


def local_lse(
    queries: Tensor, keys: Tensor, mask: Tensor | None, *, scaling: float, softcap: float | None = None
) -> Tensor:
    """Log of the local softmax's denominator, (B, H, T).

    Args:
        queries: (B, H, T, D), with their positions.
        keys: (B, Hkv, T_keys, D).
        mask: additive or boolean (True = visible), broadcast to (B, H, T, T_keys); None is causal.
    """
    keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    length, total, device = queries.shape[2], keys.shape[2], queries.device
    square = mask is None and length in (1, total)  # what torch's fused attention knows as causal without a mask
    fused = softcap is None and (device.type == "cpu" or (device.type == "cuda" and square))
    if mask is None and length > 1 and not (fused and square):
        mask = torch.ones(length, total, dtype=torch.bool, device=device).tril(total - length)
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(queries.dtype).min  # not -inf: a row that sees nothing, as of a pad, would be nan
        mask = torch.zeros(mask.shape, dtype=queries.dtype, device=device).masked_fill_(~mask, lowest)
    if mask is not None:  # as transformers' eager attention cuts it
        mask = mask[..., :total]
    if fused:
        return _fused_lse(queries, keys, mask, length > 1 and mask is None, scaling)
    scores = torch.matmul(queries, keys.transpose(-1, -2)).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores if mask is None else scores + mask.float()).logsumexp(dim=-1)


def _fused_lse(queries: Tensor, keys: Tensor, mask: Tensor | None, causal: bool, scaling: float) -> Tensor:
    """The same from torch's fused attention, which keeps no scores; its own gradient leaves the log-sum-exp out.

    With the keys as values, attention gives out = P K, which is the gradient of the log-sum-exp to the queries; and
    what a gradient q of out gives to the values, P^T q, is its gradient to the keys.
    """
    device = queries.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        queries, keys = queries.to(dtype), keys.to(dtype)
        mask = None if mask is None else mask.to(dtype)
    fixed = queries.detach()
    if device == "cuda":
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            fixed, keys.detach(), keys, None, True, 0.0, causal, scale=scaling
        )
        lse = lse[..., : queries.shape[2]]
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            fixed, keys.detach(), keys, 0.0, causal, attn_mask=mask, scale=scaling
        )
    if not (torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad)):
        return cast(Tensor, lse)
    # its value is 0; its gradient to the queries is `out`, and through `out`, whose values are the keys, P^T q to these
    slope = (queries * out.detach()).sum(-1) + (fixed * out).sum(-1) - 2 * (fixed * out.detach()).sum(-1)
    return cast(Tensor, lse.detach() + scaling * slope.float())
