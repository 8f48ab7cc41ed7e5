"""transformers' own ``generate`` over backbone, SideNet and memory: one cache serves both networks."""

from __future__ import annotations

import pytest
import torch
from tests.family_table import FAMILIES, V, make_backbone

from longmem import LongMem, MemoryBank


@pytest.mark.parametrize("name", list(FAMILIES))
def test_cached_generation_with_memory_equals_uncached(name: str) -> None:
    model = LongMem.from_backbone(make_backbone(name), chunk_size=2, num_retrieved=8).eval()
    random = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, V, (2, 6), generator=random)
    bank = MemoryBank.for_model(model, rows=2, capacity_tokens=64)
    bank.add(model.encode(torch.randint(3, V, (2, 20), generator=random)))
    settings = {"max_new_tokens": 5, "do_sample": False, "memory": bank, "memory_rows": torch.tensor([0, 1])}
    for beams in (1, 2):
        plain = model.generate(prompt, num_beams=beams, use_cache=False, pad_token_id=0, **settings)
        cached = model.generate(prompt, num_beams=beams, pad_token_id=0, **settings)
        assert torch.equal(plain, cached)
