"""A text that is encoded once and asked many times holds what a bank would hold."""

from __future__ import annotations

import pytest
import torch
from tests.family_table import V, make_backbone

from longmem import ConfigError, LongMem, MemoryBank, MemoryBankError
from longmem.memory.encoded import EncodedText


@pytest.fixture(scope="module", params=[(2,), (0, 2)])
def model(request: pytest.FixtureRequest) -> LongMem:
    layers: tuple[int, ...] = request.param
    settings = {"chunk_size": 4, "num_retrieved": 8, "memory_size": 64}
    return LongMem.from_backbone(make_backbone("llama"), memory_layers=layers, **settings).eval()  # type: ignore[arg-type]


def text(seed: int, segments: int = 5) -> torch.Tensor:
    return torch.randint(3, V, (segments, 8), generator=torch.Generator().manual_seed(seed))


def test_it_holds_what_a_bank_of_the_same_segments_would_hold(model: LongMem) -> None:
    ids, hidden = text(0), text(1, 1)[0]
    encoded = EncodedText(model, ids)
    again = EncodedText(model, ids, encoded={name: part.clone() for name, part in encoded.state_dict().items()})
    queries = torch.randn(2, 4, 3, 8, generator=torch.Generator().manual_seed(2))
    before = encoded.storage.clone()
    with encoded.holding(1, 3, {2: hidden.tolist()}) as changed:
        for memory, segments in (
            (changed, [ids[1], hidden, ids[3]]),
            (again.run(1, 3), [ids[1], ids[2], ids[3]]),
            (again.run(0, 5, most_tokens=12), [ids[3, 4:], ids[4]]),
        ):
            if len(segments[0]) == 4:  # only its end is remembered, but it was encoded whole
                expected = MemoryBank.for_model(model, capacity_tokens=12)
                segments = [ids[3], ids[4]]
            else:
                expected = MemoryBank.for_model(model, capacity_tokens=64)
            for segment in segments:
                expected.add(model.encode(segment[None]))
            for layer in range(len(model.memory_layers)):
                found = memory.search(queries, 2, layer=layer)
                wanted = expected.search(queries, 2, torch.zeros(2, dtype=torch.long), layer=layer)
                assert torch.equal(found.scores, wanted.scores)
                assert torch.equal(found.keys, wanted.keys) and torch.equal(found.values, wanted.values)
    assert torch.equal(encoded.storage, before)
    assert again.run(1, 3).provenance(0, 5).start_token == 20


def test_what_does_not_fit_is_refused(model: LongMem) -> None:
    with pytest.raises(ConfigError, match=r"window \(6\) must be a multiple of chunk_size \(4\)"):
        EncodedText(model, text(0)[:, :6])
    with pytest.raises(MemoryBankError, match="row 0 has no chunk 6"):
        EncodedText(model, text(0)).run(1, 3).provenance(0, 6)
