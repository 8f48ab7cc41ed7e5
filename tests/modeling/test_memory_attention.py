"""Attention over retrieved chunks against the same attention over copies, and its gradient against autograd's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from longmem.errors import MemoryBankError
from longmem.memory import MemoryBank
from longmem.modeling import attention
from longmem.modeling.attention import memory_attention
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


def filled(dtype: torch.dtype = torch.float32) -> MemoryBank:
    """Two heads of 5 numbers; its last chunk is short."""
    bank = MemoryBank(1, 40, 2, 5, 4, dtype=dtype)
    bank.add(AttentionKV(*drawn(2, 1, 2, 14, 5, seed=14)))
    bank.end_document()
    return bank


def asked(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return drawn(*shape).to(dtype).requires_grad_()


@settings(max_examples=40, deadline=None)
@given(
    rows=some.integers(1, 3),
    heads_kv=some.integers(1, 2),
    groups=some.integers(1, 3),
    length=some.integers(1, 6),
    size=some.integers(1, 4),
    num=some.integers(1, 6),
    block=some.sampled_from([1, 500, 1 << 20]),
    softcap=some.sampled_from([None, 2.0]),
    recency=some.sampled_from([0.0, 1.5]),
    temperature=some.sampled_from([1.0, 0.5]),
)
def test_outputs_and_gradient_equal_those_over_copies(
    rows, heads_kv, groups, length, size, num, block, softcap, recency, temperature
):
    bank = MemoryBank(rows, 3 * size, heads_kv, 3, size, dtype=torch.float64)
    filling = 3 * size + 1
    keys, values = drawn(2, rows, heads_kv, filling, 3, seed=size).float()
    real = torch.arange(filling) < torch.tensor([filling, 0, size + 1])[:rows, None]
    for name, some_of_it in (("first", slice(0, size + 1)), ("second", slice(size + 1, filling))):
        part = AttentionKV(keys[:, :, some_of_it], values[:, :, some_of_it], real[:, some_of_it])
        bank.add(part, documents=[name] * rows)
    bank.end_document()
    queries = asked(rows, heads_kv * groups, length, 3, dtype=torch.float64)
    retrieved = bank.search(queries, num)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(attention._BLOCK_BYTES, "cpu", block)
        how = {"softcap": softcap, "recency": recency, "temperature": temperature}
        ours = memory_attention(queries, retrieved, scaling=0.4, **how)
        out, lse, found = over_copies(queries, retrieved, 0.4, **how)
        assert torch.equal(ours.found, found)
        close = {"atol": 1e-5, "rtol": 1e-5} if recency else {}  # scores by mean keys are in float32
        torch.testing.assert_close(ours.out, out, **close)
        torch.testing.assert_close(ours.lse[found], lse[found], **close)
        assert (ours.lse[~found] == -torch.inf).all()
        weights = torch.randn_like(out)
        (mine,) = torch.autograd.grad((ours.out * weights).sum() + ours.lse[found].sin().sum(), queries)
    (reference,) = torch.autograd.grad((out * weights).sum() + lse[found].sin().sum(), queries)
    torch.testing.assert_close(mine, reference, **close)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asking", [torch.float32, torch.bfloat16])
def test_half_precision_is_computed_in_float32(stored, asking):
    queries = asked(1, 4, 6, 5, dtype=asking)
    retrieved = filled(stored).search(queries, 3)
    result = memory_attention(queries, retrieved, scaling=0.4)
    out, lse, _ = over_copies(queries.float(), retrieved, 0.4, None)
    assert (result.out.dtype, result.lse.dtype) == (asking, torch.float32)
    torch.testing.assert_close(
        result.out.float(), out.to(asking).float(), atol=1e-6, rtol=1e-2 if asking != torch.float32 else 1e-5
    )
    torch.testing.assert_close(result.lse, lse)
    result.out.float().sum().backward()
    assert queries.grad.dtype == asking


def test_autocast_changes_nothing():
    bank, queries = filled(), asked(1, 4, 6, 5)
    retrieved = bank.search(queries, 3)
    plain = memory_attention(queries, retrieved, scaling=0.4)
    (reference,) = torch.autograd.grad(plain.out.sum(), queries)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = bank.search(queries, 3)
        assert torch.equal(again.chunk_ids, retrieved.chunk_ids)
        cast = memory_attention(queries, again, scaling=0.4)
        (gradient,) = torch.autograd.grad(cast.out.sum(), queries)
    assert torch.equal(cast.out, plain.out)
    assert torch.equal(gradient, reference)


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
