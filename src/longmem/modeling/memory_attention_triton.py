"""Fused kernels of the attention over retrieved chunks, for GPUs: every chunk is read once, and nothing is copied.

One program serves one query. It walks through the query's chunks a tile of tokens at a time and keeps a running
softmax, so only the tile is ever held. ``attention`` is the same in plain torch, for every device and shape.

Q = B*H*T queries in one list · R chunks per query · S tokens per chunk · D head_dim · N tokens of one tile
"""

import functools
import logging
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longmem.types import RetrievedMemory

# keys that one warp holds at a time, in bytes; as many values come with them
_TILE_BYTES = 4096

logger = logging.getLogger(__name__)


def serves(queries: Tensor, storage: Tensor) -> bool:
    """Whether these kernels can read this storage for these queries."""
    return (
        queries.device == storage.device
        and {queries.dtype, storage.dtype} <= {torch.float32, torch.float16, torch.bfloat16}
        and storage.is_contiguous()
        and all(size & (size - 1) == 0 for size in storage.shape[-2:])  # tiles are powers of two
        and _compiles(queries.device)
    )


def forward(
    queries: Tensor, retrieved: RetrievedMemory, scaling: float, softcap: float | None, bonus: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output (B, H, T, D) in the queries' dtype and its log-sum-exp (B, H, T) in float32.

    ``bonus`` (B, H, T, R) is added to the scores of every chunk; None for nothing.
    """
    queries = queries.contiguous()
    out = torch.empty_like(queries)
    lse = torch.empty(queries.shape[:3], dtype=torch.float32, device=queries.device)
    _launch(_forward, (queries, out, lse), retrieved, scaling, softcap, bonus)
    return out, lse


def backward(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    retrieved: RetrievedMemory,
    scaling: float,
    softcap: float | None,
    bonus: Tensor | None,
) -> Tensor:
    """Gradient of the queries, from queries, output, log-sum-exp and the gradients of the latter two."""
    grad = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    _launch(_backward, (*(each.contiguous() for each in tensors), grad), retrieved, scaling, softcap, bonus)
    return grad


def _launch(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    retrieved: RetrievedMemory,
    scaling: float,
    softcap: float | None,
    bonus: Tensor | None,
) -> None:
    _, heads, length, chunks = retrieved.chunk_ids.shape
    _, slots, heads_kv, _, size, dim = retrieved.storage.shape
    line_bytes = size * dim * retrieved.storage.element_size()
    at_once = max(1, min(triton.next_power_of_2(chunks), _TILE_BYTES // line_bytes))
    found = (
        retrieved.chunk_ids.contiguous(),
        retrieved.chunk_mask.contiguous().view(torch.uint8),
        retrieved.rows.contiguous(),
        tensors[0] if bonus is None else bonus.float().contiguous(),  # without any, it is not read
    )
    memory = (retrieved.storage, retrieved.lengths.contiguous(), slots, heads_kv, retrieved.first_head)
    group = heads // (heads_kv if retrieved.layer_heads is None else retrieved.layer_heads)
    if queries := retrieved.chunk_ids.shape[:3].numel():
        # triton launches on the current device, which need not be that of this layer
        with torch.cuda.device_of(tensors[0]):
            kernel[(queries,)](
                *tensors, *found, *memory, group, heads, length, float(scaling), float(softcap or 1.0),
                CAPPED=softcap is not None, NEWER=bonus is not None, R=chunks, S=size, D=dim, N=at_once * size,
                num_warps=min(8, max(1, at_once * line_bytes // _TILE_BYTES)),
            )  # fmt: skip


@functools.cache
def _compiles(device: torch.device) -> bool:
    """Whether triton works here: it needs a C compiler and Python's headers, which torch itself does not."""
    number = torch.ones(1, dtype=torch.bfloat16, device=device)
    try:
        with torch.cuda.device_of(number):
            _double[(1,)](number)
    except Exception as error:
        logger.warning("memory attention runs without its fused kernels, since triton fails here: %s", error)
        return False
    return bool(number == 2)


@triton.jit
def _double(number):
    tl.store(number, (tl.load(number).to(tl.float32) * 2).to(number.dtype.element_ty))


@triton.jit
def _read(
    start, ids, mask, rows, bonus, storage, lengths, slots, heads_kv, first_head, group, heads, length,
    NEWER: tl.constexpr, R: tl.constexpr, S: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Keys and values (N, D) of the chunks from ``start`` on, in float32; of their tokens (N,), which are real, and
    what is added to their scores."""
    query = tl.program_id(0).to(tl.int64)
    kv_head = first_head + query // length % heads // group
    row = tl.load(rows + query // length // heads).to(tl.int64)
    token = tl.arange(0, N)
    chunk = start + token // S
    inside = chunk < R
    slot = row * slots + tl.load(ids + query * R + chunk, mask=inside, other=0).to(tl.int64)
    found = inside & (tl.load(mask + query * R + chunk, mask=inside, other=0) != 0)
    # lengths are not waited for: what follows a short chunk's tokens is read, and left out by its score
    real = found & (token % S < tl.load(lengths + slot, mask=found, other=0))
    at = (slot * heads_kv + kv_head) * (2 * S * D) + token % S * D
    pointers = storage + at[:, None] + tl.arange(0, D)[None, :]
    keys = tl.load(pointers, mask=found[:, None], other=0.0)
    values = tl.load(pointers + S * D, mask=found[:, None], other=0.0)
    more = tl.zeros((N,), dtype=tl.float32)
    if NEWER:
        more = tl.load(bonus + query * R + chunk, mask=inside, other=0.0)
    return keys.to(tl.float32), values.to(tl.float32), real, more


@triton.jit
def _scores(asked, keys, real, more, scaling, softcap, CAPPED: tl.constexpr):
    scores = tl.sum(asked[None, :] * keys, axis=1) * scaling
    if CAPPED:  # tanh(x) = 2 sigmoid(2x) - 1
        scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
    return tl.where(real, scores + more, float("-inf"))


@triton.jit
def _forward(
    queries, out, lse, ids, mask, rows, bonus, storage, lengths, slots, heads_kv, first_head, group, heads, length,
    scaling, softcap, CAPPED: tl.constexpr, NEWER: tl.constexpr, R: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0).to(tl.int64)
    line = query * D + tl.arange(0, D)
    asked = tl.load(queries + line).to(tl.float32)
    mixed = tl.zeros((D,), dtype=tl.float32)
    total = tl.full((), 0.0, dtype=tl.float32)
    largest = tl.full((), float("-inf"), dtype=tl.float32)
    for start in range(0, R, N // S):
        keys, values, real, more = _read(
            start, ids, mask, rows, bonus, storage, lengths, slots, heads_kv, first_head, group, heads, length,
            NEWER, R, S, D, N,
        )  # fmt: skip
        scores = _scores(asked, keys, real, more, scaling, softcap, CAPPED)
        before, largest = largest, tl.maximum(largest, tl.max(scores, axis=0))
        # as long as nothing was found both are -inf, and -inf - -inf is no number
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        kept, shares = tl.exp(before - shift), tl.exp(scores - shift)
        mixed = mixed * kept + tl.sum(shares[:, None] * values, axis=0)
        total = total * kept + tl.sum(shares, axis=0)
    found = total > 0
    total = tl.where(found, total, 1.0)
    tl.store(out + line, (mixed / total).to(out.dtype.element_ty))
    tl.store(lse + query, tl.where(found, largest + tl.log(total), float("-inf")))


@triton.jit
def _backward(
    queries, out, lse, grad_out, grad_lse, grad, ids, mask, rows, bonus, storage, lengths, slots, heads_kv, first_head,
    group, heads, length, scaling, softcap, CAPPED: tl.constexpr, NEWER: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0).to(tl.int64)
    line = query * D + tl.arange(0, D)
    asked = tl.load(queries + line).to(tl.float32)
    weights = tl.load(grad_out + line).to(tl.float32)
    log_total = tl.load(lse + query)
    log_total = tl.where(log_total == float("-inf"), 0.0, log_total)
    # d loss / d score = share * (grad_out . value - grad_out . out + grad_lse)
    offset = tl.load(grad_lse + query).to(tl.float32) - tl.sum(weights * tl.load(out + line).to(tl.float32), axis=0)
    slopes = tl.zeros((D,), dtype=tl.float32)
    for start in range(0, R, N // S):
        keys, values, real, more = _read(
            start, ids, mask, rows, bonus, storage, lengths, slots, heads_kv, first_head, group, heads, length,
            NEWER, R, S, D, N,
        )  # fmt: skip
        scores = _scores(asked, keys, real, more, scaling, softcap, CAPPED)
        slope = tl.exp(scores - log_total) * (tl.sum(weights[None, :] * values, axis=1) + offset)
        if CAPPED:  # the slope of tanh; scores are -inf at what is not there
            capped = tl.where(real, scores - more, 0.0) / softcap
            slope = slope * (1 - capped * capped)
        slopes += tl.sum(slope[:, None] * keys, axis=0)
    tl.store(grad + line, (slopes * scaling).to(grad.dtype.element_ty))
