"""Searches that read a part of the keys: exact where they read all, in step with changes, and nearly exact else."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from longmem.errors import ConfigError, MemoryBankError
from longmem.memory import ExactIndex, MemoryBank, make_index
from longmem.memory.blocks import LEAST, PARTS, Blocks, _sizes, felt_distance, like_together
from longmem.memory.partial import PartialIndex
from longmem.memory.recall import measure_recall
from longmem.types import AttentionKV

# reads every block, of however few keys, from the first query on
everything = partial(PartialIndex, Blocks, recall=1.0, worth=1.0, least=1, enough=1, few=1000)
a_part = partial(PartialIndex, Blocks, least=1, enough=8, worth=1.0)


def lists(**given: object) -> PartialIndex:
    pytest.importorskip("faiss")
    from longmem.memory.faiss_index import faiss_index

    return faiss_index(least=1, enough=8, worth=1.0, **given)


def like_a_model(heads: int, count: int, dim: int, seed: int = 0, heard: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (heads, count, dim) around some topics, far from zero, and queries (heads, heard, dim) off to one side."""
    draw = torch.Generator().manual_seed(seed)
    topics = torch.randn(heads, 40, dim, generator=draw)
    which = torch.randint(0, 40, (count,), generator=draw)
    keys = topics[:, which] + 0.3 * torch.randn(heads, count, dim, generator=draw) + 3.0
    asked = topics[:, torch.randint(0, 40, (heard,), generator=draw)] + 0.3 * torch.randn(
        heads, heard, dim, generator=draw
    )
    return keys, asked + torch.randn(heads, 1, dim, generator=draw)


def exactly(queries: torch.Tensor, keys: torch.Tensor, rows: list[int], live: list[int], num: int):
    return ExactIndex().search(queries, keys, rows, live, num)


def assert_same_search(index, queries: torch.Tensor, keys: torch.Tensor, rows: list[int], live: list[int], num: int):
    scores, slots = index.search(queries, keys, rows, live, num)
    best, _ = exactly(queries, keys, rows, live, num)
    for line, (row, used) in enumerate(zip(rows, live, strict=True)):
        count = min(num, used)
        torch.testing.assert_close(scores[line, ..., :count], best[line, ..., :count], atol=1e-4, rtol=1e-4)
        found = slots[line, ..., :count]
        assert int(found.max()) < used
        head = torch.arange(keys.shape[1]).view(-1, 1, 1)
        again = (queries[line].float()[:, :, None] * keys[row].float()[head, found]).sum(-1)
        torch.testing.assert_close(again, scores[line, ..., :count], atol=1e-4, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    seed=some.integers(0, 10_000),
    count=some.integers(1, 700),
    length=some.integers(1, 5),
    heads=some.integers(1, 3),
    num=some.integers(1, 8),
    dtype=some.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_where_every_block_is_read_the_search_is_exact(seed, count, length, heads, num, dtype):
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, heads, count, 4, generator=draw).to(dtype)
    queries = torch.randn(3, heads, length, 4, generator=draw)
    assert_same_search(everything(), queries, keys, [1, 0, 1], [count, (count + 1) // 2, count], num)


@settings(max_examples=60, deadline=None)
@given(seed=some.integers(0, 100_000), steps=some.lists(some.sampled_from("awkcs"), min_size=3, max_size=25))
def test_the_structure_stays_in_step_with_what_is_written_overwritten_taken_out_and_cleared(seed, steps):
    draw = torch.Generator().manual_seed(seed)

    def upto(most: int) -> int:
        return int(torch.randint(0, most, (), generator=draw)) + 1

    capacity, index = 600, everything()
    keys, live = torch.zeros(1, 2, capacity, 4), 0

    def write(slots: torch.Tensor) -> None:
        keys[0, :, slots] = torch.randn(2, len(slots), 4, generator=draw)
        index.written(keys, torch.zeros_like(slots), slots)

    for step in ["a", *steps, "s"]:
        if step == "a" and live < capacity:
            more = min(upto(400), capacity - live)
            write(torch.arange(live, live + more))
            live += more
        elif step == "w" and live:
            write(torch.randperm(live, generator=draw)[: upto(live)])
        elif step == "k" and live:
            stay = torch.randperm(live, generator=draw)[: upto(live)].sort().values
            keys[0, :, : len(stay)] = keys[0][:, stay]
            keys[0, :, len(stay) :] = 1000.0  # would win, were it still searched
            live = len(stay)
            index.kept(0, stay)
        elif step == "c":
            keys[:], live = 1000.0, 0
            index.cleared(torch.tensor([0]))
        if live:
            assert_same_search(index, torch.randn(1, 2, 2, 4, generator=draw), keys, [0], [live], 5)


@pytest.mark.parametrize("eviction", ["oldest", "released"])
def test_a_bank_that_evicts_finds_the_same_by_blocks_as_exactly(eviction):
    draw = torch.Generator().manual_seed(0)
    banks = [
        MemoryBank(1, 1200, 2, 4, 4, index=index, shared=True, eviction=eviction)
        for index in (everything(), ExactIndex())
    ]
    for _ in range(12):
        kv = AttentionKV(*torch.randn(2, 1, 2, 180, 4, generator=draw))
        queries = torch.randn(1, 2, 3, 4, generator=draw)
        for bank in banks:
            bank.add(kv)
        one, other = (bank.search(queries, 6) for bank in banks)
        torch.testing.assert_close(one.scores, other.scores, atol=1e-4, rtol=1e-4)
        assert torch.equal(one.chunk_ids, other.chunk_ids)


@pytest.mark.parametrize("make", [a_part, lists])
def test_a_part_of_the_keys_has_nearly_all_of_the_best(make):
    keys, queries = like_a_model(2, 8000, 16, heard=300)
    index = make()
    index.search(queries[None, :, :200], keys[None], [0], [8000], 16)  # as a prompt would
    found = hits = 0
    for at in range(200, 300):
        asked = queries[None, :, at : at + 1]
        scores, slots = index.search(asked, keys[None], [0], [8000], 16)
        _, best = exactly(asked, keys[None], [0], [8000], 16)
        found += (slots[..., None] == best[..., None, :]).sum().item()
        hits += best.numel()
        assert all(len(set(line)) == 16 for line in slots[0, :, 0].tolist())
        own = (keys[torch.arange(2)[:, None], slots[0, :, 0]] * asked[0]).sum(-1)
        torch.testing.assert_close(scores[0, :, 0], own, atol=1e-4, rtol=1e-4)
        assert (scores[..., :-1] >= scores[..., 1:]).all()
    assert found / hits > 0.95
    assert index.share_read() < 0.6
    assert index.state_bytes() > 0


@pytest.mark.parametrize("make", [a_part, lists])
def test_what_was_overwritten_or_taken_out_is_never_found(make):
    keys, queries = like_a_model(1, 3000, 8)
    keys, queries = keys[None], queries[None]
    index = make()
    index.search(queries, keys, [0], [3000], 4)
    _, slots = index.search(queries[:, :, :1], keys, [0], [3000], 4)
    keys[0, :, slots[0, 0, 0]] = -1000 * queries[0, :, :1]
    index.written(keys, torch.zeros(4, dtype=torch.long), slots[0, 0, 0])
    _, others = index.search(queries[:, :, :1], keys, [0], [3000], 4)
    assert not set(others[0, 0, 0].tolist()) & set(slots[0, 0, 0].tolist())
    stay = torch.ones(3000, dtype=torch.bool)
    stay[others[0, 0, 0]] = False
    left = stay.nonzero().flatten()
    keys = keys[:, :, left].contiguous()
    index.kept(0, left)
    _, after = index.search(queries[:, :, :1], keys, [0], [len(left)], 4)
    assert not set(left[after[0, 0, 0]].tolist()) & set(others[0, 0, 0].tolist())


def test_what_was_taken_out_is_overwritten_in_the_copy():
    keys = torch.randn(2, 1000, 4)
    keys[:, 500] = 77.0
    blocks = Blocks(keys, torch.randn(2, 64, 4))
    assert (blocks.keys == 77.0).any()
    moved = torch.arange(1000)
    moved[500], moved[501:] = -1, torch.arange(500, 999)
    blocks.kept(moved)
    assert not (blocks.keys == 77.0).any()
    assert float(blocks.means.max()) < 10


def test_what_is_left_is_found_where_whole_blocks_were_taken_out_and_all_scores_are_negative():
    keys, queries = like_a_model(1, 8000, 16, heard=300)
    queries = queries - 4  # keys lie around 3 in every dimension
    index = a_part()
    index.search(queries[None, :, :200], keys[None], [0], [8000], 16)
    index.search(queries[None, :, :1], keys[None], [0], [8000], 16)
    likest = (keys[0] - keys[0, 0]).norm(dim=1).argsort()
    left = likest[1600:].sort().values  # neighbours go together, as the chunks of a text do
    assert float((queries[0] @ keys[0, left].T).max()) < 0
    keys = keys[:, left].contiguous()
    index.kept(0, left)
    assert index._rows[0].structure is not None and index._rows[0].structure.holes
    found = 0
    for at in range(200, 300):
        asked = queries[None, :, at : at + 1]
        _, slots = index.search(asked, keys[None], [0], [len(left)], 16)
        found += (slots[..., None] == exactly(asked, keys[None], [0], [len(left)], 16)[1][..., None, :]).sum().item()
    assert index.share_read() < 0.6
    assert found > 0.95 * 100 * 16


@pytest.mark.parametrize("make", [a_part, lists])
def test_the_same_calls_give_the_same_answers(make):
    keys, queries = like_a_model(2, 4000, 8)
    answers = []
    for index in (make(), make()):
        index.search(queries[None], keys[None], [0], [3900], 8)
        for at in range(20):
            answers.append(index.search(queries[None, :, at : at + 1], keys[None], [0], [4000], 8))
    for one, other in zip(answers[:20], answers[20:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_reach_grows_until_enough_is_found_where_the_text_asks_for_other_than_the_queries_heard():
    keys, queries = like_a_model(2, 8000, 16, heard=400)
    shares = []
    for probes in (False, True):
        index = a_part(probes=probes)
        index.search(queries[None, :, :200], keys[None], [0], [8000], 16)
        index.search(queries[None, :, :1], keys[None], [0], [8000], 16)
        index._rows[0].reach[16] = [(0.0, 0.0)] * 2  # as if the queries heard had been far too easy
        found = 0
        for at in [at % 200 + 200 for at in range(600)]:
            asked = queries[None, :, at : at + 1]
            _, slots = index.search(asked, keys[None], [0], [8000], 16)
            best = exactly(asked, keys[None], [0], [8000], 16)[1]
            found += (slots[..., None] == best[..., None, :]).sum().item()
        shares.append(found / (600 * 2 * 16))
    assert shares[1] > shares[0]


def test_segments_teach_what_a_search_in_part_would_have_missed():
    keys, queries = like_a_model(2, 4000, 8)
    index = a_part()
    index.search(queries[None], keys[None], [0], [4000], 8)
    index.search(queries[None, :, :1], keys[None], [0], [4000], 8)
    index._rows[0].reach[8] = [(-50.0, -50.0)] * 2
    assert_same_search(index, queries[None], keys[None], [0], [4000], 8)  # a segment
    assert all(reach == (0.0, 0.0) for reach in index._rows[0].reach[8])
    index._rows[0].reach[8] = [(50.0, 50.0)] * 2
    index.search(queries[None], keys[None], [0], [4000], 8)
    assert all(49 < each < 50 for reach in index._rows[0].reach[8] for each in reach)  # less, slowly


def test_queries_of_several_segments_are_remembered():
    index = a_part()
    keys = torch.randn(1, 1, 2000, 4)
    for number in range(6):
        index.search(torch.full((1, 1, 300, 4), float(number)), keys, [0], [2000], 4)
    assert index._rows[0]._heard[0, :, 0].unique().tolist() == [2.0, 3.0, 4.0, 5.0]


def test_segments_and_first_queries_are_searched_exactly():
    keys, queries = like_a_model(2, 4000, 8)
    index = PartialIndex(Blocks, least=1000, few=2, enough=20, worth=1.0)
    for first in range(0, 18, 2):  # not enough heard
        assert_same_search(index, queries[None, :, first : first + 2], keys[None], [0], [4000], 8)
    assert index.share_read() == 1.0
    index.search(queries[None, :, :2], keys[None], [0], [4000], 8)
    assert index.share_read() < 1.0
    assert_same_search(index, queries[None], keys[None], [0], [4000], 8)  # a segment
    assert_same_search(index, queries[None, :, :1], keys[None], [0], [999], 8)  # a short memory


def test_no_row_learns_from_another_rows_queries():
    keys, queries = like_a_model(1, 4000, 8)
    foreign = torch.randn(1, 1, 64, 8) * torch.logspace(0, 2, 8)
    answers = []
    for busy in (False, True):
        index = a_part()
        both = keys[None].expand(2, -1, -1, -1)
        index.search(queries[None], both, [0], [4000], 8)
        if busy:
            index.search(foreign, both, [1], [4000], 8)
            index.search(foreign[:, :, :1], both, [1], [4000], 8)
        answers.append(index.search(queries[None, :, :5], both, [0], [4000], 8))
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


def test_rows_that_grow_are_built_anew_before_much_lies_beside():
    keys, queries = like_a_model(1, 6000, 8)
    index = a_part()
    index.search(queries[None], keys[None], [0], [3000], 8)
    for live in range(3000, 6001, 100):
        slots = torch.arange(live - 100, live)
        index.written(keys[None], torch.zeros_like(slots), slots)
        index.search(queries[None, :, :1], keys[None], [0], [live], 8)
        row = index._rows[0]
        assert live - row.structure.covered <= live // 16


def test_keys_all_alike_and_keys_of_zero_are_searched_too():
    for keys in (torch.zeros(1, 1, 500, 4), torch.ones(1, 1, 500, 4)):
        assert_same_search(everything(), torch.randn(1, 1, 2, 4), keys, [0], [500], 5)
        assert_same_search(everything(), torch.zeros(1, 1, 2, 4), keys, [0], [500], 5)


def test_one_block_fewer_keys_than_asked_for_falls_back_to_exact_search():
    keys, queries = like_a_model(1, 400, 4)
    index = a_part(recall=0.01)  # two blocks of 50 keys
    index.search(queries[None], keys[None], [0], [400], 120)
    assert_same_search(index, queries[None, :, :1], keys[None], [0], [400], 120)


def test_keys_are_compared_as_queries_feel_them():
    # keys differ most in the first dimension, to which the queries are blind
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(1024, 2, generator=draw) * torch.tensor([3.0, 1.0])
    blind = torch.stack((torch.zeros(4000), torch.randn(4000, generator=draw)), dim=1)
    order = like_together(keys @ felt_distance(blind), 16)
    within = keys[order].view(16, 64, 2).std(1).mean(0)
    assert within[1] < 0.2
    plain = like_together(keys @ felt_distance(blind[:0]), 16)
    assert sorted(plain.tolist()) == list(range(1024))
    assert keys[plain].view(16, 64, 2).std(1).mean(0)[1] > 0.5


def test_what_is_left_over_when_parts_are_equally_long_does_not_make_every_search_build_anew():
    for count in (*range(LEAST, 3000), 43007, 262143, 999_999):
        parts, width, ways = _sizes(count)
        assert count - count // 16 < parts * width <= count
        assert parts % PARTS == 0 and parts % ways == 0 and (parts // ways).bit_count() == 1


def test_indexes_have_names_and_unknown_ones_are_refused():
    assert isinstance(make_index("two_stage"), PartialIndex)
    with pytest.raises(ConfigError, match=r"index \('hnsw'\) must be one of exact, two_stage, faiss"):
        make_index("hnsw")


def test_without_faiss_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"^index \('faiss'\) needs faiss.*pip install 'longmem-lm\[faiss\]'"):
        make_index("faiss")


def test_faiss_is_taken_by_its_name():
    pytest.importorskip("faiss")
    assert isinstance(make_index("faiss"), PartialIndex)


def test_recall_of_exact_search_is_one_and_it_reads_all():
    keys, queries = like_a_model(2, 500, 8)
    report = measure_recall("exact", keys, torch.cat((queries, queries[[1, 0]])), 8)
    assert report.recall == report.attention_kept == report.keys_read == 1.0
    assert report.recall_by_head == [1.0] * 4
    assert (report.index, report.chunks, report.heads_kv, report.queries) == ("exact", 500, 2, 32)
    assert report.state_bytes == report.build_seconds == 0


def test_recall_is_measured_on_the_second_half_after_the_first_was_heard():
    keys, queries = like_a_model(2, 4000, 8, heard=200)
    report = measure_recall(a_part(), keys, queries, 8, tokens=30)
    assert report.index == "PartialIndex" and report.queries == 30
    assert report.recall > 0.9 and report.attention_kept > 0.9
    assert report.keys_read < 0.7 and report.state_bytes > keys.numel() * 4
    assert report.milliseconds > 0 and report.exact_milliseconds > 0


@pytest.mark.parametrize(
    ("keys", "queries", "says"),
    [
        ((2, 50, 8), (3, 10, 8), r"queries \(3, 10, 8\) must be \(H, Q, 8\), H a multiple of the keys' 2 heads"),
        ((2, 50, 8), (2, 10, 4), r"must be \(H, Q, 8\)"),
        ((2, 50, 8), (2, 1, 8), "1 queries and 50 chunks are too few"),
        ((2, 5, 8), (2, 10, 8), "10 queries and 5 chunks are too few to measure recall@16"),
    ],
)
def test_recall_refuses_what_does_not_fit_in_one_line(keys, queries, says):
    with pytest.raises(MemoryBankError, match=says):
        measure_recall("exact", torch.randn(keys), torch.randn(queries))
