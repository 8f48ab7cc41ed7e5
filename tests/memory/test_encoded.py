"""A text in memory is what a bank of its segments is, also while some of them are others."""

from __future__ import annotations

import pytest
import torch
from tests.family_table import V
from tests.generation.models import longmem

from longmem import ConfigError, MemoryBank, MemoryBankError
from longmem.memory.session import EncodedText


def text(seed: int, segments: int = 5) -> torch.Tensor:
    return torch.randint(3, V, (segments, 8), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layers", [(2,), (0, 2)])
def test_it_holds_what_a_bank_of_the_same_segments_would_hold(layers, monkeypatch):
    monkeypatch.setattr("longmem.types.PERIOD_TOKENS", 8)
    model = longmem(chunk_size=4, memory_layers=layers)
    ids, hidden = text(0), text(1, 1)[0]
    encoded, again = EncodedText(model, ids), EncodedText(model, ids)
    queries = torch.randn(2, 4, 3, 8, generator=torch.Generator().manual_seed(2))
    before = encoded.bank.storage.clone()
    with encoded.holding(1, 3, {2: hidden.tolist()}) as changed:
        for memory, segments, capacity in (
            (changed, [ids[1], hidden, ids[3]], 64),
            (again.run(1, 3), [ids[1], ids[2], ids[3]], 64),
            (again.run(0, 5, most_tokens=12), [ids[3], ids[4]], 12),  # only its end is remembered
        ):
            expected = MemoryBank.for_model(model, capacity_tokens=capacity)
            for segment in segments:
                expected.add(model.encode(segment[None]))
            for layer in range(len(model.memory_layers)):
                found = memory.search(queries, 2, torch.zeros(2, dtype=torch.long), layer=layer)
                wanted = expected.search(queries, 2, torch.zeros(2, dtype=torch.long), layer=layer)
                assert torch.equal(found.scores, wanted.scores)
                assert torch.equal(found.keys, wanted.keys) and torch.equal(found.values, wanted.values)
                if capacity == 64:
                    assert torch.equal(found.period, wanted.period) and len(found.period.unique()) > 1
    assert torch.equal(encoded.bank.storage, before)
    assert again.run(1, 3).provenance(0, 5).start_token == 20
    with pytest.raises(MemoryBankError, match="is not in row 0; it holds 0 to 5"):
        again.run(1, 3).provenance(0, 6)
    with pytest.raises(ConfigError, match=r"window \(6\) must be a multiple of chunk_size \(4\)"):
        EncodedText(model, ids[:, :6])
