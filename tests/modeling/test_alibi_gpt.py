"""The paper's backbone as a transformers model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from longmem import AlibiGPTConfig, AlibiGPTForCausalLM
from longmem.modeling.alibi_gpt import alibi_slopes


@pytest.fixture
def model() -> AlibiGPTForCausalLM:
    torch.manual_seed(0)
    config = AlibiGPTConfig(vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=6)
    made = AlibiGPTForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.2)
    return made


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 50, (2, 11), generator=torch.Generator().manual_seed(0))


def test_slopes_of_six_heads_are_those_of_four_and_two_in_between() -> None:
    expected = torch.tensor([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    torch.testing.assert_close(alibi_slopes(6), expected)


def test_paper_size_has_the_papers_parameters() -> None:
    with torch.device("meta"):
        paper = AlibiGPTForCausalLM(AlibiGPTConfig())
    assert sum(p.numel() for p in paper.parameters()) == 407_072_768


def test_token_by_token_with_a_cache_equals_one_forward(model: AlibiGPTForCausalLM, ids: Tensor) -> None:
    whole, cache, steps = model(ids).logits, None, []
    for position in range(ids.shape[1]):
        out = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=1e-5)


def test_left_padded_equals_unpadded(model: AlibiGPTForCausalLM, ids: Tensor) -> None:
    padded = torch.cat([torch.ones(2, 4, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(2, 4, dtype=torch.long), torch.ones_like(ids)], 1)
    torch.testing.assert_close(
        model(padded, attention_mask=mask).logits[:, 4:], model(ids).logits, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("implementation", [None, "static"])
def test_generation_with_and_without_a_cache_agree(
    model: AlibiGPTForCausalLM, ids: Tensor, implementation: str | None
) -> None:
    plain = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)
    cached = model.generate(ids, max_new_tokens=8, do_sample=False, cache_implementation=implementation)
    assert torch.equal(plain, cached)


def test_eager_attention_equals_sdpa(model: AlibiGPTForCausalLM, ids: Tensor) -> None:
    fused = model(ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, fused, atol=1e-5, rtol=1e-5)


def test_saved_and_loaded_by_the_auto_class(model: AlibiGPTForCausalLM, ids: Tensor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, AlibiGPTForCausalLM)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
