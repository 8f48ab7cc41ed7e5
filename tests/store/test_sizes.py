"""The size calculator says what a store takes, and the table what the published configurations have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma2Config, GPT2Config, LlamaConfig, MistralConfig, PreTrainedConfig

from longmem import LongMem
from longmem.errors import StoreError
from longmem.store.sizes import BACKBONES, BackboneShape, in_bytes, memory_size, short_count, size_table
from longmem.store.store import MemoryStore

SHAPES = {shape.name: shape for shape in BACKBONES}


@pytest.mark.parametrize(
    ("name", "keys_values", "int8", "chunk_keys", "cache"),
    [
        ("GPT-2 (124M)", 2 * 12 * 64 * 2, 2 * 12 * 64, 12 * 64, 12 * 2 * 12 * 64 * 2),
        ("GPT-2* of the paper (407M)", 4096, 2048, 1024, 24 * 4096),
        ("Qwen2.5-0.5B", 512, 256, 128, 24 * 512),
        ("Qwen3-8B", 4096, 2048, 1024, 36 * 4096),
        ("Llama-3-8B", 4096, 2048, 1024, 32 * 4096),
        ("Mistral-7B", 4096, 2048, 1024, 32 * 4096),
        ("Gemma-2-9B", 8192, 4096, 2048, 42 * 8192),
    ],
)
def test_bytes_per_token_by_hand(name: str, keys_values: int, int8: int, chunk_keys: int, cache: int) -> None:
    half, small = memory_size(SHAPES[name]), memory_size(SHAPES[name], dtype="int8")
    assert (half.keys_values, small.keys_values, half.cache) == (keys_values, int8, cache)
    assert half.chunk_keys == small.chunk_keys == chunk_keys
    assert small.small - half.small == 2 * SHAPES[name].heads_kv  # float32 scales of keys and values, by chunk of 4


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("GPT-2 (124M)", GPT2Config()),
        ("Llama-2-7B", LlamaConfig()),
        ("Mistral-7B", MistralConfig()),
        ("Gemma-2-2B", Gemma2Config()),
    ],
)
def test_the_table_agrees_with_the_default_configurations(name: str, config: PreTrainedConfig) -> None:
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert SHAPES[name] == BackboneShape(name, config.num_hidden_layers, heads, dim)


def test_every_backbone_is_named_once() -> None:
    assert len(SHAPES) == len(BACKBONES)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_a_store_is_as_large_as_calculated(
    dtype: Any, tiny_backbone: Any, byte_tokenizer: Any, made_text: Callable[..., str], tmp_path: Path
) -> None:
    model = LongMem.from_backbone(tiny_backbone, chunk_size=4, num_retrieved=8, memory_size=64)
    with MemoryStore.open(tmp_path / "memory", model=model, tokenizer=byte_tokenizer, dtype=dtype) as store:
        store.add_document("ada", ids=[1], name="first")
    empty = (tmp_path / "memory" / "catalog.sqlite").stat().st_size
    with MemoryStore.open(tmp_path / "memory", model=model, tokenizer=byte_tokenizer) as store:
        receipt = store.add_document("ada", made_text(1500), name="long")
        stats = store.stats()
    size = memory_size(BackboneShape("tiny", 4, 4, 8), dtype=dtype, characters=1.0)
    data = (size.disk - size.catalog) * receipt.tokens
    assert stats.file_bytes == pytest.approx(data, rel=0.02)
    assert stats.stored_bytes == pytest.approx(data, rel=0.001)
    # contents of 512 tokens, a half-filled page each, and their rows come on top
    grown = (tmp_path / "memory" / "catalog.sqlite").stat().st_size - empty
    assert 0.95 < grown / (size.catalog * receipt.tokens) < 1.4


def test_sizes_in_all_follow_from_those_by_token() -> None:
    size = memory_size(SHAPES["Llama-3-8B"])
    assert size.disk == 4096 + 1024 + 1 + 14
    assert size.disk_bytes(1_000_000) == 5_135_000_000
    assert size.bank_bytes(10) == 10 * 1024
    assert size.cache_bytes(10) == 10 * 131072


def test_the_table_has_a_row_for_every_backbone_and_a_column_for_every_count() -> None:
    heads, rows = size_table(tokens=(65_536, 2_500_000))
    assert heads[-2:] == ["65,536 tokens", "2,500k tokens"]
    assert [row[0] for row in rows] == list(SHAPES)
    assert all(len(row) == len(heads) for row in rows)
    llama = dict(zip(heads, next(row for row in rows if row[0] == "Llama-3-8B"), strict=True))
    assert llama["fp16/token"] == "4.0 KiB"
    assert llama["full cache/token"] == "128.0 KiB"
    assert llama["65,536 tokens"] == "320.9 MiB / 193.9 MiB"


def test_bytes_and_counts_are_short() -> None:
    assert [in_bytes(n) for n in (0, 1023, 1024, 1 << 20, 3 << 29, 5 << 40)] == [
        "0 B", "1023 B", "1.0 KiB", "1.0 MiB", "1.5 GiB", "5.0 TiB",
    ]  # fmt: skip
    assert [short_count(n) for n in (7, 65_536, 50_000, 10_000_000)] == ["7", "65,536", "50k", "10M"]


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(StoreError, match=r"head_dim \(0\) must be at least 1"):
        memory_size(BackboneShape("none", 1, 1, 0))
    with pytest.raises(StoreError, match=r"dtype \(int4\) must be one of float32, float16, bfloat16, int8"):
        memory_size(SHAPES["Llama-3-8B"], dtype="int4")  # type: ignore[arg-type]
