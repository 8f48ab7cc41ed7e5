"""What the hard suites share: a model that costs nothing, small stores, and all that can be read of one, to compare."""

import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from longmem.store import MemoryStore
from longmem.store.bank import read_held
from longmem.store.catalog import Selection
from longmem.store.disk import StoredChunks, until_found
from longmem.types import AttentionKV

SEGMENT = 8
BEGIN = 256
"""Token id of the beginning of a text; below are the bytes."""


class NumberModel:
    """Keys and values drawn from a table: of a token, and a little of the one before it in its segment."""

    memory_layers = (1,)
    device = torch.device("cpu")

    def __init__(self, heads: int = 2, dim: int = 4, seed: int = 0) -> None:
        self.memory_heads, self.memory_head_dim = heads, dim
        self.fingerprint = f"numbers-{heads}-{dim}-{seed}"
        backbone = SimpleNamespace(max_position_embeddings=64, model_type="numbers", _name_or_path="")
        backbone.get_text_config = lambda: backbone
        self.config = SimpleNamespace(chunk_size=2, backbone_config=backbone, backbone_name_or_path=None)
        draw = torch.Generator().manual_seed(seed)
        self.table = torch.randn(BEGIN + 1, 2, heads, dim, generator=draw)

    def accepts(self, fingerprint: str) -> bool:
        return fingerprint == self.fingerprint

    def get_input_embeddings(self) -> SimpleNamespace:
        return SimpleNamespace(weight=self.table)

    def encode(self, input_ids: Tensor) -> AttentionKV:
        """Keys and values (B, H, T, D) of segments (B, T)."""
        own = self.table[input_ids]  # (B, T, 2, Hkv, D)
        before = torch.zeros_like(own)
        before[:, 1:] = own[:, :-1]
        mixed = (own + 0.25 * before).permute(2, 0, 3, 1, 4)
        return AttentionKV(mixed[0].contiguous(), mixed[1].contiguous())


class ByteTokenizer:
    """One token per byte of ASCII text, behind a beginning."""

    is_fast, vocab_size = True, BEGIN + 1
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
    if mode == "write" and model is not None and not (path / "catalog.sqlite").exists():
        settings = {"dtype": "float32", "segment_tokens": SEGMENT, **settings}
    return MemoryStore.open(path, model=model, tokenizer=TOKENIZER, mode=mode, **settings)  # type: ignore[arg-type]


def words(seed: int, characters: int) -> str:
    """ASCII text of this length that no other seed gives."""
    draw = random.Random(seed)
    text = f"<{seed}> "
    while len(text) < characters:
        text += "".join(draw.choices("abdegiklmnoprstu", k=draw.randint(3, 8))) + " "
    return text[:characters]


def chunks_of(store: MemoryStore, namespace: str) -> dict[str, StoredChunks]:
    """The stored chunks of every document of a namespace, by its name."""
    held = until_found(lambda: read_held(store.catalog, namespace, Selection()))
    kv, keys, scales = held.stored.kv, held.stored.keys, held.stored.scales
    found = {}
    for at, document in enumerate(held.documents):
        some = held.records[held.begins[at] : held.begins[at + 1]]
        found[document.name] = StoredChunks(kv[some], keys[some], None if scales is None else scales[some])
    return found


def state_of(store: MemoryStore) -> dict[str, Any]:
    """Everything that can be read of a store but the documents' numbers: token ids, text, and a hash of the chunks."""
    state: dict[str, Any] = {}
    for namespace in store.namespaces():
        chunks = chunks_of(store, namespace)
        state[namespace] = [
            {
                **vars(info),
                "id": None,
                "ids": store.token_ids(namespace, info.name).tolist(),
                "text": store.text(namespace, info.name),
                "chunks": chunks[info.name].crc(),
            }
            for info in store.documents(namespace)
        ]
    return state


def flip(file: Path, place: int) -> None:
    """Damage a byte."""
    data = bytearray(file.read_bytes())
    data[place] ^= 16
    file.write_bytes(data)


@contextmanager
def quick_folder() -> Iterator[Path]:
    """A folder in memory where the system has one: what is killed there is killed as elsewhere, but sooner."""
    memory = Path("/dev/shm")
    place = memory if memory.is_dir() and os.access(memory, os.W_OK | os.X_OK) else None
    with tempfile.TemporaryDirectory(prefix="longmem-", dir=place) as folder:
        yield Path(folder)
