"""The bank's laws, on examples small enough to follow by eye."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from longmem.memory import ChunkOrigin, MemoryBank
from longmem.types import AttentionKV


def bank(rows: int = 1, capacity: int = 16, size: int = 2, **settings) -> MemoryBank:
    return MemoryBank(rows, capacity, 2, 3, size, **settings)


def kv(rows: int, length: int, seed: int = 0, mask: torch.Tensor | None = None) -> AttentionKV:
    draw = torch.Generator().manual_seed(seed)
    return AttentionKV(
        torch.randn(rows, 2, length, 3, generator=draw), torch.randn(rows, 2, length, 3, generator=draw), mask
    )


def queries(rows: int, length: int = 4, heads: int = 4) -> torch.Tensor:
    return torch.randn(rows, heads, length, 3, generator=torch.Generator().manual_seed(99))


def same(first, second) -> None:
    """Two searches found the same."""
    assert torch.equal(first.mask, second.mask)
    assert torch.equal(first.scores, second.scores)
    assert torch.equal(first.keys * first.mask[..., None], second.keys * second.mask[..., None])
    assert torch.equal(first.values * first.mask[..., None], second.values * second.mask[..., None])


def test_empty_bank_finds_nothing():
    found = bank(2).search(queries(2), 3)
    assert not found.mask.any()
    assert found.chunk_ids.shape == (2, 4, 4, 3)
    assert (found.keys == 0).all()
    assert (found.values == 0).all()


def test_a_little_memory_is_masked_where_it_ends():
    memory = bank()
    memory.add(kv(1, 4))
    found = memory.search(queries(1), 5)
    assert found.chunk_mask.tolist() == [[[[True, True, False, False, False]] * 4] * 4]
    assert found.mask.shape == (1, 4, 4, 10)
    assert memory.chunks.tolist() == [2]
    assert memory.tokens.tolist() == [4]


def test_chunk_key_is_the_mean_of_its_keys_and_scores_are_inner_products():
    memory, given, asked = bank(), kv(1, 6), queries(1)
    memory.add(given)
    found = memory.search(asked, 3)
    means = given.keys.reshape(1, 2, 3, 2, 3).mean(3).repeat_interleave(2, dim=1)
    wanted = torch.einsum("bhtd,bhnd->bhtn", asked, means).sort(-1, descending=True)
    torch.testing.assert_close(found.scores, wanted.values)
    assert torch.equal(found.chunk_ids, wanted.indices)


def test_grouped_query_heads_read_their_own_key_value_head():
    memory, given = bank(capacity=2), kv(1, 2)
    memory.add(given)
    found = memory.search(queries(1, 1), 1)
    for head in range(4):
        assert torch.equal(found.keys[0, head, 0], given.keys[0, head // 2])
        assert torch.equal(found.values[0, head, 0], given.values[0, head // 2])


def test_chunk_keys_are_averaged_before_rounding():
    given = kv(1, 2)
    memory = bank(dtype=torch.bfloat16)
    memory.add(given)
    asked = queries(1, 1, heads=2)
    wanted = (asked[:, :, 0] * given.keys.mean(2)).sum(-1)
    torch.testing.assert_close(memory.search(asked, 1).scores[..., 0, 0], wanted)


def test_batch_rows_read_the_bank_rows_they_name():
    memory, asked = bank(3), queries(2)
    memory.add(kv(3, 6))
    found = memory.search(asked, 3, rows=torch.tensor([2, 0]))
    straight = memory.search(torch.stack((asked[1], asked[1], asked[0])), 3)
    assert torch.equal(found.keys[0], straight.keys[2])
    assert torch.equal(found.keys[1], straight.keys[0])


def test_a_row_of_padding_only_adds_nothing():
    memory = bank(2)
    memory.add(kv(2, 4, mask=torch.tensor([[True] * 4, [False] * 4])))
    assert memory.chunks.tolist() == [2, 0]


def test_the_end_of_a_document_closes_the_tail_as_a_short_masked_chunk():
    memory, given = bank(), kv(1, 3)
    memory.add(given, documents=["a"])
    assert memory.chunks.tolist() == [1]
    memory.end_document()
    assert (memory.chunks.tolist(), memory.tokens.tolist(), memory.waiting.tolist()) == ([2], [3], [0])
    found = memory.search(given.keys[:, :, 2:], 2)
    assert found.mask.sum(-1).tolist() == [[[3], [3]]]
    short = found.chunk_ids[0, 0, 0].tolist().index(1)
    torch.testing.assert_close(found.scores[0, 0, 0, short], (given.keys[0, 0, 2] ** 2).sum())
    assert memory.provenance(0, 1).length == 1


def test_another_document_closes_the_tail_of_the_one_before():
    memory = bank(2)
    memory.add(kv(2, 3), documents=["a", "b"], time=1.0)
    memory.add(kv(2, 3), documents=["a", "c"], time=2.0)
    assert memory.chunks.tolist() == [3, 3]
    assert memory.waiting.tolist() == [0, 1]
    assert memory.provenance(0, 1) == ChunkOrigin("a", 2, 2, 1, 2.0)
    assert memory.provenance(1, 1) == ChunkOrigin("b", 2, 1, 1, 2.0)
    assert memory.provenance(1, 2) == ChunkOrigin("c", 0, 2, 2, 2.0)


def test_a_document_goes_on_where_none_is_named():
    memory = bank()
    memory.add(kv(1, 3), documents=["a"])
    memory.add(kv(1, 3))
    assert [memory.provenance(0, slot).start_token for slot in range(3)] == [0, 2, 4]
    assert memory.provenance(0, 2).document == "a"


def test_offsets_are_recorded_and_a_jump_closes_the_tail():
    memory = bank()
    memory.add(kv(1, 3), documents=["a"], offsets=[10])
    memory.add(kv(1, 2), documents=["a"], offsets=[13])
    memory.add(kv(1, 2), documents=["a"], offsets=[40])
    origins = [memory.provenance(0, slot) for slot in range(4)]
    assert [(origin.start_token, origin.length) for origin in origins] == [(10, 2), (12, 2), (14, 1), (40, 2)]


def test_boundary_reset_empties_a_row_whose_document_changed():
    memory = bank(2, boundary="reset")
    memory.add(kv(2, 5), documents=["a", "b"])
    memory.add(kv(2, 2), documents=["a", "c"])
    assert memory.chunks.tolist() == [3, 1]
    assert memory.provenance(1, 0).document == "c"
    assert memory.provenance(1, 0).number == 0


def test_reset_empties_the_named_rows():
    memory = bank(2)
    memory.add(kv(2, 5), documents=["a", "b"])
    memory.reset(torch.tensor([1]))
    assert memory.chunks.tolist() == [2, 0]
    assert memory.waiting.tolist() == [1, 0]
    assert not memory.search(queries(2), 2).mask[1].any()


def test_saving_and_loading_is_the_identity():
    settings = {"capacity": 8, "dtype": torch.bfloat16, "boundary": "reset", "fingerprint": "f"}
    memory = bank(3, **settings)
    for seed in range(3):
        memory.add(kv(3, 5, seed), documents=["a", "b", str(seed)], time=float(seed))
    copy = bank(3, **settings)
    copy.add(kv(3, 8, 77))
    state, changing = memory.state_dict(), bank(3, **settings)
    changing.load_state_dict(state)
    changing.add(kv(3, 8, 78))  # the saved state does not change with a bank
    copy.load_state_dict(state)
    for step in range(3):
        same(memory.search(queries(3), 4), copy.search(queries(3), 4))
        live = memory.chunks.tolist()
        for row in range(3):
            origins = [[each.provenance(row, slot) for slot in range(live[row])] for each in (memory, copy)]
            assert origins[0] == origins[1]
        for each in (memory, copy):
            each.add(kv(3, 3, 10 + step), time=9.0)


def test_every_write_counts_as_a_new_version():
    memory = bank()
    seen = [memory.version]
    for write in (
        lambda: memory.add(kv(1, 3)),
        memory.end_document,
        memory.reset,
        lambda: memory.load_state_dict(memory.state_dict()),
    ):
        write()
        seen.append(memory.version)
    assert seen == sorted(set(seen))
    memory.search(queries(1), 2)
    assert memory.version == seen[-1]


def test_searching_changes_nothing_and_stores_no_gradient():
    memory, given = bank(), kv(1, 6)
    memory.add(AttentionKV(given.keys.requires_grad_(), given.values))
    first, second = (memory.search(queries(1).requires_grad_(), 2) for _ in range(2))
    same(first, second)
    assert not first.scores.requires_grad
    assert not first.keys.requires_grad


def test_a_shared_bank_shows_every_row_to_every_other():
    memory, given = bank(2, shared=True), kv(2, 4)
    memory.add(given, documents=["a", "b"])
    assert memory.chunks.tolist() == [4, 4]
    found = memory.search(queries(1), 4, rows=torch.tensor([0]))
    keys = {tuple(key.tolist()) for key in found.keys[0, 0, 0]}
    assert keys == {tuple(key.tolist()) for key in given.keys[:, 0].flatten(0, 1)}
    assert [memory.provenance(0, slot).document for slot in range(4)] == ["a", "a", "b", "b"]


def test_a_full_shared_bank_keeps_the_newest():
    memory, given = bank(2, capacity=4, shared=True), kv(2, 6)
    memory.add(given)
    kept = memory.search(queries(1, 1), 2, rows=torch.tensor([0])).keys[0, 0, 0]
    assert {tuple(key.tolist()) for key in kept} == {tuple(key.tolist()) for key in given.keys[1, 0, 2:]}


def test_what_is_known_of_chunks_does_not_pile_up():
    memory = bank(capacity=4)
    for number in range(500):
        memory.add(kv(1, 2), documents=[str(number)])
    assert len(memory.state_dict()["slots"]["runs"][0]) == 2
    assert {memory.provenance(0, slot).document for slot in (0, 1)} == {"498", "499"}


def test_each_layer_is_searched_by_its_own_heads():
    given, asked = kv(2, 14), queries(2)
    both = AttentionKV(*(torch.cat((each, 2 - each), dim=1) for each in (given.keys, given.values)))
    together = bank(2, memory_layers=(3, 7))
    together.add(both, documents=["a", "b"])
    assert (together.layers, together.heads_kv, together.memory_layers) == (2, 2, (3, 7))
    for layer, heads in enumerate((slice(0, 2), slice(2, 4))):
        alone = bank(2)
        alone.add(AttentionKV(both.keys[:, heads], both.values[:, heads]))
        found, wanted = together.search(asked, 3, layer=layer), alone.search(asked, 3)
        same(found, wanted)
        assert torch.equal(found.chunk_ids, wanted.chunk_ids)
        assert (found.first_head, found.layer_heads) == (2 * layer, 2)
    assert together.provenance(1, 0).document == "b"  # a chunk is of all layers
    copy = bank(2, memory_layers=(3, 7))
    copy.load_state_dict(together.state_dict())
    same(copy.search(asked, 3, layer=1), together.search(asked, 3, layer=1))


def test_a_bank_of_version_0_1_is_loaded():
    saved = torch.load(Path(__file__).parents[1] / "golden" / "bank-0.1.pt", weights_only=True)
    settings = {"capacity": 12, "memory_layers": (3,), "fingerprint": "f", "dtype": torch.float16}
    loaded, again = bank(2, **settings), bank(2, **settings)
    loaded.load_state_dict(saved)
    draw = torch.Generator().manual_seed(0)
    for step in range(4):
        pair = AttentionKV(*(torch.randn(2, 2, 5, 3, generator=draw) for _ in range(2)))
        again.add(pair, documents=["a", f"b{step // 2}"], time=float(step))
    for last in range(2):
        same(loaded.search(queries(2), 6), again.search(queries(2), 6))
        for row, slots in enumerate(again.chunks.tolist()):
            for slot in range(slots):
                assert loaded.provenance(row, slot) == again.provenance(row, slot)
        for each in (loaded, again):
            each.add(kv(2, 3, last), time=9.0)


def test_threads_read_one_bank_at_once():
    memory = bank(3, capacity=64)
    memory.add(kv(3, 50))
    asked = [torch.randn(3, 4, 5, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(40)]
    alone = [memory.search(each, 4) for each in asked]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(lambda each: memory.search(each, 4), asked), alone, strict=True):
            same(found, wanted)


def test_a_bank_for_a_model_takes_its_shape():
    class Config:
        chunk_size, memory_size = 2, 32

    class Model:
        config, fingerprint, device, dtype = Config(), "f", torch.device("cpu"), torch.float32
        memory_heads, memory_head_dim, memory_layers = 2, 3, (5,)

    memory = MemoryBank.for_model(Model(), rows=2)
    assert (memory.rows, memory.capacity_tokens, memory.chunk_size, memory.fingerprint) == (2, 32, 2, "f")
    assert memory.memory_layers == (5,)
    assert MemoryBank.for_model(Model(), capacity_tokens=8, chunk_size=4).chunk_size == 4


def test_nbytes_counts_what_is_allocated():
    memory = bank(1, capacity=8)  # 4 chunks and the null chunk, 2 heads, pairs of 2 x 3 float32
    stored, keys, lengths, tail = 5 * 2 * 2 * 2 * 3 * 4, 4 * 2 * 3 * 4, 5 * 8, 2 * 2 * 2 * 3 * 4
    assert memory.nbytes == stored + keys + lengths + tail
