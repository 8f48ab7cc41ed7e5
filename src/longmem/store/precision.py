"""Keys and values in the store's number format.

n chunks · Hkv key/value heads · S tokens per chunk · D head_dim
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longmem.errors import StoreError
from longmem.memory.chunking import mean_keys
from longmem.store.records import DTYPES, Dtype

RECORD_DIGEST = 8
"""Bytes of the hash of one stored chunk."""


@dataclass(frozen=True)
class StoredChunks:
    """Chunks as a data file holds them; bfloat16 as the 16-bit integers of its bits.

    Attributes:
        kv: (n, Hkv, 2, S, D).
        keys: (n, Hkv, D) float32, mean of the unrounded keys.
        lengths: (n,) int32, real tokens.
        scales: (n, Hkv, 2) float32 with int8: value = integer * scale; else None.
    """

    kv: NDArray[Any]
    keys: NDArray[np.float32]
    lengths: NDArray[np.int32]
    scales: NDArray[np.float32] | None

    def __len__(self) -> int:
        return len(self.lengths)

    def slice(self, start: int, stop: int) -> StoredChunks:
        """Chunks ``start`` to ``stop``."""
        scales = None if self.scales is None else self.scales[start:stop]
        return StoredChunks(self.kv[start:stop], self.keys[start:stop], self.lengths[start:stop], scales)

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        arrays = (self.kv, self.keys, self.lengths, self.scales)
        return sum(array.nbytes for array in arrays if array is not None)

    def records(self) -> bytes:
        """A hash of 8 bytes for every chunk's keys and values as stored."""
        return record_digests(self.kv)


def joined(parts: list[StoredChunks]) -> StoredChunks:
    """Runs of chunks, one behind the other."""
    if len(parts) == 1:
        return parts[0]
    scales = [part.scales for part in parts if part.scales is not None]
    return StoredChunks(
        np.concatenate([part.kv for part in parts]),
        np.concatenate([part.keys for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate(scales) if scales else None,
    )


def pack(chunks: Tensor, lengths: Tensor, dtype: Dtype) -> StoredChunks:
    """Chunks of the backbone's keys and values, rounded for the store.

    Args:
        chunks: (n, Hkv, 2, S, D) float32, zeros behind the real tokens.
        lengths: (n,) real tokens, at least 1.

    Raises:
        StoreError: a number that this format cannot hold.
    """
    keys = mean_keys(chunks, lengths)
    scales = None
    if dtype == "int8":
        rounded, scale = quantise(chunks)
        scales = scale.numpy()
    else:
        rounded = chunks.to(DTYPES[dtype][0])
    largest = torch.stack(torch.aminmax(chunks)).abs().amax() if len(chunks) else chunks.new_zeros(())
    if not bool(torch.isfinite(largest if dtype == "int8" else largest.to(DTYPES[dtype][0]))):
        raise StoreError(
            f"keys or values up to {float(largest):g} cannot be stored as {dtype}; "
            "make the store with dtype='bfloat16', which has the range of float32"
        )
    bits = rounded.view(torch.int16) if dtype == "bfloat16" else rounded
    return StoredChunks(bits.contiguous().numpy(), keys.contiguous().numpy(), lengths.to(torch.int32).numpy(), scales)


def quantise(chunks: Tensor) -> tuple[Tensor, Tensor]:
    """Integers in -127..127 (n, Hkv, 2, S, D), and a scale for each chunk, head, and key or value (n, Hkv, 2)."""
    largest = chunks.abs().amax(dim=(3, 4))
    scales = torch.where(largest > 0, largest / 127.0, torch.ones_like(largest))
    integers = torch.round(chunks / scales[..., None, None]).clamp_(-127, 127).to(torch.int8)
    return integers, scales


def unpack(kv: NDArray[Any], scales: NDArray[np.float32] | None, stored: Dtype, wanted: torch.dtype | None) -> Tensor:
    """Keys and values (..., 2, S, D) to compute with, given their scales (..., 2) with int8.

    ``wanted`` None is the stored type, float16 for int8.
    """
    tensor = torch.from_numpy(kv)
    if stored == "int8":
        assert scales is not None
        return (tensor.to(torch.float32) * torch.from_numpy(scales)[..., None, None]).to(wanted or torch.float16)
    if stored == "bfloat16":
        tensor = tensor.view(torch.bfloat16)
    return tensor if wanted is None else tensor.to(wanted)


def record_digests(kv: NDArray[Any]) -> bytes:
    """8 bytes of BLAKE2b for every chunk of (n, Hkv, 2, S, D), one after the other."""
    lines = np.ascontiguousarray(kv).reshape(len(kv), -1).view(np.uint8)
    return b"".join(hashlib.blake2b(line.data, digest_size=RECORD_DIGEST).digest() for line in lines)
