"""What the tests of the read path share: stores of random numbers, and MemoryBanks that hold the same."""

from pathlib import Path
from typing import Any

import torch
from tests.family_table import V
from torch import Tensor

from longmem import LongMem, MemoryBank
from longmem.store.bank import StoreBank
from longmem.store.encode import Encoder
from longmem.store.store import MemoryStore
from longmem.types import AttentionKV, RetrievedMemory

SEGMENT = 8
"""Tokens that the backbone sees together when it writes."""


def ids(length: int, seed: int = 0) -> Tensor:
    """(length,) random token ids."""
    return torch.randint(3, V, (length,), generator=torch.Generator().manual_seed(seed))


def make_store(path: Path, model: LongMem, **settings: Any) -> MemoryStore:
    """An empty store with short segments."""
    return MemoryStore.open(
        path, model=model, **{"dtype": "float32", "segment_tokens": SEGMENT, "chunk_size": 2, **settings}
    )


def memory_bank(store: MemoryStore, model: LongMem, documents: list[tuple[str, Tensor]]) -> MemoryBank:
    """What a MemoryBank holds of these documents, encoded as the store encodes them."""
    encoder = Encoder(model, store.layout)
    bank = MemoryBank.for_model(model, rows=1, capacity_tokens=4096, chunk_size=store.layout.chunk_size)
    for name, tokens in documents:
        chunks = encoder.encode([tokens.numpy().astype("uint32")])[0]
        kv = torch.from_numpy(chunks.kv)  # (n, Hkv, 2, S, D)
        pair = kv.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : len(tokens)]
        bank.add(AttentionKV(pair[None, :, 0], pair[None, :, 1]), documents=[name], time=0.0)
        bank.end_document()
    return bank


def queries(bank: Any, rows: int = 1, length: int = 3, heads: int = 4, seed: int = 9) -> Tensor:
    """(rows, heads, length, D)."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, heads, length, bank.head_dim, generator=draw)


def same(first: RetrievedMemory, second: RetrievedMemory) -> None:
    """Two searches found the same, to the last bit."""
    assert torch.equal(first.mask, second.mask)
    assert torch.equal(first.scores, second.scores)
    assert torch.equal(first.chunks, second.chunks)
    assert torch.equal(*(each.period[..., None] > each.period[..., None, :] for each in (first, second)))
    assert torch.equal(first.keys * first.mask[..., None], second.keys * second.mask[..., None])
    assert torch.equal(first.values * first.mask[..., None], second.values * second.mask[..., None])


def found_names(bank: StoreBank) -> set[str]:
    """Documents that anything can be found of."""
    found = bank.search(queries(bank), 500).chunks
    return {bank.provenance(0, chunk).document for chunk in found[found >= 0].unique().tolist()}
