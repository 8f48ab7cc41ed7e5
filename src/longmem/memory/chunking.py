"""From tokens to chunks: cutting, mean keys, and the numbers that memory refuses.

L rows written together · Hkv key/value heads of all remembered layers · n chunks · S tokens per chunk · D head_dim
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longmem.errors import MemoryBankError
from longmem.types import AttentionKV


def joined(kv: AttentionKV, heads: int, head_dim: int) -> Tensor:
    """Keys and values next to each other, (B, Hkv, 2, T, D), as they came and without gradient.

    Raises:
        MemoryBankError: shapes do not fit each other or this memory.
    """
    if kv.keys.dim() != 4 or (kv.keys.shape[1], kv.keys.shape[3]) != (heads, head_dim):
        shape = tuple(kv.keys.shape)
        raise MemoryBankError(f"keys {shape} must be (B, {heads}, T, {head_dim}), as this bank was made for")
    if kv.values.shape != kv.keys.shape:
        raise MemoryBankError(f"values {tuple(kv.values.shape)} must have the shape of keys {tuple(kv.keys.shape)}")
    rows_tokens = (kv.keys.shape[0], kv.keys.shape[2])
    if kv.mask is not None and kv.mask.shape != rows_tokens:
        raise MemoryBankError(f"mask {tuple(kv.mask.shape)} must be {rows_tokens}: rows and tokens of the keys")
    return torch.stack((kv.keys.detach(), kv.values.detach()), dim=2)


def refuse_unfit(
    pair: Tensor, mask: Tensor | None, dtype: torch.dtype, key_dtype: torch.dtype, chunk_size: int
) -> None:
    """Refuse numbers that memory cannot hold: one of them would make every later answer NaN.

    Args:
        pair: keys and values (B, Hkv, 2, T, D), to be stored as ``dtype``, their means as ``key_dtype``.
        mask: (B, T) bool, True at real tokens; padding may hold anything.

    Raises:
        MemoryBankError: names the row and the largest number.
    """
    if mask is not None and not bool(mask.all()):
        pair = pair.masked_fill(~mask.to(pair.device, torch.bool)[:, None, None, :, None], 0.0)
    if not pair.numel():
        return
    most = torch.finfo(torch.float32).max / chunk_size  # S keys are added up in float32 for their mean
    limit = min(torch.finfo(dtype).max, torch.finfo(key_dtype).max, most)
    low, high = torch.aminmax(pair)
    if -low.item() <= limit and high.item() <= limit:  # NaN is below no limit
        return
    largest = pair.abs().amax(dim=(1, 3, 4)).double().cpu()  # (B, 2)
    for which, name in enumerate(("keys", "values")):
        for row, number in enumerate(largest[:, which].tolist()):
            if not math.isfinite(number):
                raise MemoryBankError(
                    f"{name} of row {row} are not finite (they hold {'nan' if math.isnan(number) else 'inf'}); "
                    "look for the overflow in the model, or run it in float32 or bfloat16"
                )
            for kind in (dtype,) if which else (dtype, key_dtype):
                if not torch.tensor(number, dtype=torch.float64).to(kind).isfinite():
                    raise MemoryBankError(
                        f"{name} of row {row} reach {number:.3g}, more than {kind} holds "
                        f"({torch.finfo(kind).max:.3g}); make the bank with dtype=torch.bfloat16 or torch.float32"
                    )
            if not which and number > most:
                raise MemoryBankError(
                    f"keys of row {row} reach {number:.3g}, more than torch.float32 holds when {chunk_size} are added; "
                    "look for the overflow in the model"
                )


def split(tokens: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Whole chunks (L, t // S, Hkv, 2, S, D) of tokens (L, Hkv, 2, t, D), and the tail (L, Hkv, 2, t % S, D)."""
    whole = tokens.shape[3] // chunk_size
    chunks = tokens[:, :, :, : whole * chunk_size].unflatten(3, (whole, chunk_size))
    return chunks.permute(0, 3, 1, 2, 4, 5), tokens[:, :, :, whole * chunk_size :]


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
