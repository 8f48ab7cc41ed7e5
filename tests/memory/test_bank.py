"""What the bank promises beside the laws of ``test_bank_properties``, on examples small enough to follow by eye."""

from pathlib import Path

import pytest
import torch
from tests.store.banks import same

from longmem.errors import MemoryBankError
from longmem.memory import ChunkOrigin, MemoryBank
from longmem.types import PERIOD_TOKENS, AttentionKV


def bank(rows: int = 1, capacity: int = 16, size: int = 2, **settings) -> MemoryBank:
    return MemoryBank(rows, capacity, 2, 3, size, **settings)


def kv(rows: int, length: int, seed: int = 0) -> AttentionKV:
    draw = torch.Generator().manual_seed(seed)
    return AttentionKV(*(torch.randn(rows, 2, length, 3, generator=draw) for _ in range(2)))


def queries(rows: int, length: int = 4, heads: int = 4) -> torch.Tensor:
    return torch.randn(rows, heads, length, 3, generator=torch.Generator().manual_seed(99))


def origins(memory: MemoryBank, row: int = 0) -> list[ChunkOrigin]:
    there = memory.search(queries(memory.rows), int(memory.chunks[row])).chunks[row].unique()
    return [memory.provenance(row, chunk) for chunk in there.tolist() if chunk >= 0]


def test_chunk_keys_are_averaged_before_rounding():
    given, memory = kv(1, 2), bank(dtype=torch.bfloat16)
    memory.add(given)
    asked = queries(1, 1, heads=2)
    wanted = (asked[:, :, 0] * given.keys.mean(2)).sum(-1)
    torch.testing.assert_close(memory.search(asked, 1).scores[..., 0, 0], wanted)


def test_a_document_goes_on_where_none_is_named_and_a_jump_closes_the_tail():
    memory = bank()
    memory.add(kv(1, 3), documents=["a"], offsets=[10], time=1.0)
    memory.add(kv(1, 2), time=2.0)
    memory.add(kv(1, 2), documents=["a"], offsets=[40], time=3.0)
    assert [(each.document, each.start_token, each.length, each.time) for each in origins(memory)] == [
        ("a", 10, 2, 1.0), ("a", 12, 2, 2.0), ("a", 14, 1, 3.0), ("a", 40, 2, 3.0),
    ]  # fmt: skip


@pytest.mark.parametrize("names", [("a", "b"), ("a", "a"), (None, None)])
def test_a_later_document_is_of_a_later_period_whatever_its_name(names):
    memory = bank(capacity=4 * PERIOD_TOKENS)
    for tokens, name in zip((2 * PERIOD_TOKENS + 3, 4), names, strict=True):
        memory.add(kv(1, tokens), documents=None if name is None else [name])
        memory.end_document()
    loaded = bank(capacity=4 * PERIOD_TOKENS)
    loaded.load_state_dict(memory.state_dict())
    for each in (memory, loaded):
        found = each.periods[0, each.numbers[0] >= 0].tolist()
        assert found == sorted(found) and len(set(found)) == 4, "three of the first, one of the second"
    memory.add(kv(1, 4), documents=["c"], offsets=[PERIOD_TOKENS])  # another name alone begins a document too
    assert memory.periods[0, int(memory.chunks[0]) - 1] > found[-1] + PERIOD_TOKENS


def test_every_write_counts_as_a_new_version_and_searching_changes_nothing():
    memory, given = bank(), kv(1, 3)
    seen = [memory.version]
    for write in (
        lambda: memory.add(AttentionKV(given.keys.requires_grad_(), given.values)),
        memory.end_document,
        memory.reset,
        lambda: memory.load_state_dict(memory.state_dict()),
        lambda: memory.add(kv(1, 6)),
    ):
        write()
        seen.append(memory.version)
    assert seen == sorted(set(seen))
    first, second = (memory.search(queries(1).requires_grad_(), 2) for _ in range(2))
    same(first, second)
    assert memory.version == seen[-1] and not first.scores.requires_grad and not first.keys.requires_grad


def test_what_is_known_of_chunks_does_not_pile_up_and_every_tensor_is_counted():
    memory = bank(capacity=4)
    assert memory.nbytes == sum(each.nbytes for each in vars(memory).values() if isinstance(each, torch.Tensor))
    for number in range(500):
        memory.add(kv(1, 2), documents=[str(number)])
    assert len(memory.state_dict()["slots"]["runs"][0]) == 2
    assert {origin.document for origin in origins(memory)} == {"498", "499"}
    with pytest.raises(MemoryBankError, match=r"chunk \(0\) is not in row 0; it holds 498 to 499"):
        memory.provenance(0, 0)


def test_each_layer_is_searched_by_its_own_heads():
    given, asked = kv(2, 14), queries(2)
    both = AttentionKV(*(torch.cat((each, 2 - each), dim=1) for each in (given.keys, given.values)))
    together, copy = bank(2, memory_layers=(3, 7)), bank(2, memory_layers=(3, 7))
    together.add(both, documents=["a", "b"])
    copy.load_state_dict(together.state_dict())
    for layer, heads in enumerate((slice(0, 2), slice(2, 4))):
        alone = bank(2)
        alone.add(AttentionKV(both.keys[:, heads], both.values[:, heads]))
        found, wanted = together.search(asked, 3, layer=layer), alone.search(asked, 3)
        same(found, wanted)
        same(found, copy.search(asked, 3, layer=layer))
        assert torch.equal(found.chunk_ids, wanted.chunk_ids)
        assert (found.first_head, found.layer_heads) == (2 * layer, 2)
    assert together.provenance(1, 0).document == "b"  # a chunk is of all layers


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
        assert [origins(loaded, row) for row in range(2)] == [origins(again, row) for row in range(2)]
        for each in (loaded, again):
            each.add(kv(2, 3, last), time=9.0)
