"""Encoding: what a segment leaves in memory does not depend on its company, to the last bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import make_pair
from tests.family_table import V
from tests.generation.models import longmem

from longmem import LongMem, MemoryStore
from longmem.errors import StoreError
from longmem.store.encode import Encoder, new_layout


@pytest.mark.parametrize("family", ["alibi_gpt", "gpt2", "llama", "qwen3", "mixtral", "gemma2", "bloom", "gpt-neox"])
def test_a_piece_leaves_the_same_bits_in_any_company(family: str) -> None:
    model = longmem(family, chunk_size=4)
    encoder = Encoder(model, new_layout(model, "float32", 4, 24))
    draw = np.random.default_rng(0)
    pieces = [draw.integers(3, V, size).astype(np.uint32) for size in (1, 5, 16, 17, 24, 25, 100, 200, 24, 48)]
    together = encoder.encode(pieces)
    for number in (0, 3, 6, 9):
        (alone,) = encoder.encode([pieces[number]])
        assert np.array_equal(alone.kv, together[number].kv) and np.array_equal(alone.keys, together[number].keys)
    backwards = encoder.encode(pieces[::-1])
    assert all(np.array_equal(backwards[9 - number].kv, together[number].kv) for number in range(10))


def test_a_real_tokenizer_and_backbone_keep_every_character(
    tmp_path: Path, tiny_backbone: Any, byte_tokenizer: Any
) -> None:
    """Tokens that cut characters in two, at the ends of segments and pieces, too."""
    model = longmem(tiny_backbone, chunk_size=4)
    text = "na\u00efve \U0001f600\u4e2d\u6587 \r\n\t end. " * 60
    with MemoryStore.open(tmp_path / "memory", model=model, tokenizer=byte_tokenizer, segment_tokens=16) as store:
        receipt = store.add_document("alice", text, name="a")
        assert receipt.tokens == len(text.encode()) > 3 * store.layout.piece_tokens
        assert store.text("alice", "a") == text
        assert store.append("alice", text[:33], name="a").tokens == receipt.tokens + len(text[:33].encode())
        assert store.text("alice", "a") == text + text[:33]
        ids = store.token_ids("alice", "a")
        assert byte_tokenizer.decode(ids.tolist()) == text + text[:33]
        store.add_document("alice", ids=ids, name="as ids")
        assert store.text("alice", "as ids") == text + text[:33]


def test_the_tokenizer_is_found_where_a_checkpoint_names_its_backbone_from_its_own_folder(
    tmp_path: Path, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pair(tmp_path / "pair", byte_tokenizer)
    monkeypatch.chdir(tmp_path)
    for named in ("pair/sidenet", str(tmp_path / "pair" / "sidenet")):
        model = LongMem.from_pretrained(named).eval()
        with MemoryStore.open(tmp_path / named.replace("/", "-"), model=model) as store:
            assert store.add_document("alice", "hello there", name="a").tokens == 11
            # by a path that means the same from everywhere
            assert store.layout.backbone == str((tmp_path / "pair" / "backbone").resolve())
    bare = MemoryStore.open(tmp_path / "bare", model=longmem())
    with bare, pytest.raises(StoreError, match=r"the store has no fast tokenizer; open it with tokenizer="):
        bare.add_document("alice", "hello there", name="a")
