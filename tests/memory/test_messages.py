"""What memories say when something does not fit: one line, the value, the rule, the way out."""

import pytest
import torch

from longmem.errors import LongMemError, MemoryBankError
from longmem.memory import MemoryBank
from longmem.memory.session import JoinedMemory, SessionMemory
from longmem.types import AttentionKV


def kv(*shape: int, mask: torch.Tensor | None = None) -> AttentionKV:
    return AttentionKV(torch.zeros(shape), torch.zeros(shape), mask)


def bank(rows: int = 2, size: int = 4, **settings) -> MemoryBank:
    return MemoryBank(rows, 16, 2, 3, size, **settings)


def spoiled(which: int, number: float, token: int = 1) -> AttentionKV:
    """Keys (0) or values (1) of row 1 hold this number."""
    pair = [torch.ones(2, 2, 5, 3), torch.ones(2, 2, 5, 3)]
    pair[which][1, 0, token, 2] = number
    return AttentionKV(*pair)


SEGMENT = kv(2, 2, 5, 3)


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        (torch.zeros(2, 2, 5, 3), {}, "a Tensor has no keys and values to remember; give out.kv, or model.encode(ids)"),
        (kv(2, 4, 5, 3), {}, "keys (2, 4, 5, 3) must be (B, 2, T, 3), as this bank was made for"),
        (kv(3, 2, 5, 3), {}, "keys have 3 rows, the bank has 2; pass rows= to say which"),
        (kv(1, 2, 5, 3), {"rows": torch.tensor([2])}, "row (2) must lie in 0..1, the rows of this bank"),
        (SEGMENT, {"rows": torch.tensor([1])}, "rows (1 entries) must have one per row of the keys (2)"),
        (SEGMENT, {"documents": ["a"]}, "documents (1 entries) must have one per row written (2)"),
        (spoiled(0, float("nan")), {}, "keys of row 1 reach nan, a bank of torch.float16 holds 6.55e+04 at most"),
        (spoiled(1, -1e6), {}, "values of row 1 reach 1e+06, a bank of torch.float16 holds 6.55e+04"),
    ],
)
def test_a_segment_that_does_not_fit_is_refused_and_nothing_is_written(given, settings, message):
    memory = bank(dtype=torch.float16)
    memory.add(kv(2, 2, 3, 3), documents=["a", "b"])
    before = memory.state_dict()
    with pytest.raises(MemoryBankError) as caught:
        memory.add(given, **settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    after = memory.state_dict()
    assert (after["version"], after["lanes"]) == (before["version"], before["lanes"])
    assert torch.equal(after["tail"], before["tail"]) and memory.chunks.tolist() == [0, 0]


def test_padding_may_hold_anything_and_what_a_dtype_holds_is_taken():
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 0] = False
    memory, bad = bank(dtype=torch.float16), spoiled(0, float("nan"), token=0)
    memory.add(AttentionKV(bad.keys, bad.values, mask))
    memory.add(spoiled(1, 65504.0))
    assert torch.isfinite(memory.search(torch.ones(2, 2, 1, 3), 3).keys).all()
    with pytest.raises(MemoryBankError, match=r"reach 3e\+38, a bank of torch.float32 holds 8.51e\+37"):
        bank().add(spoiled(0, 3e38))  # four of them are added up for their mean


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: MemoryBank(1, 50, 2, 3), "capacity_tokens (50) must be a multiple of chunk_size (4); try 48 or 52"),
        (lambda: MemoryBank(0, 0, 2, 3), "rows (0) must be at least 1; capacity_tokens (0) must be at least 1"),
        (lambda: bank(1, index="two_stage"), "index ('two_stage') must be one of exact, faiss"),
        (lambda: bank().search(torch.zeros(2, 3, 4, 3), 1), "queries of 3 heads and head_dim 3 do not fit this bank"),
        (lambda: bank().search(torch.zeros(2, 2, 4, 3), 1, layer=1), "layer (1) must lie in 0..0, the layers of this"),
        (lambda: bank().provenance(1, 0), "chunk (0) is not in row 1; it is empty"),
        (lambda: bank().provenance(-1, 0), "row (-1) must lie in 0..1, the rows of this bank"),
        (lambda: SessionMemory(bank(1), bank(2)).provenance(2, 0), "row (2) must lie in 0..1, the rows of this bank"),
        (lambda: JoinedMemory([bank(1), None]).provenance(2, 0), "row (2) must lie in 0..1, the rows of this bank"),
        (
            lambda: bank().load_state_dict({"settings": {"memory_layer": 3, "eviction": "released"}}),
            "saved bank is of a kind of version 0.1 that is no more",
        ),
        (lambda: bank(3).load_state_dict(bank(2).state_dict()), "saved bank's rows is 2, this bank's is 3; load it"),
        (lambda: SessionMemory(bank(2), bank(3)), "the memory has 2 rows, the session 3; pass base_rows="),
        (lambda: SessionMemory(bank(1), bank(1, size=2)), "chunk_size differs among memories that are read together: "),
        (lambda: SessionMemory(None, bank(1)).commit("talk"), "this session is over no store; make it with store"),
        (lambda: JoinedMemory([None]), "a list of 1 banks must hold one; pass memory=None to read nothing"),
        (lambda: JoinedMemory([bank(1, fingerprint="a"), bank(1, fingerprint="b")]), "fingerprint differs among"),
    ],
)
def test_what_memories_cannot_do_is_said_in_one_line(act, message):
    with pytest.raises(LongMemError) as caught:
        act()
    assert message in str(caught.value) and "\n" not in str(caught.value)
