"""Saved banks dealt out to another number of processes: every row keeps what it had."""

from __future__ import annotations

import copy

import pytest
import torch

from longmem.errors import CheckpointError
from longmem.memory import MemoryBank
from longmem.memory.lookahead import Arrival, LookaheadBank
from longmem.memory.shards import rows_of
from longmem.types import AttentionKV

H, HKV, D, S = 4, 2, 8, 4


def bank(rows: int, shared: bool = False) -> MemoryBank:
    return MemoryBank(rows, 24, HKV, D, S, shared=shared)


def written(rows: int, segments: int, seed: int) -> MemoryBank:
    """Rows with unequal documents and tails; with many segments, rings that have turned over."""
    made, draw = bank(rows), torch.Generator().manual_seed(seed)
    for number in range(segments):
        kv = AttentionKV(*(torch.randn(rows, HKV, 7, D, generator=draw) for _ in range(2)))
        made.add(kv, documents=[f"{seed}/{row}/{number // (row + 2)}" for row in range(rows)])
    return made


@pytest.mark.parametrize(("old", "new"), [((3, 3), 2), ((2, 2), 4), ((4,), 1), ((1, 1, 1, 1), 2)])
def test_every_row_finds_and_goes_on_as_before(old: tuple[int, ...], new: int) -> None:
    # the first process has little in its banks, the others have forgotten their beginnings
    banks = [written(rows, 1 + 5 * number, seed=number) for number, rows in enumerate(old)]
    states = [copy.deepcopy(each.state_dict()) for each in banks]
    lanes = [(each, row) for each in banks for row in range(each.rows)]
    for first in range(0, len(lanes), new):
        mine = bank(new)
        mine.load_state_dict(rows_of(states, first, new))
        kv = AttentionKV(*(torch.randn(new, HKV, 5, D) for _ in range(2)))
        mine.add(kv)
        queries = torch.randn(new, H, 6, D)
        found = mine.search(queries, 3)
        for row, (theirs, place) in enumerate(lanes[first : first + new]):
            where = torch.tensor([place])
            theirs.add(AttentionKV(kv.keys[row : row + 1], kv.values[row : row + 1]), rows=where)
            expected = theirs.search(queries[row : row + 1], 3, rows=where)
            assert torch.equal(found.mask[row], expected.mask[0])
            assert torch.equal(
                found.keys[row] * found.mask[row][..., None], expected.keys[0] * expected.mask[0][..., None]
            )
            for slot in range(int(mine.chunks[row])):
                one, other = mine.provenance(row, slot), theirs.provenance(place, slot)
                assert (one.document, one.start_token, one.number) == (other.document, other.start_token, other.number)


def test_what_a_lookahead_bank_has_forgotten_stays_forgotten() -> None:
    banks = []
    for number in range(2):
        ahead = LookaheadBank(bank(2), segments=1, segment_tokens=8, boundary="reset")
        for starts in ([True, True], [number == 0, False]):
            ahead.begin([Arrival([f"{starts[0]}", "b"], [0, 0], torch.tensor(starts))])
            ahead.offer(AttentionKV(*(torch.randn(2, HKV, 8, D) for _ in range(2))))
            ahead.commit()
        banks.append(ahead)
    whole = LookaheadBank(bank(4), segments=1, segment_tokens=8, boundary="reset")
    whole.load_state_dict(rows_of([each.state_dict() for each in banks], 0, 4))
    assert whole.tokens.tolist() == [8, 16, 16, 16]


def test_a_memory_that_rows_share_is_not_divided() -> None:
    with pytest.raises(
        CheckpointError, match="a process has one memory for its 2 rows, and cannot be divided; start 2"
    ):
        rows_of([bank(2, shared=True).state_dict()] * 2, 0, 4)
