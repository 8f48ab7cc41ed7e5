"""Exact search against sorting every score."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from longmem.memory import ExactIndex


def everything_sorted(queries: torch.Tensor, keys: torch.Tensor, rows: list[int], live: list[int], num: int):
    """Per line, the best min(num, live) scores and their slots, by a plain sort."""
    answers = []
    for line, (row, used) in enumerate(zip(rows, live, strict=True)):
        scores = queries[line].float() @ keys[row, :, :used].float().transpose(-1, -2)
        ordered = scores.sort(-1, descending=True)
        answers.append((ordered.values[..., :num], ordered.indices[..., :num]))
    return answers


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
    for line, (best, _) in enumerate(everything_sorted(queries, keys, rows, live, num)):
        count = best.shape[-1]
        torch.testing.assert_close(scores[line, ..., :count], best)
        clear = (best[..., :-1] - best[..., 1:] > 1e-5).all() if count > 1 else torch.tensor(True)
        if clear and count == min(num, live[line]):
            again = (queries[line].float()[:, :, None] * _gathered(keys[rows[line]], found[line, ..., :count])).sum(-1)
            torch.testing.assert_close(again, best)


def _gathered(keys: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    head = torch.arange(keys.shape[0]).view(-1, 1, 1)
    return keys[head, slots].float()


@pytest.mark.parametrize("count", [2049, 4000, 16384])
def test_group_maxima_lose_nothing_on_long_memories(count):
    draw = torch.Generator().manual_seed(count)
    queries, keys = torch.randn(1, 2, 50, 8, generator=draw), torch.randn(1, 2, count, 8, generator=draw)
    scores, slots = ExactIndex().search(queries, keys, [0], [count], 16)
    ((best, where),) = everything_sorted(queries, keys, [0], [count], 16)
    torch.testing.assert_close(scores[0], best)
    assert (slots[0] == where).float().mean() > 0.999  # but for ties within rounding


def test_scratch_does_not_grow_with_the_memory():
    taken: list[int] = []
    plain = torch.empty

    def watch(*size, **kwargs):
        made = plain(*size, **kwargs)
        taken.append(made.numel())
        return made

    queries = torch.randn(1, 1, 256, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", watch)
        for count in (1000, 50_000):
            ExactIndex(1 << 16).search(queries, torch.randn(1, 1, count, 4), [0], [count], 4)
    assert taken == [1 << 16, 1 << 16]
