"""Chunk keys and queries of a trained pair over real text, kept in a file outside of the repository.

Of every ``HELD`` segments of a document one is not stored: its tokens ask. So the queries come from other text of the
very documents that memory holds, as in use, and no query meets its own tokens.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longmem.data import load_tokenizer, read_documents
from longmem.errors import DataError
from longmem.memory import MemoryBank
from longmem.memory.chunking import mean_keys, split
from longmem.types import RetrievedMemory

HELD = 16


def collect(model_path: str, texts: Sequence[str], tokens: int, out: Path, batch: int = 16) -> dict[str, Any]:
    """Encode ``tokens`` tokens of the texts; the record is written to ``out`` and read back from there the next time.

    Returns:
        keys (Hkv, n, D) float32, the mean key of every chunk in order; queries (Q, H, T, D), one held-back segment
        each; before (Q,) how many chunks of the stream stood in memory before each of them; chunk_size, documents,
        fingerprint, tokens_per_second.
    """
    from longmem import LongMem

    model: Any = LongMem.from_pretrained(model_path)
    wanted = {"fingerprint": _digest(model), "texts": [Path(text).name for text in texts], "tokens": tokens}
    if out.is_file():
        kept: dict[str, Any] = torch.load(out)
        if all(kept.get(name) == value for name, value in wanted.items()):
            return kept
    window = int(model.config.backbone_config.max_position_embeddings)
    size = int(model.config.chunk_size)
    tokenizer = load_tokenizer(str(Path(model_path)))
    keys: list[Tensor] = []
    asked: list[Tensor] = []
    before: list[int] = []
    names: list[str] = []
    stored, began = 0, time.perf_counter()
    waiting: list[Tensor] = []
    for name, number, ids in _segments(texts, tokenizer, window):
        if stored >= tokens and not waiting:
            break
        if name not in names:
            names.append(name)
        if number % HELD == HELD - 1:
            asked.append(_queries(model, ids))
            before.append(stored // size)
            continue
        waiting.append(ids)
        stored += window
        if len(waiting) == batch or stored >= tokens:
            kv = model.encode(torch.stack(waiting))
            chunks, _ = split(torch.stack((kv.keys, kv.values), dim=2), size)
            full = torch.full(chunks.shape[:2], size)
            keys.append(mean_keys(chunks.flatten(0, 1), full.flatten()))
            waiting = []
            if len(keys) % 32 == 0:
                print(f"{stored} tokens, {stored / (time.perf_counter() - began):.0f} a second", file=sys.stderr)
    record = {
        **wanted,
        "keys": torch.cat(keys).transpose(0, 1).contiguous(),
        "queries": torch.stack(asked),
        "before": torch.tensor(before),
        "chunk_size": size,
        "documents": names,
        "model": str(model_path),
        "tokens_per_second": stored / (time.perf_counter() - began),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(record, out)
    return record


def held_back(model_path: str, texts: Sequence[str], tokens: int = 192) -> Tensor:
    """(1, tokens) ids of the first text that asks."""
    from longmem import LongMem

    model: Any = LongMem.from_pretrained(model_path)
    window = int(model.config.backbone_config.max_position_embeddings)
    tokenizer = load_tokenizer(str(Path(model_path)))
    for _, number, ids in _segments(texts, tokenizer, window):
        if number == HELD - 1:
            return ids[None, :tokens]
    raise DataError(f"{', '.join(texts)}: no document of {HELD * window} tokens")


def _segments(texts: Sequence[str], tokenizer: Any, window: int) -> Iterator[tuple[str, int, Tensor]]:
    """(document, number within it, ids (window,)); what is left at a document's end is dropped."""
    for document in read_documents(texts):
        ids = torch.tensor(tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"])
        for number in range(len(ids) // window):
            yield document.id, number, ids[number * window : (number + 1) * window]


@torch.no_grad()
def _queries(model: Any, ids: Tensor) -> Tensor:
    """(H, T, D): what the augmented layer asks memory for."""
    listener = _Listener(model)
    model(ids[None], memory=listener)
    assert listener.heard is not None
    return listener.heard[0]


class _Listener:
    """An empty memory that keeps the queries it is asked."""

    def __init__(self, model: Any) -> None:
        self.bank = MemoryBank.for_model(model, 1, model.config.chunk_size)
        self.chunk_size = self.bank.chunk_size
        self.heard: Tensor | None = None

    def search(self, queries: Tensor, num_chunks: int, rows: Tensor | None = None) -> RetrievedMemory:
        self.heard = queries.detach().clone()
        return self.bank.search(queries, num_chunks, rows)


def _digest(model: Any) -> str:
    """Of backbone and SideNet: a pair trained further asks other questions."""
    total = sum(float(each.detach().double().abs().sum()) for each in model.sidenet.parameters())
    return f"{model.fingerprint} {total:.6f}"
