"""The gate of a token: its laws."""

import pytest
import torch
from torch import Tensor

from longmem.modeling.attention import local_lse
from longmem.modeling.reading import TokenGate, competing, fuse

B, H, T, D = 2, 3, 5, 4


def _inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    queries, local, memory = (torch.randn(B, H, T, D, generator=generator) for _ in range(3))
    local_lse, memory_lse = (4 * torch.randn(B, H, T, generator=generator) for _ in range(2))
    found = torch.rand(B, H, T, generator=generator) < 0.7
    return queries, local, local_lse, memory * found[..., None], memory_lse.masked_fill(~found, -torch.inf), found


def test_competing_is_one_softmax_over_local_and_memory_scores_together() -> None:
    draw = torch.Generator().manual_seed(3)
    scores, gate = (torch.randn(B, H, T, 12, generator=draw) * 3).split((7, 5), dim=-1), torch.randn(H, generator=draw)
    values = torch.randn(B, H, 12, D, generator=draw)
    local, memory = (some.softmax(-1) @ part for some, part in zip(scores, values.split((7, 5), dim=2), strict=True))
    everywhere = torch.ones(B, H, T, dtype=torch.bool)
    logits = competing(*(some.logsumexp(-1) for some in scores), everywhere, gate)
    together = torch.cat((scores[0], scores[1] + gate.view(1, H, 1, 1)), dim=-1).softmax(-1) @ values
    torch.testing.assert_close(fuse(local, memory, everywhere, logits)[0], together)


def test_with_bias_zero_it_starts_at_one_softmax() -> None:
    _, _, local_lse, _, memory_lse, found = inputs = _inputs()
    expected = competing(local_lse, memory_lse, found, torch.zeros(H))
    torch.testing.assert_close(TokenGate(H, D)(*inputs)[found], expected[found])


def test_where_nothing_is_found_the_local_heads_stay_bit_for_bit_and_gradients_are_finite() -> None:
    gate, inputs = TokenGate(H, D), _inputs()
    local, memory, found = inputs[1], inputs[3], inputs[5]
    out, share = fuse(local, memory, found, gate(*inputs))
    assert torch.equal(out[~found], local[~found])
    assert (share[~found] == 0).all()
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gate.parameters())


def test_no_head_and_no_token_reads_another() -> None:
    gate, inputs = TokenGate(H, D), _inputs()
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    before, expected = gate(*inputs), torch.zeros(B, H, T, dtype=torch.bool)
    expected[0, 1, 2] = True
    for number in range(3):
        changed = [tensor.clone() for tensor in inputs]
        changed[number][0, 1, 2] += 1.0
        assert torch.equal(before != gate(*changed), expected)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("masked", ["causal", "boolean", "additive"])
@pytest.mark.parametrize("length", [1, 5, 9])
def test_the_log_sum_exp_of_local_scores_and_its_gradients(length: int, masked: str, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(5)
    queries = torch.randn(2, 6, length, 8, generator=generator, requires_grad=True)
    keys = torch.randn(2, 2, 9, 8, generator=generator, requires_grad=True)
    weights = torch.randn(2, 6, length, generator=generator)
    seen = torch.ones(length, 9, dtype=torch.bool).tril(9 - length).repeat(2, 1, 1, 1)
    if masked != "causal":
        seen[1, :, :, :2] = seen[1, :, :, :2] & (length > 8)  # pads on the left
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    found = local_lse(queries, keys, {"causal": None, "boolean": seen, "additive": additive}[masked], scaling=0.3,
                      softcap=softcap)  # fmt: skip
    scores = 0.3 * queries @ keys.repeat_interleave(3, dim=1).mT
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    expected = (scores + additive).logsumexp(-1)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad((each * weights).sum(), (queries, keys)) for each in (found, expected))
    torch.testing.assert_close(ours, theirs)
