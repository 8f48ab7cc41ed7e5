"""Laws 4 and 11 over the whole family table and every kind of model, with empty, partial and full banks.

Cached decoding = full forward; left-padded = unpadded; a row of a batch = that row alone; beams cached = uncached;
asking twice gives the same answer twice.
"""

from typing import Any

import pytest
import torch
from tests.family_table import FAMILIES
from tests.generation.models import KINDS, ids, reader

from longmem import MemoryBank

FILLS = (0, 10, 80)  # tokens each row of the bank was given: it is empty, partly filled, and has lost its oldest
PADS = (3, 0, 2)
LENGTH = 8
ROWS = torch.arange(3)
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(params=list(FAMILIES), scope="module")
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=KINDS, scope="module")
def model(request: pytest.FixtureRequest, family: str) -> Any:
    return reader(request.param, family)


@pytest.fixture(scope="module")
def bank(model: Any) -> MemoryBank:
    made = MemoryBank.for_model(model, rows=3, capacity_tokens=64)
    for row, tokens in enumerate(FILLS):
        if tokens:
            made.add(model.encode(ids(1, tokens, seed=row)), rows=ROWS[row : row + 1])
    assert made.tokens.tolist() == [0, 10, 64]
    return made


@torch.no_grad()
def test_logits_do_not_depend_on_cache_padding_neighbours_or_asking_twice(model: Any, bank: MemoryBank) -> None:
    prompt = ids(3, LENGTH)
    whole = model(prompt, memory=bank).logits
    assert torch.equal(model(prompt, memory=bank).logits, whole)

    first = model(prompt[:, :5], memory=bank, use_cache=True)
    steps, cache = [first.logits], first.past_key_values
    for token in prompt[:, 5:].split(1, dim=1):
        steps.append(model(token, memory=bank, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-5, rtol=0)

    for row in range(3):
        alone = model(prompt[row : row + 1], memory=bank, memory_rows=ROWS[row : row + 1]).logits
        torch.testing.assert_close(alone[0], whole[row], atol=1e-5, rtol=0)

    mask = torch.cat((torch.zeros(3, 3), torch.ones(3, LENGTH)), dim=1).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = torch.cat((torch.zeros(3, 3, dtype=torch.long), prompt), dim=1)
    out = model(padded, attention_mask=mask, position_ids=positions, memory=bank)
    torch.testing.assert_close(out.logits[:, 3:], whole, atol=1e-5, rtol=0)


def test_generation_does_not_depend_on_cache_padding_or_neighbours(model: Any, bank: MemoryBank) -> None:
    """Prompts of unequal lengths; what is padded in the batch is not padded alone."""
    prompt, mask = ids(3, LENGTH), torch.ones(3, LENGTH, dtype=torch.long)
    for row, pads in enumerate(PADS):
        prompt[row, :pads], mask[row, :pads] = 0, 0
    together = model.generate(prompt, attention_mask=mask, memory=bank, **GREEDY)
    assert torch.equal(together, model.generate(prompt, attention_mask=mask, memory=bank, use_cache=False, **GREEDY))
    for row, pads in enumerate(PADS):
        alone = model.generate(prompt[row : row + 1, pads:], memory=bank, memory_rows=ROWS[row : row + 1], **GREEDY)
        assert torch.equal(alone[0], together[row, pads:])


def test_beams_with_memory_are_beams_without_cache(model: Any, bank: MemoryBank) -> None:
    settings = {**GREEDY, "num_beams": 2, "num_return_sequences": 2, "memory": bank}
    assert torch.equal(model.generate(ids(3, 6), **settings), model.generate(ids(3, 6), use_cache=False, **settings))
