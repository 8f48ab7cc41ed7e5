"""Attention over retrieved chunks against the same over copies, local scores, and how both are mixed."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from longmem.errors import MemoryBankError
from longmem.memory import MemoryBank
from longmem.modeling import attention
from longmem.modeling.attention import local_lse, memory_attention
from longmem.modeling.reading import TokenGate, competing, fuse
from longmem.types import AttentionKV, RetrievedMemory


def recency_by_pairs(retrieved: RetrievedMemory, scaling: float, softcap: float | None, recency: float) -> Tensor:
    """What is added to the scores of chunks, every pair of two by itself."""
    by_mean_key = retrieved.scores.double() * scaling
    if softcap is not None:
        by_mean_key = softcap * torch.tanh(by_mean_key / softcap)
    alike = torch.exp(by_mean_key[..., None, :] - by_mean_key[..., :, None]).clamp(max=1)
    newer = retrieved.period[..., None, :] > retrieved.period[..., :, None]
    lost = recency * (alike * newer).amax(-1)
    before, after = (
        each.exp().masked_fill(~retrieved.chunk_mask, 0).sum(-1, keepdim=True)
        for each in (by_mean_key, by_mean_key - lost)
    )
    return ((before / after).log() - lost).masked_fill(~retrieved.chunk_mask, 0).float()


def over_copies(
    queries: Tensor,
    retrieved: RetrievedMemory,
    scaling: float,
    softcap: float | None,
    recency: float = 0.0,
    temperature: float = 1.0,
):
    """The plain formula over (B, H, T, K, D) copies; differentiable by autograd."""
    keys, values = (part.to(queries.dtype) for part in (retrieved.keys, retrieved.values))
    scores = torch.einsum("bhtd,bhtkd->bhtk", queries, keys) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    bonus = recency_by_pairs(retrieved, scaling, softcap, recency)
    scores = scores + bonus.repeat_interleave(retrieved.chunk_size, dim=-1)
    found, lowest = retrieved.mask.any(-1), torch.finfo(scores.dtype).min
    shares = (scores / temperature).masked_fill(~retrieved.mask, lowest).softmax(-1)
    out = torch.einsum("bhtk,bhtkd->bhtd", shares, values) * found[..., None]
    return out, scores.masked_fill(~retrieved.mask, lowest).logsumexp(-1), found


def drawn(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def searched(
    batch: int = 2, heads: int = 4, length: int = 3, chunks: int = 5, *, size: int = 4, dim: int = 16,
    heads_kv: int = 2, layers: int = 1, layer: int = 0, dtype: torch.dtype = torch.float32, found: float = 0.8,
    device: str = "cpu",
) -> RetrievedMemory:  # fmt: skip
    """A memory of 3 rows and 23 slots with short chunks, and random chunks of it; the first query found nothing."""
    draw = torch.Generator().manual_seed(batch * length + chunks)
    ids = torch.rand(batch, heads, length, 23, generator=draw).argsort(-1)[..., :chunks]
    mask = torch.rand(ids.shape, generator=draw) < found
    mask.view(-1, chunks)[0] = False
    return RetrievedMemory(
        chunk_ids=ids.to(device),
        chunk_mask=mask.to(device),
        scores=torch.randn(ids.shape, generator=draw).masked_fill(~mask, 0.0).to(device),
        lengths=torch.randint(0, size + 1, (3, 23), generator=draw).to(device),
        periods=torch.randint(0, 4, (3, 23), generator=draw).to(device),
        rows=torch.randint(3, (batch,), generator=draw).to(device),
        storage=torch.randn(3, 23, layers * heads_kv, 2, size, dim, generator=draw).to(device, dtype),
        version=1,
        live_version=lambda: 1,
        first_head=layer * heads_kv,
        layer_heads=None if layers == 1 else heads_kv,
    )


def check_against_copies(retrieved: RetrievedMemory, asking: torch.dtype, recency: float, **how: Any) -> None:
    """Output, log-sum-exp and the gradient of both, for random queries of a dtype."""
    drawn_as = drawn(2, *retrieved.chunk_ids.shape[:3], retrieved.storage.shape[-1]).to(retrieved.rows.device)
    queries, weights = drawn_as[0].to(asking).transpose(1, 2).contiguous().transpose(1, 2), drawn_as[1]
    wide, queries = queries.double().requires_grad_(), queries.requires_grad_()
    ours = memory_attention(queries, retrieved, scaling=0.3, recency=recency, **how)
    out, lse, found = over_copies(wide, retrieved, 0.3, recency=recency, **how)
    (mine,) = torch.autograd.grad((ours.out * weights).sum() + ours.lse[found].sin().sum(), queries)
    (reference,) = torch.autograd.grad((out * weights).sum() + lse[found].sin().sum(), wide)
    exact = asking is torch.float64 and not recency  # scores by mean keys are in float32
    close = {} if exact else {"atol": 2e-5, "rtol": 1e-5}
    rounded = {"atol": 5e-2, "rtol": 5e-2} if asking is torch.bfloat16 else close
    assert (ours.out.dtype, mine.dtype) == (asking, asking)
    assert ours.lse.dtype == (torch.float64 if torch.float64 in (asking, retrieved.storage.dtype) else torch.float32)
    assert torch.equal(ours.found, found) and (ours.lse[~found] == -torch.inf).all()
    torch.testing.assert_close(ours.lse[found].double(), lse[found], **close)
    torch.testing.assert_close(ours.out.double(), out, **rounded)
    torch.testing.assert_close(mine.double(), reference, **rounded)


def filled() -> MemoryBank:
    """Two heads of 5 numbers; its last chunk is short."""
    bank = MemoryBank(1, 40, 2, 5, 4)
    bank.add(AttentionKV(*drawn(2, 1, 2, 14, 5, seed=14)))
    bank.end_document()
    return bank


def asked(*shape: int) -> Tensor:
    return drawn(*shape).float().requires_grad_()


DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@settings(max_examples=80, deadline=None)
@given(
    batch=some.integers(1, 3),
    heads_kv=some.integers(1, 2),
    groups=some.integers(1, 3),
    length=some.integers(1, 6),
    chunks=some.integers(1, 6),
    size=some.integers(1, 4),
    place=some.sampled_from([(1, 0), (2, 0), (2, 1)]),
    found=some.sampled_from([0.0, 0.5, 1.0]),
    block=some.sampled_from([1, 500, 1 << 20]),
    softcap=some.sampled_from([None, 2.0]),
    recency=some.sampled_from([0.0, 1.5]),
    temperature=some.sampled_from([1.0, 0.5]),
    asking=some.sampled_from(DTYPES),
    stored=some.sampled_from(DTYPES),
)
def test_outputs_and_gradient_equal_those_over_copies(
    batch, heads_kv, groups, length, chunks, size, place, found, block, softcap, recency, temperature, asking, stored
):
    retrieved = searched(
        batch, heads_kv * groups, length, chunks, size=size, dim=3, heads_kv=heads_kv, layers=place[0], layer=place[1],
        dtype=stored, found=found,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(attention._BLOCK_BYTES, "cpu", block)
        check_against_copies(retrieved, asking, recency, softcap=softcap, temperature=temperature)


def test_autocast_changes_nothing():
    bank, queries, seen = filled(), asked(1, 4, 6, 5), []
    for cast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            retrieved = bank.search(queries, 3)
            out = memory_attention(queries, retrieved, scaling=0.4).out
            seen.append((retrieved.chunk_ids, out, *torch.autograd.grad(out.sum(), queries)))
    assert all(map(torch.equal, *seen))


def test_writing_between_forward_and_backward_is_refused():
    bank, queries = filled(), asked(1, 2, 3, 5)
    result = memory_attention(queries, bank.search(queries, 2), scaling=0.4)
    bank.add(AttentionKV(torch.zeros(1, 2, 4, 5), torch.zeros(1, 2, 4, 5)))
    with pytest.raises(MemoryBankError, match=r"\(write 2 was read, now it is 3\); call bank.add after backward$"):
        result.out.sum().backward()


def test_copies_per_query_never_exist_as_a_whole():
    bank = MemoryBank(1, 4096, 4, 16)
    bank.add(AttentionKV(torch.randn(1, 4, 4096, 16), torch.randn(1, 4, 4096, 16)))
    queries = asked(1, 4, 512, 16)
    retrieved = bank.search(queries, 16)
    copies = 4 * 512 * 64 * 16 * 4  # bytes of the keys of every query

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for each in result if isinstance(result, tuple | list) else (result,):
                if isinstance(each, Tensor) and each.untyped_storage().data_ptr() != retrieved.storage.data_ptr():
                    self.seen = max(self.seen, each.untyped_storage().nbytes())
            return result

    with Largest() as watch:
        memory_attention(queries, retrieved, scaling=0.25).out.sum().backward()
    assert 0 < watch.seen <= copies / 2


# attention over the segment itself, and the mix of both


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("masked", ["causal", "boolean", "additive"])
@pytest.mark.parametrize("length", [1, 5, 9])
def test_the_log_sum_exp_of_local_scores_and_its_gradients(length, masked, softcap):
    queries = drawn(2, 6, length, 8, seed=5).float().requires_grad_()
    keys, weights = drawn(2, 2, 9, 8, seed=6).float().requires_grad_(), drawn(2, 6, length).float()
    seen = torch.ones(length, 9, dtype=torch.bool).tril(9 - length).repeat(2, 1, 1, 1)
    if masked != "causal":
        seen[1, :, :, :2] = seen[1, :, :, :2] & (length > 8)  # pads on the left
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    mask = {"causal": None, "boolean": seen, "additive": additive}[masked]
    found = local_lse(queries, keys, mask, scaling=0.3, softcap=softcap)
    scores = 0.3 * queries @ keys.repeat_interleave(3, dim=1).mT
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    expected = (scores + additive).logsumexp(-1)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad((each * weights).sum(), (queries, keys)) for each in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_competing_is_one_softmax_over_local_and_memory_scores_together():
    scores, values = (drawn(2, 3, 5, 12, seed=3) * 3).float().split((7, 5), dim=-1), drawn(2, 3, 12, 4).float()
    gate, everywhere = drawn(3).float(), torch.ones(2, 3, 5, dtype=torch.bool)
    local, memory = (some.softmax(-1) @ part for some, part in zip(scores, values.split((7, 5), dim=2), strict=True))
    logits = competing(*(some.logsumexp(-1) for some in scores), everywhere, gate)
    together = torch.cat((scores[0], scores[1] + gate.view(1, 3, 1, 1)), dim=-1).softmax(-1) @ values
    torch.testing.assert_close(fuse(local, memory, everywhere, logits)[0], together)


def test_a_token_gate_starts_at_one_softmax_keeps_tokens_and_heads_apart_and_changes_nothing_where_nothing_is_found():
    queries, local, memory = drawn(3, 2, 3, 5, 4).float()
    (local_lse, memory_lse), found = 4 * drawn(2, 2, 3, 5).float(), drawn(2, 3, 5, seed=8) < 0.5
    memory_lse[~found] = -torch.inf
    gate, inputs = TokenGate(3, 4), (queries, local, local_lse, memory, memory_lse, found)
    before = gate(*inputs)
    torch.testing.assert_close(before[found], competing(local_lse, memory_lse, found, torch.zeros(3))[found])
    out, share = fuse(local, memory, found, before)
    assert torch.equal(out[~found], local[~found]) and (share[~found] == 0).all()
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gate.parameters())
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.add_(drawn(*parameter.shape))
    before, elsewhere = gate(*inputs), torch.ones(2, 3, 5, dtype=torch.bool)
    elsewhere[0, 1, 2] = False
    for number in range(4):
        changed = [tensor.clone() for tensor in inputs]
        changed[number][0, 1, 2] += 1.0
        assert torch.equal(before == gate(*changed), elsewhere)
