"""What the hard suites share: a model that costs nothing, small stores, and all that can be read of one, to compare."""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longmem.errors import StoreError
from longmem.store import MemoryStore
from longmem.store.catalog import unfinished
from longmem.store.encode import Encoder
from longmem.store.places import until_found
from longmem.store.precision import StoredChunks
from longmem.store.reading import ChunkTable, read_chunks
from longmem.store.segments import DataFile
from longmem.types import AttentionKV

SEGMENT = 8
BEGIN = 256
"""Token id of the beginning of a text; below are the bytes."""


class NumberModel:
    """Keys and values drawn from a table: of a token, and a little of the one before it in its segment."""

    memory_layer = 1
    device = torch.device("cpu")

    def __init__(self, heads: int = 2, dim: int = 4, seed: int = 0) -> None:
        self.memory_heads, self.memory_head_dim = heads, dim
        self.fingerprint = f"numbers-{heads}-{dim}-{seed}"
        self.config = SimpleNamespace(chunk_size=2, max_position_embeddings=64, _name_or_path="numbers")
        draw = torch.Generator().manual_seed(seed)
        self.table = torch.randn(BEGIN + 1, 2, heads, dim, generator=draw)

    def encode(self, input_ids: Tensor) -> AttentionKV:
        """See ``Encodes.encode``."""
        own = self.table[input_ids]  # (B, T, 2, Hkv, D)
        before = torch.zeros_like(own)
        before[:, 1:] = own[:, :-1]
        mixed = (own + 0.25 * before).permute(2, 0, 3, 1, 4)
        return AttentionKV(mixed[0].contiguous(), mixed[1].contiguous())


class ByteTokenizer:
    """One token per byte of ASCII text, behind a beginning."""

    is_fast = True
    bos_token_id = BEGIN

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[Any]]:
        ids = list(text.encode("ascii"))
        return {
            "input_ids": [BEGIN, *ids] if add_special_tokens else ids,
            "offset_mapping": [(at, at + 1) for at in range(len(ids))],
        }

    def decode(self, ids: Sequence[int]) -> str:
        """The inverse."""
        return bytes(each for each in ids if each < BEGIN).decode("ascii")


MODEL = NumberModel()
TOKENIZER = ByteTokenizer()


def open_small(path: Path, *, mode: str = "write", model: NumberModel | None = MODEL, **settings: Any) -> MemoryStore:
    """A store of the small model, with short segments where it is new."""
    if mode == "write" and model is not None and is_new(path):
        settings = {"dtype": "float32", "segment_tokens": SEGMENT, **settings}
    return MemoryStore.open(path, model=model, tokenizer=TOKENIZER, mode=mode, **settings)  # type: ignore[arg-type]


def is_new(path: Path) -> bool:
    """Whether a store is still to be made, or was killed while it was made."""
    catalog = path / "catalog.sqlite"
    try:
        # what is larger has tables, or cannot be read
        return not catalog.exists() or (catalog.stat().st_size <= 4096 and unfinished(path))
    except StoreError:
        return False


def words(seed: int, characters: int) -> str:
    """ASCII text of this length that no other seed gives."""
    draw = random.Random(seed)
    text = f"<{seed}> "
    while len(text) < characters:
        text += "".join(draw.choices("abdegiklmnoprstu", k=draw.randint(3, 8))) + " "
    return text[:characters]


def chunks_of(store: MemoryStore, namespace: str, now: float | None = None) -> Iterator[tuple[str, int, StoredChunks]]:
    """Name, first token and stored chunks of every run of a namespace's documents."""

    def read() -> tuple[ChunkTable, list[DataFile]]:
        with store.snapshot() as snapshot:
            table = read_chunks(snapshot, namespace, now=now)
        return table, [store.data_file(row) for row in table.files]

    table, files = until_found(read)
    for run in range(len(table.chunks)):
        first = int(table.first_chunk[run])
        chunks = files[table.file[run]].chunks(first, first + int(table.chunks[run]))
        yield table.documents[table.document[run]].name, int(table.first_token[run]), chunks


def state_of(store: MemoryStore) -> dict[str, Any]:
    """Everything that can be read of a store: documents, their token ids, text, and a hash of their chunks."""
    state: dict[str, Any] = {}
    for namespace in store.namespaces():
        digests: dict[str, Any] = {}
        for name, first_token, chunks in chunks_of(store, namespace):
            digest = digests.setdefault(name, hashlib.sha256())
            digest.update(first_token.to_bytes(8, "little"))
            for array in (chunks.kv, chunks.keys, chunks.lengths, chunks.scales):
                digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
        state[namespace] = [
            {
                **vars(info),
                "ids": store.token_ids(namespace, info.name).tolist(),
                "text": store.text(namespace, info.name),
                "chunks": digests[info.name].hexdigest(),
            }
            for info in store.documents(namespace)
        ]
    return state


def expected_chunks(store: MemoryStore, model: NumberModel, ids: Sequence[int]) -> StoredChunks:
    """What a document of these token ids leaves in memory, encoded anew."""
    encoder = Encoder(model, store.layout)
    ((_, chunks),) = encoder.encode([np.array(ids, dtype=np.uint32)])
    return chunks


@contextmanager
def quick_folder() -> Iterator[Path]:
    """A folder in memory where the system has one: what is killed there is killed as elsewhere, but sooner."""
    memory = Path("/dev/shm")
    place = memory if memory.is_dir() and os.access(memory, os.W_OK | os.X_OK) else None
    with tempfile.TemporaryDirectory(prefix="longmem-", dir=place) as folder:
        yield Path(folder)
