"""What an index finds in a store: measured on the model's own queries over the stored keys, never on random ones.

H query heads · Hkv key/value heads · D head_dim · T segment tokens · Q queries · n chunks
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from longmem.errors import StoreError
from longmem.memory.bank import MemoryBank
from longmem.memory.recall import RecallReport, measure_recall
from longmem.store.pieces import Ids, Tokens, tokens_of
from longmem.store.places import until_found
from longmem.store.reading import ChunkTable, read_chunks
from longmem.types import ChunkOrigin, RetrievedMemory

if TYPE_CHECKING:
    from longmem.store.store import MemoryStore

QUERY_TOKENS = 1024
"""Tokens that ask: half are heard as a prompt, of the other half ``measure_recall`` takes up to 256."""


def store_recall(
    store: MemoryStore, namespace: str, indexes: Sequence[str], *, text: str | None = None, tokens: int = QUERY_TOKENS
) -> list[RecallReport]:
    """Compare indexes with exact search over the chunks of a namespace, each head's queries being the model's own.

    Args:
        store: opened with its model.
        indexes: names, see ``make_index``.
        text: whose tokens ask; None takes segments of the stored documents, evenly spaced.
        tokens: most tokens that ask.

    Raises:
        StoreError: no model, nothing stored, or an empty text.
        ConfigError: there is no index of a name, or it is not installed.
        MemoryBankError: too few chunks or tokens for a measurement.
    """
    model: Any = store.model
    if model is None:
        raise StoreError("measuring recall needs the model: MemoryStore.open(path, model=...)")
    keys = until_found(lambda: _stored_keys(store, namespace)).to(model.device)
    segments = _stored_segments(store, namespace, tokens) if text is None else _segments_of(store, text, tokens)
    queries = real_queries(model, segments, store.layout.chunk_size)
    num = max(1, model.config.num_retrieved // store.layout.chunk_size)
    return [measure_recall(index, keys, queries, min(num, keys.shape[1])) for index in indexes]


@torch.no_grad()
def real_queries(model: Any, segments: Sequence[Ids], chunk_size: int) -> Tensor:
    """(H, Q, D) float32: what the model asks of a memory while it reads these segments, each alone."""
    overheard = _Overheard(model, chunk_size)
    training = model.training
    model.train(False)
    try:
        for ids in segments:
            row = torch.from_numpy(ids.astype(np.int64))[None].to(model.device)
            model(row, memory=overheard, logits_to_keep=1, use_cache=False)
    finally:
        model.train(training)
    return torch.cat(overheard.asked, dim=1)


class _Overheard:
    """A memory that finds nothing and keeps what it is asked."""

    def __init__(self, model: Any, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        self.asked: list[Tensor] = []
        self._empty = MemoryBank.for_model(model, 1, chunk_size, chunk_size=chunk_size)

    def search(self, queries: Tensor, num_chunks: int, rows: Tensor | None = None) -> RetrievedMemory:
        """Nothing."""
        self.asked.append(queries[0].float())
        return self._empty.search(queries, num_chunks, rows)

    def provenance(self, row: int, chunk: int) -> ChunkOrigin:
        """Of nothing."""
        return self._empty.provenance(row, chunk)


def _table(store: MemoryStore, namespace: str) -> ChunkTable:
    with store.snapshot() as snapshot:
        table = read_chunks(snapshot, namespace)
    if not table.num_chunks:
        raise StoreError(
            f"namespace {namespace!r} holds nothing to measure on; `longmem memory list` shows what there is"
        )
    return table


def _stored_keys(store: MemoryStore, namespace: str) -> Tensor:
    """(Hkv, n, D) mean keys of a namespace's chunks."""
    table = _table(store, namespace)
    files = [store.data_file(row) for row in table.files]
    runs = zip(table.file.tolist(), table.first_chunk.tolist(), table.chunks.tolist(), strict=True)
    return (
        torch.cat([files[file].keys(first, first + count) for file, first, count in runs]).transpose(0, 1).contiguous()
    )


def _stored_segments(store: MemoryStore, namespace: str, tokens: int) -> list[Ids]:
    """Segments of the documents, evenly spaced."""
    size, table = store.layout.segment_tokens, _table(store, namespace)
    counts = -(-table.tokens // size)
    wanted = min(int(counts.sum()), -(-tokens // size))
    picked = np.arange(wanted) * int(counts.sum()) // wanted
    runs = np.searchsorted(np.cumsum(counts), picked, side="right")
    inside = picked - (np.cumsum(counts) - counts)[runs]
    found = []
    with store.snapshot() as snapshot:
        for run, number in zip(runs.tolist(), inside.tolist(), strict=True):
            ids = Tokens.from_row(snapshot.text(int(table.content[run]))).ids[: int(table.tokens[run])]
            found.append(ids[number * size : (number + 1) * size])
    return found


def _segments_of(store: MemoryStore, text: str, tokens: int) -> list[Ids]:
    ids = tokens_of("the text that asks", text, None, store.tokenizer, begin=True).ids[:tokens]
    size = store.layout.segment_tokens
    return [ids[start : start + size] for start in range(0, len(ids), size)]
