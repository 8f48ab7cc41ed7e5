"""The fused kernels against plain torch, on a GPU or, with TRITON_INTERPRET=1, interpreted on the CPU."""

from __future__ import annotations

import os
from types import ModuleType

import pytest
import torch
from torch import Tensor

from longmem.modeling import attention
from longmem.modeling.attention import memory_attention
from longmem.types import RetrievedMemory

pytest.importorskip("triton", reason="triton is not installed; it comes with torch's builds for CUDA")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU, or TRITON_INTERPRET=1 to interpret the kernels"
)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    from longmem.modeling import memory_attention_triton

    monkeypatch.setattr(attention, "_KERNELS_RUN_ON", DEVICE)
    return memory_attention_triton


def searched(
    batch: int = 2, heads: int = 4, length: int = 3, chunks: int = 5, *, size: int = 4, dim: int = 16,
    heads_kv: int = 2, layers: int = 1, layer: int = 0, dtype: torch.dtype = torch.float32, found: float = 0.8,
    full: bool = False,
) -> RetrievedMemory:  # fmt: skip
    """A memory of 3 rows and 11 slots with short chunks, and random chunks of it; the first query found nothing."""
    draw = torch.Generator().manual_seed(batch * length + chunks)
    ids = torch.randint(11, (batch, heads, length, chunks), generator=draw)
    mask = torch.rand(ids.shape, generator=draw) < found
    mask.view(-1, chunks)[0] = False
    lengths = torch.randint(0, size + 1, (3, 11), generator=draw)
    storage = torch.randn(3, 11, layers * heads_kv, 2, size, dim, generator=draw)
    return RetrievedMemory(
        chunk_ids=ids.to(DEVICE),
        chunk_mask=(mask | full).to(DEVICE),
        scores=torch.zeros(ids.shape, device=DEVICE),
        storage=storage.to(DEVICE, dtype),
        lengths=(torch.full_like(lengths, size) if full else lengths).to(DEVICE),
        rows=torch.randint(3, (batch,), generator=draw).to(DEVICE),
        version=1,
        live_version=lambda: 1,
        first_head=layer * heads_kv,
        layer_heads=None if layers == 1 else heads_kv,
    )


def answers(
    retrieved: RetrievedMemory,
    asking: torch.dtype,
    softcap: float | None,
    transposed: bool = False,
    recency: float = 0.0,
) -> list[Tensor]:
    """Output, log-sum-exp and gradient of a loss of both."""
    batch, heads, length, _ = retrieved.chunk_ids.shape
    draw = torch.Generator().manual_seed(9)
    queries, weights = torch.randn(2, batch, heads, length, retrieved.storage.shape[-1], generator=draw).to(DEVICE)
    queries = queries.to(asking)
    if transposed:
        queries = queries.transpose(1, 2).contiguous().transpose(1, 2)
    queries.requires_grad_()
    out, lse, found, _ = memory_attention(queries, retrieved, scaling=0.3, softcap=softcap, recency=recency)
    loss = (out.float() * weights).sum() + lse[found].sin().sum()
    return [out, lse, *torch.autograd.grad(loss, queries)]


def compare(kernels, monkeypatch, retrieved, asking=torch.float32, softcap=None, transposed=False, recency=0.0):
    ran = []
    with monkeypatch.context() as patch:
        launch = kernels._launch
        patch.setattr(kernels, "_launch", lambda *args: (ran.append(1), launch(*args)))
        fused = answers(retrieved, asking, softcap, transposed, recency)
    assert len(ran) == 2
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "ENABLED", False)
        plain = answers(retrieved, asking, softcap, recency=recency)
    exact = asking == torch.float32
    for ours, reference in zip(fused, plain, strict=True):
        assert ours.dtype == reference.dtype
        torch.testing.assert_close(ours, reference, atol=1e-5 if exact else 2e-2, rtol=1e-5 if exact else 2e-2)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"length": 1, "batch": 1},
        {"length": 7, "chunks": 1},
        {"chunks": 16, "dim": 64, "heads": 3, "heads_kv": 3},
        {"chunks": 19, "dim": 64, "size": 8, "length": 2},
        {"heads": 6, "heads_kv": 2, "layers": 3, "layer": 1},
        {"heads": 2, "heads_kv": 1, "layers": 2, "layer": 1, "size": 1, "dim": 2},
        {"dim": 128, "size": 32, "length": 2},
        {"full": True},
        {"found": 0.0},
    ],
    ids=str,
)
def test_outputs_and_gradient_equal_those_of_plain_torch(kernels, monkeypatch, shape):
    compare(kernels, monkeypatch, searched(**shape), recency=2.0)
    if not shape:
        compare(kernels, monkeypatch, searched())
        compare(kernels, monkeypatch, searched(), softcap=1.5, transposed=True, recency=2.0)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asking", [torch.float32, torch.bfloat16])
def test_half_precision_is_computed_in_float32(kernels, monkeypatch, stored, asking):
    compare(kernels, monkeypatch, searched(dtype=stored), asking)


@pytest.mark.parametrize("shape", [{"dim": 12}, {"size": 3}, {"dtype": torch.float64}], ids=str)
def test_other_shapes_and_double_precision_stay_with_plain_torch(kernels, shape):
    retrieved = searched(**shape)
    queries = torch.zeros(*retrieved.chunk_ids.shape[:3], retrieved.storage.shape[-1], device=DEVICE)
    assert attention._kernels(queries, retrieved.storage) is None
    assert attention._kernels(torch.zeros(1, device=DEVICE), searched().storage) is kernels


def test_where_triton_fails_plain_torch_takes_over(kernels, monkeypatch, caplog):
    def fail(*args: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    kernels._compiles.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_double", {(1,): fail})
        assert attention._kernels(torch.zeros(1, device=DEVICE), searched().storage) is None
    assert "Failed to find C compiler" in caplog.text
    kernels._compiles.cache_clear()
