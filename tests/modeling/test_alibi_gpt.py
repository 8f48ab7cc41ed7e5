"""The paper's backbone, beside the laws that it shares with all families."""

import torch
from tests.family_table import ids, make_backbone

from longmem.modeling.alibi_gpt import alibi_slopes


def test_slopes_of_six_heads_are_those_of_four_and_two_in_between() -> None:
    expected = torch.tensor([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    torch.testing.assert_close(alibi_slopes(6), expected)


@torch.no_grad()
def test_eager_attention_equals_sdpa() -> None:
    model = make_backbone("alibi_gpt")
    fused = model(ids()).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids()).logits, fused, atol=1e-5, rtol=1e-5)
