"""Exact search against sorting every score."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from longmem.errors import ConfigError
from longmem.memory import MemoryBank
from longmem.memory.index import ExactIndex, FaissIndex, make_indexes
from longmem.types import AttentionKV


@settings(max_examples=60, deadline=None)
@given(
    seed=some.integers(0, 10_000),
    slots=some.integers(1, 90),
    length=some.integers(1, 9),
    heads=some.integers(1, 3),
    num=some.integers(1, 8),
    group=some.sampled_from([1, 2, 3, 8]),
    at_once=some.sampled_from([8, 64, 300, 5000]),
    key_dtype=some.sampled_from([torch.float32, torch.bfloat16]),
)
def test_exact_search_equals_a_sort_of_all_scores(seed, slots, length, heads, num, group, at_once, key_dtype):
    draw = torch.Generator().manual_seed(seed)
    queries = torch.randn(3, heads, length, 4, generator=draw)
    keys = torch.randn(2, heads, slots, 4, generator=draw).to(key_dtype)
    rows, live = [1, 0, 1], [slots, int(torch.randint(0, slots + 1, (), generator=draw)), slots // 2]
    scores, found = ExactIndex(at_once, group).search(queries, keys, rows, live, num)
    for line, (row, used) in enumerate(zip(rows, live, strict=True)):
        every = queries[line].float() @ keys[row, :, :used].float().transpose(-1, -2)
        best = every.sort(-1, descending=True).values[..., :num]
        count = best.shape[-1]
        torch.testing.assert_close(scores[line, ..., :count], best)
        again = (queries[line].float()[:, :, None] * _gathered(keys[row], found[line, ..., :count])).sum(-1)
        torch.testing.assert_close(again, best)


def _gathered(keys: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    head = torch.arange(keys.shape[0]).view(-1, 1, 1)
    return keys[head, slots].float()


def test_scratch_does_not_grow_with_the_memory(monkeypatch):
    plain, taken = torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda *size, **how: taken.append(size) or plain(*size, **how))
    for count in (1000, 50_000):
        ExactIndex(1 << 16).search(torch.randn(1, 1, 256, 4), torch.randn(1, 1, count, 4), [0], [count], 4)
    assert taken == [(1 << 16,), (1 << 16,)]


def like_text(heads: int, count: int, dim: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (1, heads, count, dim) around some topics, far from zero, and queries (1, heads, 4, dim) about them."""
    draw = torch.Generator().manual_seed(0)
    topics = torch.randn(heads, 40, dim, generator=draw)
    keys = topics[:, torch.randint(0, 40, (count,), generator=draw)] + 3.0
    asked = topics[:, torch.randint(0, 40, (4,), generator=draw)]
    return (keys + 0.3 * torch.randn(keys.shape, generator=draw))[None], asked[None]


def recall(index: FaissIndex, asked: torch.Tensor, keys: torch.Tensor, num: int = 16) -> float:
    """Share of the exact best that an index finds; its scores are checked to be inner products."""
    live = keys.shape[2]
    scores, slots = index.search(asked, keys, [0], [live], num)
    torch.testing.assert_close((asked[0][:, :, None] * _gathered(keys[0], slots[0])).sum(-1), scores[0])
    _, best = ExactIndex().search(asked, keys, [0], [live], num)
    return (slots[..., None] == best[..., None, :]).any(-1).float().mean().item()


def test_faiss_finds_nearly_all_and_keeps_up_with_changes():
    index, exact = FaissIndex(least=512, share=0.3), FaissIndex()
    keys, asked = like_text(2, 4096)
    assert recall(exact, asked, keys) == 1.0 and not exact._rows  # for it a row of 4,096 keys is short
    assert recall(index, asked, keys) > 0.9
    files = index._rows[0]
    # written over: found at once, and without building anew
    keys[0, :, 100:200] = 3 + 3 * asked[0, :, :1] + keys[0, :, 300:400] / 9
    index.written(0, torch.arange(100, 200))
    _, slots = index.search(asked[:, :, :1], keys, [0], [4096], 16)
    assert ((slots >= 100) & (slots < 200)).all() and index._rows[0] is files
    index.written(0, torch.arange(600))
    assert recall(index, asked, keys) > 0.9 and index._rows[0] is not files
    index.cleared(0)
    assert not index._rows
    first, second = make_indexes(index, 2)  # one for each layer
    assert (second.least, second.few, second.share) == (512, 8, 0.3)
    assert first is index and second._rows is not first._rows


def test_every_remembered_layer_is_searched_by_an_index_of_its_own():
    keys, asked = like_text(4, 4096)
    found = []
    for index in (FaissIndex(least=512, share=0.3), "exact"):
        bank = MemoryBank(1, 4096, 2, 16, 1, memory_layers=(1, 3), index=index)
        bank.add(AttentionKV(keys, keys))
        found.append([bank.search(asked[:, 2 * n : 2 * n + 2], 16, layer=n).chunks for n in range(2)])
    for near, exact in zip(*found, strict=True):
        assert (near[..., None] == exact[..., None, :]).any(-1).float().mean() > 0.9


def test_faiss_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match="needs faiss, which is not installed; pip install"):
        make_indexes("faiss", 1)
