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
        (kv(2, 2, 5, 8), {}, "keys (2, 2, 5, 8) must be (B, 2, T, 3), as this bank was made for"),
        (AttentionKV(SEGMENT.keys, SEGMENT.values[:, :, 1:]), {}, "values (2, 2, 4, 3) must have the shape of keys"),
        (kv(2, 2, 5, 3, mask=torch.ones(2, 4)), {}, "mask (2, 4) must be (2, 5): rows and tokens of the keys"),
        (kv(3, 2, 5, 3), {}, "keys have 3 rows, the bank has 2; pass rows= to say which"),
        (kv(1, 2, 5, 3), {"rows": torch.tensor([2])}, "rows (2) must lie in 0..1, the rows of this bank"),
        (SEGMENT, {"rows": torch.tensor([1])}, "rows (1 entries) must have one per row of the keys (2)"),
        (SEGMENT, {"rows": torch.tensor([1, 1])}, "rows ([1, 1]) must name each row once"),
        (SEGMENT, {"documents": ["a"]}, "documents (1 entries) must have one per row written (2)"),
        (SEGMENT, {"offsets": [0, 1, 2]}, "offsets (3 entries) must have one per row written (2)"),
        (spoiled(0, float("nan")), {}, "keys of row 1 reach nan, a bank of torch.float16 holds 6.55e+04 at most"),
        (spoiled(1, -float("inf")), {}, "values of row 1 reach inf"),
        (spoiled(1, -1e6), {}, "values of row 1 reach 1e+06, a bank of torch.float16 holds 6.55e+04"),
        (spoiled(0, 1e6), {}, "keys of row 1 reach 1e+06, a bank of torch.float16 holds 6.55e+04"),
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
    bad = spoiled(0, float("nan"), token=0)
    memory = bank(dtype=torch.float16)
    memory.add(AttentionKV(bad.keys, bad.values, mask))
    memory.add(spoiled(1, 65504.0))
    memory.end_document()
    assert torch.isfinite(memory.search(torch.ones(2, 2, 1, 3), 3).keys).all()
    bank(dtype=torch.bfloat16).add(spoiled(1, 1e30))
    with pytest.raises(MemoryBankError, match=r"reach 3e\+38, a bank of torch.float32 holds 8.51e\+37"):
        bank().add(spoiled(0, 3e38))  # four of them are added up for their mean


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: MemoryBank(1, 50, 2, 3), "capacity_tokens (50) must be a multiple of chunk_size (4); try 48 or 52"),
        (lambda: MemoryBank(1, 3, 2, 3), "capacity_tokens (3) must be a multiple of chunk_size (4); try 4"),
        (lambda: MemoryBank(0, 8, 0, 3), "rows (0) must be at least 1; heads_kv (0) must be at least 1"),
        (lambda: bank(1, dtype=torch.int8), "dtype (torch.int8) must be torch.float16, bfloat16 or float32; "),
        (lambda: bank(1, dtype="float16"), "dtype ('float16') must be torch.float16, "),
        (lambda: bank(1, memory_layers=(5, 3)), "memory_layers ([5, 3]) must name each layer once, ascending"),
        (lambda: bank(1, index="two_stage"), "index ('two_stage') must be one of exact, faiss"),
        (lambda: bank().search(torch.zeros(2, 2, 5, 4), 1), "queries (2, 2, 5, 4) must be (B, H, T, 3), with the head"),
        (lambda: bank().search(torch.zeros(2, 3, 5, 3), 1), "queries have 3 heads, which must be a multiple of the"),
        (lambda: bank().search(torch.zeros(1, 2, 5, 3), 1), "queries have 1 rows, the bank has 2; pass rows= to say"),
        (lambda: bank().search(torch.zeros(2, 2, 5, 3), 0), "num_chunks (0) must be at least 1"),
        (lambda: bank().search(torch.zeros(2, 2, 1, 3), 1, layer=1), "layer (1) must lie in 0..0"),
        (lambda: bank().provenance(1, 0), "chunk (0) is not in row 1; it is empty"),
        (
            lambda: bank().load_state_dict({"settings": {"memory_layer": 3, "eviction": "released"}}),
            "saved bank has eviction 'released', which is no more; fill it anew",
        ),
        (
            lambda: bank().load_state_dict({"settings": bank().state_dict()["settings"] | {"shared": True}}),
            "saved bank is one memory for all its rows, which is no more; fill one of a row anew",
        ),
        (
            lambda: bank(3).load_state_dict(bank(2).state_dict()),
            "saved bank is of another shape: its rows is 2, this bank's is 3; make the bank with rows=2 to load it",
        ),
        (
            lambda: bank(fingerprint="llama-def").load_state_dict(bank(fingerprint="gpt2-abc").state_dict()),
            "saved bank is written by another backbone: its fingerprint is gpt2-abc, this bank's is llama-def; use the",
        ),
        (lambda: SessionMemory(bank(2), bank(3)), "the memory has 2 rows, the session 3; pass base_rows="),
        (lambda: SessionMemory(bank(1), bank(1, size=2)), "chunk_size differs among memories that are read together: "),
        (lambda: SessionMemory(bank(1, fingerprint="a"), bank(1, fingerprint="b")), "fingerprint differs among"),
        (
            lambda: JoinedMemory(["notes"]),
            "memory (a str) cannot be searched; give a MemoryBank, a session, or the bank",
        ),
        (
            lambda: SessionMemory(None, bank(1)).commit("talk"),
            "this session is over no store; make it with store",
        ),
        (lambda: JoinedMemory([None]), "a list of 1 banks must hold one; pass memory=None to read nothing"),
        (lambda: JoinedMemory([bank(1, memory_layers=(1,)), bank(1, memory_layers=(2,))]), "memory_layers differs"),
        (lambda: JoinedMemory([bank(1), None]).provenance(1, 0), "row 1 has no memory, so no chunk 0"),
    ],
)
def test_what_memories_cannot_do_is_said_in_one_line(act, message):
    with pytest.raises(LongMemError) as caught:
        act()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_saved_bank_is_loaded_by_one_without_a_name() -> None:
    bank().load_state_dict(bank(fingerprint="old").state_dict())
