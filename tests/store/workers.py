"""What the tests of workers share: a backbone on disk, documents, and teams in which the writer encodes nothing."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.store.small import state_of

from longmem import AlibiGPTConfig, AlibiGPTForCausalLM, LongMem, MemoryStore
from longmem.store import NewDocument
from longmem.store.encode import Encoder
from longmem.store.handover import Handover
from longmem.store.serving import Dialogue, serve
from longmem.store.workers import Link, Shared


class IdTokenizer:
    """Decodes token ids to their numbers."""

    is_fast = True

    def decode(self, ids: Sequence[int]) -> str:
        """``3 17 8``."""
        return " ".join(map(str, ids))


def save_backbone(folder: Path) -> str:
    """A random backbone over 64 ids, window 32."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "max_position_embeddings": 32}
    AlibiGPTForCausalLM(AlibiGPTConfig(vocab_size=64, initializer_range=0.1, **shape)).save_pretrained(folder)
    return str(folder)


def load(backbone: str) -> LongMem:
    """A LongMem over it."""
    torch.manual_seed(1)
    return LongMem.from_backbone(backbone, chunk_size=4, num_retrieved=8, memory_size=64).eval()


def open_store(path: Path, model: Any) -> MemoryStore:
    """A store for it; pieces are 256 tokens."""
    there = (path / "catalog.sqlite").exists()
    settings: dict[str, Any] = {} if there else {"dtype": "float32", "segment_tokens": 16}
    return MemoryStore.open(path, model=model, tokenizer=IdTokenizer(), **settings)


def documents(count: int = 12) -> Iterator[NewDocument]:
    """Short and long ones; every fourth has the token ids of the one before."""
    draw = np.random.default_rng(0)
    ids = np.zeros(0)
    for number in range(count):
        if number % 4 != 3:
            ids = draw.integers(0, 64, (5, 700, 90, 0)[number % 4])
        yield NewDocument(f"{number:02}", ids=ids, time=float(number))


def add(store: MemoryStore, workers: Any, **settings: Any) -> list[tuple[str, str, int]]:
    """Add all; name, status and reused tokens of every receipt."""
    receipts = store.add_documents("alice", documents(), workers=workers, **settings)
    return [(each.name, each.status, each.reused_tokens) for each in receipts]


def contents(store: MemoryStore) -> dict[str, Any]:
    """All that can be read of it, every bit of its chunks included."""
    return state_of(store)


class Others:
    """Workers that leave nothing to the writer.

    Attributes:
        links: of all teams so far.
    """

    def __init__(self, make: Callable[[int, Handover], Link], count: int = 2) -> None:
        self._make = make
        self._count = count
        self.links: list[Any] = []

    def team(self, encoder: Encoder) -> Shared:
        """See ``Workers``."""
        handover = Handover(encoder, threads=torch.get_num_threads())
        links = [self._make(number, handover) for number in range(self._count)]
        self.links += links
        return Shared(links, None)


class _Queues:
    """A channel within this process."""

    def __init__(self, out: queue.SimpleQueue[Any], back: queue.SimpleQueue[Any]) -> None:
        self._out, self._back = out, back

    def send(self, message: object) -> None:
        self._out.put(message)

    def receive(self) -> Any:
        message = self._back.get()
        if message is None:
            raise EOFError
        return message


class ThreadLink:
    """A worker that is a thread; it serves as one in another process does."""

    def __init__(self, number: int, handover: Handover) -> None:
        there: queue.SimpleQueue[Any] = queue.SimpleQueue()
        back: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._there, self._back, self._handover = there, back, handover
        self._dialogue = Dialogue(_Queues(there, back))
        self._thread = threading.Thread(target=serve, args=(_Queues(back, there),), daemon=True)
        self._thread.start()
        self.most = self._given = 0

    def open(self) -> None:
        self._dialogue.load(self._handover.recipes("cpu"))

    def send(self, pieces: list[Any]) -> None:
        self._given += 1
        self.most = max(self.most, self._given)
        self._dialogue.encode(pieces)

    def receive(self) -> Any:
        piece = self._dialogue.piece()
        self._given -= piece is None
        return piece

    def stop(self) -> None:
        self._there.put(None)
        self._back.put(None)

    def close(self) -> None:
        self.stop()
        self._thread.join()
