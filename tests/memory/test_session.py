"""Several memories searched as one: the best of all, rows over different banks, a session over a bank."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.memory.test_bank import kv, queries

from longmem.memory.bank import MemoryBank
from longmem.memory.session import OVERLAY, JoinedMemory, SessionMemory
from longmem.types import RetrievedMemory


def bank(rows: int, tokens: int, seed: int = 0, **settings: object) -> MemoryBank:
    made = MemoryBank(rows, 64, 2, 3, 2, **settings)  # type: ignore[arg-type]
    if tokens:
        made.add(kv(rows, tokens, seed), documents=[f"seed {seed}"] * rows)
        made.end_document()
    return made


def same(left: RetrievedMemory, right: RetrievedMemory) -> bool:
    """Equal masks, keys, values and order of age; scores but for rounding. Chunk ids and storage may differ."""
    torch.testing.assert_close(left.scores, right.scores)
    assert torch.equal(*(each.period[..., None] > each.period[..., None, :] for each in (left, right)))
    assert torch.equal(left.mask, right.mask)
    assert torch.equal(left.keys[left.mask], right.keys[right.mask])
    return torch.equal(left.values[left.mask], right.values[right.mask])


def of_row(found: RetrievedMemory, row: int) -> RetrievedMemory:
    cut = {name: getattr(found, name)[row : row + 1] for name in ("chunk_ids", "chunk_mask", "scores", "rows")}
    return RetrievedMemory(
        **cut, storage=found.storage, lengths=found.lengths, version=0, live_version=lambda: 0, sources=found.sources
    )


@settings(max_examples=40, deadline=None)
@given(below=st.integers(0, 20), own=st.integers(0, 20), num=st.integers(1, 12), length=st.integers(1, 4))
def test_a_session_over_a_bank_finds_what_one_bank_of_both_would(below: int, own: int, num: int, length: int) -> None:
    base, together = bank(2, below, 1), bank(2, below, 1)
    session = SessionMemory(base, bank(2, 0))
    if own:
        for memory in (session, together):
            memory.add(kv(2, own, 2), documents=["new"] * 2)
            memory.end_document()
    for rows in (None, torch.tensor([1, 0])):
        assert same(session.search(queries(2, length), num, rows), together.search(queries(2, length), num, rows))


def test_chunks_of_a_session_are_told_apart_from_those_below_and_its_writes_are_noticed() -> None:
    session = SessionMemory(bank(1, 8, 1), bank(1, 0))
    found = session.search(queries(1), 4)
    assert (found.chunks < OVERLAY).all() and found.live_version() == found.version
    session.add(kv(1, 8, 2), documents=["spoken"], ids=[torch.arange(8)])
    found = session.search(queries(1), 8)
    assert set(found.chunks.flatten().tolist()) == {*range(4), *range(OVERLAY, OVERLAY + 4)}
    assert [session.provenance(0, n).document for n in (3, OVERLAY)] == ["seed 1", "spoken"]
    assert int(session.tokens[0]) == 8
    session.drop()
    assert found.live_version() != found.version
    assert int(session.tokens[0]) == 0 and (session.search(queries(1), 4).chunks < OVERLAY).all()


def test_a_session_over_nothing_is_a_bank() -> None:
    session, plain = SessionMemory(None, bank(2, 0)), bank(2, 9, 3)
    assert not session.search(queries(2), 4).mask.any()
    session.add(kv(2, 9, 3), documents=["seed 3"] * 2)
    session.end_document()
    assert same(session.search(queries(2), 4), plain.search(queries(2), 4))
    assert session.provenance(1, 0).document == "seed 3"


def test_every_row_of_a_list_reads_its_own_bank() -> None:
    left, right = bank(1, 10, 1), bank(1, 4, 2, dtype=torch.float16)
    together = JoinedMemory([left, right, None, left])
    asked = queries(4)
    found = together.search(asked, 4)
    for row, one in enumerate((left, right, None, left)):
        if one is None:
            assert not found.chunk_mask[row].any()
            continue
        alone = one.search(asked[row : row + 1], 4)
        assert same(alone, of_row(found, row))
        chunk = int(found.chunks[row, 0, 0, 0])
        assert together.provenance(row, chunk) == one.provenance(0, int(alone.chunks[0, 0, 0, 0]))
    assert found.memory_rows is not None and found.memory_rows.tolist() == [0, 1, 2, 3]
    beams = together.search(asked[[1, 1, 0]], 4, torch.tensor([1, 1, 0]))
    assert same(of_row(beams, 0), of_row(found, 1)) and same(of_row(beams, 2), of_row(found, 0))
