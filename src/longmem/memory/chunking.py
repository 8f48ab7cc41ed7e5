"""Cut a run of tokens into chunks and average their keys.

L rows written together · Hkv key/value heads · n chunks · M chunks of all rows in one list · S tokens per chunk ·
D head_dim
"""

from __future__ import annotations

from torch import Tensor


def split(tokens: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Whole chunks, and the tail that is too short for one.

    Args:
        tokens: keys and values side by side, (L, Hkv, 2, t, D).
        chunk_size: S.

    Returns:
        chunks (L, t // S, Hkv, 2, S, D) and the tail (L, Hkv, 2, t % S, D).
    """
    whole = tokens.shape[3] // chunk_size
    lines, heads, pair, _, dim = tokens.shape
    chunks = tokens[:, :, :, : whole * chunk_size].reshape(lines, heads, pair, whole, chunk_size, dim)
    return chunks.permute(0, 3, 1, 2, 4, 5), tokens[:, :, :, whole * chunk_size :]


def mean_keys(chunks: Tensor, lengths: Tensor) -> Tensor:
    """Mean of the real keys of every chunk, before any rounding to the storage dtype.

    The sum runs token by token, so that the result does not depend on how many chunks are averaged together:
    adding in parts equals adding at once to the last bit.

    Args:
        chunks: (M, Hkv, 2, S, D) with zeros behind the real tokens, at least float32.
        lengths: (M,) real tokens per chunk, at least 1.

    Returns:
        (M, Hkv, D).
    """
    keys = chunks[:, :, 0]
    total = keys[:, :, 0].clone()
    for token in range(1, keys.shape[2]):
        total += keys[:, :, token]
    return total / lengths[:, None, None].to(total.dtype)


def real_tokens(tokens: Tensor, mask: Tensor) -> list[Tensor]:
    """Every row without its padding, left or right.

    Args:
        tokens: (L, Hkv, 2, T, D).
        mask: (L, T) bool, True at real tokens.

    Returns:
        one (Hkv, 2, t, D) per row.
    """
    return [row[:, :, keep] for row, keep in zip(tokens, mask, strict=True)]
