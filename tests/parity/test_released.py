"""The rules of the released code's memory; its numbers are compared in the other files here."""

import pytest
import torch
from tests.parity.released import ReleasedBank

from longmem.errors import MemoryBankError
from longmem.types import AttentionKV


def released(rows: int, chunks: int) -> ReleasedBank:
    return ReleasedBank(rows, chunks * 2, 1, 2, 2)


def counted(rows: int, length: int, first: int = 0) -> AttentionKV:
    """Tokens whose key is their number, row after row."""
    numbers = torch.arange(first, first + rows * length, dtype=torch.float32).view(rows, 1, length, 1)
    return AttentionKV(numbers.expand(-1, -1, -1, 2), -numbers.expand(-1, -1, -1, 2))


def stored(bank: ReleasedBank) -> list[float]:
    return bank.storage[0, : bank.fill, 0, 0, :, 0].flatten().tolist()


def test_rows_are_flattened_and_the_calls_tail_is_dropped() -> None:
    bank = released(2, 16)
    bank.add(counted(2, 3))
    assert stored(bank) == [0, 1, 2, 3, 4, 5]
    bank = released(1, 16)
    for first in (0, 10):
        bank.add(counted(1, 5, first))
    assert stored(bank) == [0, 1, 2, 3, 10, 11, 12, 13]


def test_twice_what_is_added_is_dropped_before_the_store_would_fill() -> None:
    bank, fills, oldest = released(1, 16), [], []
    for call in range(6):
        bank.add(counted(1, 8, first=8 * call))
        fills.append(bank.fill)
        oldest.append(bank.provenance(0, 0).number)
    assert (fills, oldest) == ([4, 8, 12, 8, 12, 8], [0, 0, 0, 8, 8, 16])
    assert stored(bank) == [float(number) for number in range(32, 48)]


def test_missing_chunks_are_zeros_that_take_part() -> None:
    bank = released(1, 16)
    assert not bank.search(torch.ones(1, 1, 1, 2), 4).mask.any()
    bank.add(counted(1, 4))
    found = bank.search(torch.ones(1, 1, 1, 2), 4)
    assert found.chunk_ids.tolist() == [[[[1, 0, 15, 15]]]] and found.chunks.tolist() == [[[[1, 0, -1, -1]]]]
    assert found.mask.all() and (found.keys[..., 4:, :] == 0).all()


def test_a_store_too_small_for_its_rule_is_refused_where_the_released_code_crashes() -> None:
    with pytest.raises(MemoryBankError, match="adding 8 chunks to 0 drops 16 first"):
        released(1, 8).add(counted(1, 16))
