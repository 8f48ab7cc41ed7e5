"""What the bank says when something does not fit: one line, the value, the rule, the way out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from longmem.errors import ConfigError, MemoryBankError
from longmem.memory import MemoryBank
from longmem.memory.session import JoinedMemory, SessionMemory
from longmem.types import AttentionKV


def kv(*shape: int, mask: torch.Tensor | None = None) -> AttentionKV:
    return AttentionKV(torch.zeros(shape), torch.zeros(shape), mask)


def bank(rows: int = 2, **settings) -> MemoryBank:
    return MemoryBank(rows, 16, 2, 3, 4, **settings)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((1, 50, 2, 3, 4), {}, "capacity_tokens (50) must be a multiple of chunk_size (4); try 48 or 52"),
        ((1, 3, 2, 3, 4), {}, "capacity_tokens (3) must hold at least one chunk; try 4"),
        ((0, 8, 0, 3, 4), {}, "rows (0) must be at least 1; heads_kv (0) must be at least 1"),
        ((1, 8, 2, 3, 4), {"memory_layers": (5, 3)}, "memory_layers ([5, 3]) must name each layer once, ascending"),
        ((1, 8, 2, 3, 4), {"index": "two_stage"}, "index ('two_stage') must be one of exact, faiss"),
        (
            (2, 8, 2, 3, 4),
            {"boundary": "reset", "shared": True},
            "boundary ('reset') cannot be kept with shared=True; use boundary='keep', or a row per lane",
        ),
        ((1, 8, 2, 3, 4), {"boundary": "drop"}, "boundary ('drop') must be one of keep, reset"),
    ],
)
def test_settings_that_break_a_rule_are_refused(arguments, settings, message):
    with pytest.raises(ConfigError) as caught:
        MemoryBank(*arguments, **settings)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        (kv(2, 4, 5, 3), {}, "keys (2, 4, 5, 3) must be (B, 2, T, 3), as this bank was made for"),
        (kv(2, 2, 5, 8), {}, "keys (2, 2, 5, 8) must be (B, 2, T, 3), as this bank was made for"),
        (
            AttentionKV(torch.zeros(2, 2, 5, 3), torch.zeros(2, 2, 4, 3)),
            {},
            "values (2, 2, 4, 3) must have the shape of keys (2, 2, 5, 3)",
        ),
        (
            kv(2, 2, 5, 3, mask=torch.ones(2, 4, dtype=torch.bool)),
            {},
            "mask (2, 4) must be (2, 5): rows and tokens of the keys",
        ),
        (kv(3, 2, 5, 3), {}, "keys have 3 rows, the bank has 2; pass rows= to say which"),
        (kv(1, 2, 5, 3), {"rows": torch.tensor([2])}, "rows (2) must lie in 0..1, the rows of this bank"),
        (
            kv(2, 2, 5, 3),
            {"rows": torch.tensor([1])},
            "rows (1 entries) must have one per row of the keys (2)",
        ),
        (kv(2, 2, 5, 3), {"rows": torch.tensor([1, 1])}, "rows ([1, 1]) must name each row once"),
        (kv(2, 2, 5, 3), {"documents": ["a"]}, "documents (1 entries) must have one per row written (2)"),
        (kv(2, 2, 5, 3), {"offsets": [0, 1, 2]}, "offsets (3 entries) must have one per row written (2)"),
    ],
)
def test_a_segment_that_does_not_fit_is_refused_and_nothing_is_written(given, settings, message):
    memory = bank()
    with pytest.raises(MemoryBankError) as caught:
        memory.add(given, **settings)
    assert str(caught.value) == message
    assert (memory.version, memory.chunks.tolist(), memory.waiting.tolist()) == (0, [0, 0], [0, 0])


@pytest.mark.parametrize(
    ("shape", "num", "message"),
    [
        ((2, 2, 5, 4), 1, "queries (2, 2, 5, 4) must be (B, H, T, 3), with the head_dim of this bank"),
        ((2, 3, 5, 3), 1, "queries have 3 heads, which must be a multiple of the bank's 2 key/value heads"),
        ((1, 2, 5, 3), 1, "queries have 1 rows, the bank has 2; pass rows= to say which"),
        ((2, 2, 5, 3), 0, "num_chunks (0) must be at least 1"),
    ],
)
def test_queries_that_do_not_fit_are_refused(shape, num, message):
    with pytest.raises(MemoryBankError) as caught:
        bank().search(torch.zeros(shape), num)
    assert str(caught.value) == message


def test_a_bank_of_another_backbone_is_refused_by_name():
    saved = bank(fingerprint="gpt2-abc").state_dict()
    with pytest.raises(MemoryBankError) as caught:
        bank(fingerprint="llama-def").load_state_dict(saved)
    assert str(caught.value) == (
        "saved bank is written by another backbone: its fingerprint is gpt2-abc, this bank's is llama-def; "
        "use the backbone that wrote it, or fill the bank anew"
    )
    bank().load_state_dict(saved)  # a bank that names no backbone takes any


def test_a_bank_of_another_shape_is_refused_with_both_values():
    with pytest.raises(MemoryBankError) as caught:
        bank(3).load_state_dict(bank(2).state_dict())
    assert str(caught.value) == (
        "saved bank is of another shape: its rows is 2, this bank's is 3; make the bank with rows=2 to load it"
    )


def test_a_slot_without_a_chunk_has_no_provenance():
    with pytest.raises(MemoryBankError, match=r"slot \(0\) of row 1 holds no chunk; slots in use: 0, counted from 0"):
        bank().provenance(1, 0)


def test_a_row_of_a_shared_bank_cannot_be_reset_alone():
    with pytest.raises(MemoryBankError, match=r"rows \(\[1\]\) of a shared bank cannot be reset alone; call reset\(\)"):
        bank(shared=True).reset(torch.tensor([1]))


def spoiled(which: int, number: float, token: int = 1) -> AttentionKV:
    """Keys (0) or values (1) of row 1 hold this number."""
    pair = [torch.ones(2, 2, 5, 3), torch.ones(2, 2, 5, 3)]
    pair[which][1, 0, token, 2] = number
    return AttentionKV(*pair)


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        (spoiled(0, float("nan")), {}, "keys of row 1 are not finite (they hold nan)"),
        (spoiled(1, -float("inf")), {}, "values of row 1 are not finite (they hold inf)"),
        (
            spoiled(1, -1e6),
            {"dtype": torch.float16},
            "values of row 1 reach 1e+06, more than torch.float16 holds",
        ),
        (spoiled(0, 1e6), {"key_dtype": torch.float16}, "keys of row 1 reach 1e+06, more than torch.float16 holds"),
        (spoiled(0, 3e38), {}, "keys of row 1 reach 3e+38, more than torch.float32 holds when 4 are added"),
    ],
)
def test_numbers_that_would_make_every_answer_nan_are_refused(given, settings, message):
    memory = bank(**settings)
    memory.add(kv(2, 2, 3, 3), documents=["a", "b"])
    before = memory.state_dict()
    for target in (memory, SessionMemory(bank(), memory), JoinedMemory([SessionMemory(None, bank(1, **settings))] * 1)):
        one = AttentionKV(given.keys[1:], given.values[1:]) if isinstance(target, JoinedMemory) else given
        with pytest.raises(MemoryBankError) as caught:
            target.add(one, documents=["c"] * len(one.keys))
        assert message.replace("row 1", f"row {len(one.keys) - 1}") in str(caught.value)
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


@pytest.mark.parametrize("name", ["storage", "keys", "tail"])
def test_a_saved_bank_with_such_numbers_is_refused(name):
    memory = bank()
    memory.add(kv(2, 2, 6, 3))
    state = memory.state_dict()
    (state if name == "tail" else state["slots"])[name].view(-1)[0] = float("inf")
    with pytest.raises(MemoryBankError, match=f"not finite .in {name}."):
        bank().load_state_dict(state)


def test_a_saved_bank_of_the_same_weights_is_loaded_with_a_model_that_knows_its_fingerprint():
    state = bank(fingerprint="old").state_dict()
    knows = SimpleNamespace(accepts={"old", "new"}.__contains__)
    bank(fingerprint="new").load_state_dict(state, model=knows)
    with pytest.raises(MemoryBankError, match="another backbone"):
        bank(fingerprint="new").load_state_dict(state, model=SimpleNamespace(accepts={"new"}.__contains__))


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(MemoryBankError, match=r"layer \(1\) must lie in 0..0"):
        bank().search(torch.zeros(2, 2, 1, 3), 1, layer=1)
