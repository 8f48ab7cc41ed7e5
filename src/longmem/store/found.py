"""What a bank's search found, ready to be attended to.

B batch rows · T tokens · H query heads · Hkv key/value heads · D head_dim · S tokens per chunk · R retrieved chunks ·
N chunks of all rows · P pairs of a chunk and a key/value head that were found
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from longmem.store.places import Places
from longmem.store.values import Values
from longmem.types import RetrievedMemory


class Hits(NamedTuple):
    """The best chunks of every query.

    Attributes:
        scores: (B, H, T, R) float32, 0 where masked.
        numbers: (B, H, T, R) long, chunk numbers in the row that was read.
        mask: (B, H, T, R) bool, False where fewer chunks exist.
        rows: the bank row of each of the B batch rows.
    """

    scores: Tensor
    numbers: Tensor
    mask: Tensor
    rows: list[int]


def gathered(places: Places, values: Values, hits: Hits, version: Callable[[], int]) -> RetrievedMemory:
    """The chunks that were found: by reference if all lie on the device, else in a small storage of their own."""
    device = hits.numbers.device
    bases = torch.from_numpy(places.bases[hits.rows]).to(device)
    chunks = hits.numbers + bases.view(-1, 1, 1, 1)
    whole = values.whole
    if whole is None:
        return _packed(places, values, hits, chunks, version())
    return RetrievedMemory(
        chunk_ids=chunks.masked_fill_(~hits.mask, places.num_chunks),
        chunk_mask=hits.mask,
        scores=hits.scores,
        storage=whole.kv[None],
        lengths=whole.lengths[None],
        rows=torch.zeros(len(hits.rows), dtype=torch.long, device=device),
        version=version(),
        live_version=version,
        sources=whole.sources[None],
        memory_rows=torch.tensor(hits.rows, device=device),
    )


def _packed(places: Places, values: Values, hits: Hits, chunks: Tensor, version: int) -> RetrievedMemory:
    """Each pair of a chunk and a key/value head once, as storage (1, P + 1, 1, 2, S, D) with the null chunk last.

    A head reads only its own part of a chunk: storing heads apart takes Hkv times fewer bytes from disk.
    """
    device, heads_kv = chunks.device, places.layout.heads_kv
    group = chunks.shape[1] // heads_kv
    head = torch.arange(chunks.shape[1], device=device) // group
    asked = (chunks * heads_kv + head.view(1, -1, 1, 1))[hits.mask]
    pairs, slots = torch.unique(asked, return_inverse=True)
    found, heads = (each.cpu().numpy() for each in (pairs // heads_kv, pairs % heads_kv))
    storage = values.take(found, heads)
    lengths = torch.zeros(1, len(found) + 1, dtype=torch.long)
    sources = torch.full((1, len(found) + 1), -1)
    lengths[0, :-1] = torch.from_numpy(places.lengths(found))
    sources[0, :-1] = torch.from_numpy(places.in_rows(found))
    return RetrievedMemory(
        chunk_ids=torch.full_like(chunks, len(found)).masked_scatter_(hits.mask, slots),
        chunk_mask=hits.mask,
        scores=hits.scores,
        storage=storage[None, :, None],
        lengths=lengths.to(device),
        rows=torch.zeros(len(hits.rows), dtype=torch.long, device=device),
        version=version,
        live_version=lambda: version,  # a copy: nobody writes to it
        sources=sources.to(device),
        memory_rows=torch.tensor(hits.rows, device=device),
    )
