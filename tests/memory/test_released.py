"""The released code's memory, rule by rule (its numbers are compared in tests/parity)."""

from __future__ import annotations

import pytest
import torch

from longmem.errors import MemoryBankError
from longmem.memory import MemoryBank
from longmem.types import AttentionKV


def released(rows: int, capacity_chunks: int, size: int = 2) -> MemoryBank:
    return MemoryBank(rows, capacity_chunks * size, 1, 2, size, shared=True, eviction="released")


def counted(rows: int, length: int, first: int = 0) -> AttentionKV:
    """Tokens whose key is their number, row after row."""
    numbers = torch.arange(first, first + rows * length, dtype=torch.float32).view(rows, 1, length, 1)
    return AttentionKV(numbers.expand(-1, -1, -1, 2), -numbers.expand(-1, -1, -1, 2))


def stored(bank: MemoryBank) -> list[float]:
    """Keys in slot order."""
    found = bank.search(torch.ones(1, 1, 1, 2), 1, rows=torch.tensor([0]))
    return found.storage[0, : int(bank.chunks[0]), 0, 0, :, 0].flatten().tolist()


def test_rows_are_flattened_one_after_the_other_and_the_calls_tail_is_dropped():
    bank = released(2, 16)
    bank.add(counted(2, 3))
    assert stored(bank) == [0, 1, 2, 3, 4, 5]
    bank = released(1, 16)
    bank.add(counted(1, 5))
    bank.add(counted(1, 5, first=10))
    assert stored(bank) == [0, 1, 2, 3, 10, 11, 12, 13]


def test_a_chunk_may_straddle_rows_and_is_named_after_its_first_token():
    bank = released(2, 16)
    bank.add(counted(2, 3), documents=["a", "b"], offsets=[10, 20])
    origins = [bank.provenance(0, slot) for slot in range(3)]
    assert [(origin.document, origin.start_token) for origin in origins] == [("a", 10), ("a", 12), ("b", 21)]


def test_twice_what_is_added_is_dropped_before_the_store_would_fill():
    bank, fills, evicted = released(1, 16), [], []
    for call in range(6):
        bank.add(counted(1, 8, first=8 * call))
        fills.append(int(bank.chunks[0]))
        evicted.append(bank.provenance(0, 0).number)
    assert fills == [4, 8, 12, 8, 12, 8]
    assert evicted == [0, 0, 0, 8, 8, 16]
    assert stored(bank) == [float(number) for number in range(32, 48)]


def test_missing_chunks_are_zeros_that_take_part():
    bank = released(1, 16)
    nothing = bank.search(torch.ones(1, 1, 1, 2), 4)
    assert not nothing.mask.any()
    bank.add(counted(1, 4))
    found = bank.search(torch.ones(1, 1, 1, 2), 4)
    assert found.chunk_ids.tolist() == [[[[1, 0, 15, 15]]]]
    assert bank.released_slots(found).tolist() == [[[[1, 0, -1, -1]]]]
    assert found.mask.all()
    assert (found.keys[..., 4:, :] == 0).all()


def test_a_store_too_small_for_its_rule_is_refused_where_the_released_code_crashes():
    bank = released(1, 8)
    with pytest.raises(MemoryBankError) as caught:
        bank.add(counted(1, 16))
    assert str(caught.value) == (
        "capacity_tokens (16) is too small for released eviction: adding 8 chunks to 0 drops 16 first; "
        "use at least 48 tokens, or eviction='oldest'"
    )
    assert bank.version == 0


def test_three_times_what_is_added_is_enough():
    bank = released(1, 12)
    for call in range(9):
        bank.add(counted(1, 8, first=8 * call))
    assert stored(bank) == [float(number) for number in range(64, 72)]


def test_a_released_bank_is_saved_and_loaded_as_it_was():
    bank, copy = released(1, 16), released(1, 16)
    for call in range(5):
        bank.add(counted(1, 8, first=8 * call))
    copy.load_state_dict(bank.state_dict())
    for each in (bank, copy):
        each.add(counted(1, 8, first=99), time=1.0)
    assert stored(bank) == stored(copy)
    live = int(bank.chunks[0])
    assert [bank.provenance(0, slot) for slot in range(live)] == [copy.provenance(0, slot) for slot in range(live)]


def test_a_reset_store_is_empty_and_starts_counting_again():
    bank = released(1, 16)
    for call in range(5):
        bank.add(counted(1, 8, first=8 * call))
    bank.reset()
    assert not bank.search(torch.ones(1, 1, 1, 2), 4).mask.any()
    bank.add(counted(1, 4))
    assert (stored(bank), bank.provenance(0, 0).number) == ([0, 1, 2, 3], 0)
