"""Several segments in one step find what they would have found one after the other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longmem.errors import ConfigError, MemoryBankError
from longmem.memory import MemoryBank
from longmem.memory.lookahead import Arrival, LookaheadBank, spare_tokens
from longmem.types import AttentionKV, RetrievedMemory

H, HKV, D, S, T = 4, 2, 8, 4, 10


def kv(rows: int, draw: torch.Generator) -> AttentionKV:
    return AttentionKV(*(torch.randn(rows, HKV, T, D, generator=draw) for _ in range(2)))


def found(retrieved: RetrievedMemory) -> tuple[Tensor, Tensor]:
    """What attention sees of it: keys and values, and which are real."""
    mask = retrieved.mask
    return torch.cat((retrieved.keys, retrieved.values), -1) * mask[..., None], mask


def lookahead(rows: int, capacity: int, segments: int, boundary: str = "keep", shared: bool = False) -> LookaheadBank:
    spare = spare_tokens(rows, segments, T, S, shared=shared)
    bank = MemoryBank(rows, capacity + spare, HKV, D, S, shared=shared)
    return LookaheadBank(bank, segments=segments, segment_tokens=T, boundary=boundary)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 3),
    segments=st.integers(1, 4),
    capacity=st.sampled_from([S, 8, 20, 200]),
    boundary=st.sampled_from(["keep", "reset"]),
    shared=st.booleans(),
    ragged=st.booleans(),
)
def test_every_segment_finds_what_the_segments_before_it_left(
    seed: int, rows: int, segments: int, capacity: int, boundary: str, shared: bool, ragged: bool
) -> None:
    if shared:
        boundary = "keep"
    draw = torch.Generator().manual_seed(seed)
    ahead = lookahead(rows, capacity, segments, boundary, shared)
    one = MemoryBank(rows, capacity, HKV, D, S, shared=shared)
    texts, at = [0] * rows, [0] * rows
    for _ in range(4):
        parts, arrivals = [], []
        for _ in range(segments):
            starts = torch.rand(rows, generator=draw) < 0.3
            texts = [text + int(new) for text, new in zip(texts, starts, strict=True)]
            at = [0 if new else offset for offset, new in zip(at, starts, strict=True)]
            lengths = torch.randint(1, T + 1, (rows,), generator=draw) if ragged else torch.full((rows,), T)
            mask = torch.arange(T) < lengths[:, None]
            arrivals.append(Arrival([f"text {text}" for text in texts], list(at), starts, mask))
            at = [offset + int(length) for offset, length in zip(at, lengths, strict=True)]
            parts.append(kv(rows, draw))
        queries = torch.randn(segments * rows, H, T, D, generator=draw)
        ahead.begin(arrivals)
        ahead.offer(AttentionKV(torch.cat([part.keys for part in parts]), torch.cat([part.values for part in parts])))
        seen = found(ahead.search(queries, 3))
        ahead.commit()
        for number, (part, arrival) in enumerate(zip(parts, arrivals, strict=True)):
            starting = arrival.starts.nonzero().flatten()
            if len(starting):
                one.end_document(starting)
                if boundary == "reset":
                    one.reset(starting)
            lines = slice(number * rows, (number + 1) * rows)
            for mine, theirs in zip(seen, found(one.search(queries[lines], 3)), strict=True):
                torch.testing.assert_close(mine[lines], theirs)
            part = AttentionKV(part.keys, part.values, arrival.mask)
            one.add(part, documents=arrival.documents, offsets=arrival.offsets)
        assert ahead.tokens.tolist() == one.tokens.tolist()


def test_a_saved_bank_goes_on_as_if_nothing_had_been() -> None:
    draw = torch.Generator().manual_seed(0)
    first, second = lookahead(2, 20, 2, "reset"), lookahead(2, 20, 2, "reset")
    arrivals = [Arrival(["a", "b"], [0, 0], torch.tensor([True, False])) for _ in range(2)]
    queries = torch.randn(4, H, T, D, generator=draw)
    for step in range(4):
        if step == 2:
            second.load_state_dict(first.state_dict())
        both = AttentionKV(*(torch.cat((kv(2, draw).keys, kv(2, draw).keys)) for _ in range(2)))
        answers = []
        for bank in (first, second)[: 1 + (step >= 2)]:
            bank.begin(arrivals)
            bank.offer(both)
            answers.append(found(bank.search(queries, 2))[0])
            bank.commit()
        assert all(torch.equal(answers[0], other) for other in answers[1:])


def test_it_is_not_saved_in_the_middle_of_a_step() -> None:
    bank = lookahead(1, 20, 1)
    bank.begin([Arrival(["a"], [0], torch.tensor([True]))])
    assert bank.wants_kv
    bank.offer(kv(1, torch.Generator().manual_seed(0)))
    assert not bank.wants_kv
    with pytest.raises(MemoryBankError, match="call commit"):
        bank.state_dict()


def test_what_does_not_fit_a_step_is_refused() -> None:
    with pytest.raises(ConfigError, match="more than the 32 tokens"):
        LookaheadBank(MemoryBank(1, 32, HKV, D, S), segments=3, segment_tokens=T)
    bank = lookahead(2, 20, 2)
    with pytest.raises(MemoryBankError, match="2 segments of one step"):
        bank.begin([])
    with pytest.raises(MemoryBankError, match="without begin"):
        bank.offer(kv(4, torch.Generator()))
    bank.begin([Arrival(["a", "b"], [0, 0], torch.tensor([True, True]))] * 2)
    with pytest.raises(MemoryBankError, match="a step has 4: 2 segments of 2 rows"):
        bank.offer(kv(2, torch.Generator()))
    with pytest.raises(MemoryBankError, match="must be the 2 segments of all 2 rows"):
        bank.search(torch.zeros(2, H, T, D), 2)
    with pytest.raises(MemoryBankError, match="call the model first"):
        bank.commit()
