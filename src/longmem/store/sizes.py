"""How large a memory becomes: bytes per token and in all, from a backbone's key/value heads.

Hkv key/value heads · S tokens per chunk · D head_dim
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longmem.errors import StoreError
from longmem.store.records import Dtype, Layout

TOKENS = (65_536, 1_000_000, 10_000_000)  # the paper's memory, a shelf of books, a library
CHARACTERS_PER_TOKEN = 4.0  # of English prose, with the vocabularies of today's models


@dataclass(frozen=True)
class BackboneShape:
    """What of a backbone decides the size of its memory."""

    name: str
    layers: int  # of its decoder; memory keeps one of them
    heads_kv: int  # Hkv of the layer that is kept
    head_dim: int  # D


BACKBONES: tuple[BackboneShape, ...] = (
    BackboneShape("GPT-2 (124M)", 12, 12, 64),
    BackboneShape("GPT-2 XL (1.5B)", 48, 25, 64),
    BackboneShape("GPT-2* of the paper (407M)", 24, 16, 64),
    BackboneShape("Pythia-410M", 24, 16, 64),
    BackboneShape("Pythia-6.9B", 32, 32, 128),
    BackboneShape("SmolLM2-135M", 30, 3, 64),
    BackboneShape("Qwen2.5-0.5B", 24, 2, 64),
    BackboneShape("Qwen2.5-7B", 28, 4, 128),
    BackboneShape("Qwen3-0.6B", 28, 8, 128),
    BackboneShape("Qwen3-8B", 36, 8, 128),
    BackboneShape("Llama-2-7B", 32, 32, 128),
    BackboneShape("Llama-3.2-1B", 16, 8, 64),
    BackboneShape("Llama-3-8B", 32, 8, 128),
    BackboneShape("Llama-3-70B", 80, 8, 128),
    BackboneShape("Mistral-7B", 32, 8, 128),
    BackboneShape("Gemma-2-2B", 26, 4, 256),
    BackboneShape("Gemma-2-9B", 42, 8, 256),
    BackboneShape("Phi-3-mini (3.8B)", 32, 32, 96),
)  # as their published configurations have it


@dataclass(frozen=True)
class MemorySize:
    """Bytes per token of one backbone's memory in one number format.

    The short chunk at the end of a document takes the room of a whole one.
    """

    backbone: BackboneShape
    chunk_size: int  # S
    dtype: Dtype  # of the stored keys and values
    keys_values: float  # in the data files; read only for the chunks that a search finds
    chunk_keys: float  # mean keys of the chunks, float32: what a search reads, and what an open bank holds
    small: float  # with int8, the scales
    catalog: float  # an estimate: token ids, where each token begins, and the text
    cache: float  # for comparison, the backbone's ordinary cache of all layers in 16 bits

    @property
    def disk(self) -> float:
        """On disk, in all."""
        return self.keys_values + self.chunk_keys + self.small + self.catalog

    def disk_bytes(self, tokens: int) -> int:
        """On disk for so many tokens."""
        return round(self.disk * tokens)


def memory_size(backbone: BackboneShape, *, dtype: Dtype = "float16", chunk_size: int = 4) -> MemorySize:
    """Bytes that a token of this backbone takes.

    Raises:
        StoreError: a number that is not at least 1.
    """
    heads, dim = backbone.heads_kv, backbone.head_dim
    numbers = {"heads_kv": heads, "head_dim": dim, "layers": backbone.layers, "chunk_size": chunk_size}
    for name, number in numbers.items():
        if number < 1:
            raise StoreError(f"{name} ({number}) must be at least 1")
    layout = Layout("", "", backbone.name, (0,), heads, dim, chunk_size, chunk_size, dtype, created=0.0)
    keys = 4 * heads * dim
    return MemorySize(
        backbone,
        chunk_size,
        dtype,
        keys_values=layout.record_bytes / chunk_size,
        chunk_keys=keys / chunk_size,
        small=(layout.key_bytes - keys) / chunk_size,
        catalog=4 + 4 + CHARACTERS_PER_TOKEN,
        cache=backbone.layers * 2 * 2.0 * heads * dim,
    )


def size_table(
    backbones: Sequence[BackboneShape] = BACKBONES, *, chunk_size: int = 4, tokens: Sequence[int] = TOKENS
) -> tuple[list[str], list[list[str]]]:
    """The sizes in words: column heads, and a row for every backbone; on disk in fp16 and in int8."""
    heads = ["backbone", "KV heads", "fp16/token", "int8/token", "chunk keys/token", "full cache/token"]
    heads += [f"{short_count(count)} tokens" for count in tokens]
    rows = []
    for backbone in backbones:
        half, small = (memory_size(backbone, chunk_size=chunk_size, dtype=dtype) for dtype in ("float16", "int8"))
        row = [backbone.name, f"{backbone.heads_kv} x {backbone.head_dim}"]
        row += [in_bytes(each) for each in (half.keys_values, small.keys_values, half.chunk_keys, half.cache)]
        row += [f"{in_bytes(half.disk_bytes(n))} / {in_bytes(small.disk_bytes(n))}" for n in tokens]
        rows.append(row)
    return heads, rows


def in_bytes(number: float) -> str:
    """``4.0 KiB``, ``3.8 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def short_count(count: int) -> str:
    """``10M``, ``65,536``."""
    for size, letter in ((1_000_000, "M"), (1000, "k")):
        if count >= size and count % size == 0:
            return f"{count // size:,}{letter}"
    return f"{count:,}"
