"""Several memories searched as one: the best of all, rows over different banks, a session over a bank; and a text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.family_table import ids
from tests.generation.models import longmem
from tests.memory.test_bank import kv, queries

from longmem.errors import ConfigError, MemoryBankError
from longmem.memory.bank import MemoryBank
from longmem.memory.session import OVERLAY, EncodedText, JoinedMemory, SessionMemory
from longmem.types import RetrievedMemory


def bank(rows: int, tokens: int, seed: int = 0, **settings: object) -> MemoryBank:
    made = MemoryBank(rows, 64, 2, 3, 2, **settings)  # type: ignore[arg-type]
    if tokens:
        made.add(kv(rows, tokens, seed), documents=[f"seed {seed}"] * rows)
        made.end_document()
    return made


def seen(found: RetrievedMemory, *rows: int) -> list[torch.Tensor]:
    """Scores, mask, order of age, keys and values of some rows, or of all: not where they are stored."""
    each = list(rows or range(len(found.rows)))
    period, mask = found.period[each], found.mask[each]
    tokens = (part[each].float() * mask[..., None] for part in (found.keys, found.values))
    return [found.scores[each], mask, period[..., None] > period[..., None, :], *tokens]


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
        found = (memory.search(queries(2, length), num, rows) for memory in (session, together))
        torch.testing.assert_close(*map(seen, found))


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


def test_every_row_of_a_list_reads_its_own_bank() -> None:
    left, right = bank(1, 10, 1), bank(1, 4, 2, dtype=torch.float16)
    together = JoinedMemory([left, right, None, left])
    asked = queries(4)
    found = together.search(asked, 4)
    for row, one in enumerate(together.banks):
        if one is None:
            assert not found.chunk_mask[row].any()
            continue
        alone = one.search(asked[row : row + 1], 4)
        torch.testing.assert_close(seen(alone), seen(found, row))
        chunk = int(found.chunks[row, 0, 0, 0])
        assert together.provenance(row, chunk) == one.provenance(0, int(alone.chunks[0, 0, 0, 0]))
    assert found.memory_rows is not None and found.memory_rows.tolist() == [0, 1, 2, 3]
    beams = together.search(asked[[1, 1, 0]], 4, torch.tensor([1, 1, 0]))
    torch.testing.assert_close(seen(beams), seen(found, 1, 1, 0))


@pytest.mark.parametrize("layers", [(2,), (0, 2)])
def test_an_encoded_text_holds_what_a_bank_of_its_segments_would_also_while_some_are_others(layers, monkeypatch):
    monkeypatch.setattr("longmem.types.PERIOD_TOKENS", 8)
    model = longmem(chunk_size=4, memory_layers=layers)
    *segments, hidden = ids(6, 8)
    encoded, again = (EncodedText(model, torch.stack(segments)) for _ in range(2))
    asked, row = torch.randn(2, 4, 3, 8, generator=torch.Generator().manual_seed(2)), torch.zeros(2, dtype=torch.long)
    before = encoded.bank.storage.clone()
    with encoded.holding(1, 3, {2: hidden.tolist()}) as changed:
        for memory, text, capacity in (
            (changed, [segments[1], hidden, segments[3]], 64),
            (again.run(1, 3), segments[1:4], 64),
            (again.run(0, 5, most_tokens=8), segments[4:], 8),  # only its end is remembered
        ):
            expected = MemoryBank.for_model(model, capacity_tokens=capacity)
            for segment in text:
                expected.add(model.encode(segment[None]))
            for layer in range(len(layers)):
                found, wanted = (each.search(asked, 2, row, layer=layer) for each in (memory, expected))
                torch.testing.assert_close(seen(found), seen(wanted), rtol=0, atol=0)
                assert torch.equal(found.period, wanted.period)
    assert torch.equal(encoded.bank.storage, before)
    assert again.run(1, 3).provenance(0, 5).start_token == 20
    with pytest.raises(MemoryBankError, match="is not in row 0; it holds 0 to 5"):
        again.run(1, 3).provenance(0, 6)
    with pytest.raises(ConfigError, match=r"window \(6\) must be a multiple of chunk_size \(4\)"):
        EncodedText(model, ids(5, 6))
