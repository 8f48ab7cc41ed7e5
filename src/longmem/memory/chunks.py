"""From tokens to chunks.

Hkv key/value heads of all remembered layers · n chunks · S tokens per chunk · D head_dim
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longmem.errors import MemoryBankError
from longmem.types import AttentionKV

PERIOD_TOKENS = 1024


def period(document: Any, token: Any) -> Any:
    """When something was said, a number that grows: of the ``document``-th document (0-based), its token ``token``.

    What is said together is of one age: that of ten facts told in one conversation one is told last says nothing. So
    a document, or where it is longer each ``PERIOD_TOKENS`` of it, is one period. Of integers, tensors, arrays.
    """
    return (document << 20) + token // PERIOD_TOKENS


def joined(kv: AttentionKV, heads: int, head_dim: int) -> Tensor:
    """Keys and values next to each other, (B, Hkv, 2, T, D), without gradient; a MemoryBankError if they do not fit."""
    if kv.keys.dim() != 4 or (kv.keys.shape[1], kv.keys.shape[3]) != (heads, head_dim):
        shape = tuple(kv.keys.shape)
        raise MemoryBankError(f"keys {shape} must be (B, {heads}, T, {head_dim}), as this bank was made for")
    if kv.values.shape != kv.keys.shape:
        raise MemoryBankError(f"values {tuple(kv.values.shape)} must have the shape of keys {tuple(kv.keys.shape)}")
    rows_tokens = (kv.keys.shape[0], kv.keys.shape[2])
    if kv.mask is not None and kv.mask.shape != rows_tokens:
        raise MemoryBankError(f"mask {tuple(kv.mask.shape)} must be {rows_tokens}: rows and tokens of the keys")
    return torch.stack((kv.keys.detach(), kv.values.detach()), dim=2)


def refuse_unfit(pair: Tensor, mask: Tensor | None, dtype: torch.dtype, chunk_size: int) -> None:
    """Refuse, with a MemoryBankError, numbers that memory cannot hold: one would make every later answer NaN.

    Args:
        pair: keys and values (B, Hkv, 2, T, D), to be stored as ``dtype``.
        mask: (B, T) bool, True at real tokens; padding may hold anything.
    """
    if mask is not None and not bool(mask.all()):
        pair = pair.masked_fill(~mask.to(pair.device, torch.bool)[:, None, None, :, None], 0.0)
    if not pair.numel():
        return
    most = torch.finfo(dtype).max
    most_key = min(most, torch.finfo(torch.float32).max / chunk_size)  # S keys are added in float32
    largest = pair.abs().amax(dim=(1, 3, 4)).double().cpu()  # (B, 2); NaN is below no limit
    for row, (key, value) in enumerate(largest.tolist()):
        for name, number, limit in (("keys", key, most_key), ("values", value, most)):
            if not number <= limit:
                raise MemoryBankError(
                    f"{name} of row {row} reach {number:.3g}, a bank of {dtype} holds {limit:.3g} at most; look for an "
                    "overflow in the model, or make the bank with dtype torch.bfloat16 or torch.float32"
                )


def split(tokens: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Whole chunks (..., t // S, Hkv, 2, S, D) of tokens (..., Hkv, 2, t, D), and the tail (..., Hkv, 2, t % S, D)."""
    whole = tokens.shape[-2] // chunk_size
    chunks = tokens[..., : whole * chunk_size, :].unflatten(-2, (whole, chunk_size))
    return chunks.movedim(-3, -5), tokens[..., whole * chunk_size :, :]


def mean_keys(chunks: Tensor, lengths: Tensor) -> Tensor:
    """Mean of the real keys of every chunk, before any rounding to the storage dtype.

    Args:
        chunks: (M, Hkv, 2, S, D) with zeros behind the real tokens, at least float32.
        lengths: (M,) real tokens per chunk, at least 1.

    Returns:
        (M, Hkv, D).
    """
    keys = chunks[:, :, 0]
    total = keys[:, :, 0].clone()
    # token by token, not by sum(): its order of adding depends on the shape, and adding in parts must equal adding
    # at once to the last bit
    for token in range(1, keys.shape[2]):
        total += keys[:, :, token]
    return total / lengths[:, None, None].to(total.dtype)
