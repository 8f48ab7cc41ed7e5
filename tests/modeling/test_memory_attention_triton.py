"""The fused kernels against plain torch, on a GPU or, with TRITON_INTERPRET=1, interpreted on the CPU."""

import os
from types import ModuleType

import pytest
import torch
from tests.modeling.test_memory_attention import over_copies

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
) -> RetrievedMemory:  # fmt: skip
    """A memory of 3 rows and 23 slots with short chunks, and random chunks of it; the first query found nothing."""
    draw = torch.Generator().manual_seed(batch * length + chunks)
    ids = torch.rand(batch, heads, length, 23, generator=draw).argsort(-1)[..., :chunks]
    mask = torch.rand(ids.shape, generator=draw) < found
    mask.view(-1, chunks)[0] = False
    return RetrievedMemory(
        chunk_ids=ids.to(DEVICE),
        chunk_mask=mask.to(DEVICE),
        scores=torch.zeros(ids.shape, device=DEVICE),
        lengths=torch.randint(0, size + 1, (3, 23), generator=draw).to(DEVICE),
        rows=torch.randint(3, (batch,), generator=draw).to(DEVICE),
        storage=torch.randn(3, 23, layers * heads_kv, 2, size, dim, generator=draw).to(DEVICE, dtype),
        version=1,
        live_version=lambda: 1,
        first_head=layer * heads_kv,
        layer_heads=None if layers == 1 else heads_kv,
    )


@pytest.mark.parametrize(
    ("asking", "softcap", "recency"),
    [(torch.float32, None, 0.0), (torch.float32, 1.5, 2.0), (torch.bfloat16, 1.5, 2.0)],
)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"length": 1, "batch": 1},
        {"length": 7, "chunks": 1},
        {"chunks": 16, "dim": 64, "heads": 3, "heads_kv": 3},
        {"chunks": 19, "dim": 64, "size": 8, "length": 2, "dtype": torch.bfloat16},
        {"heads": 6, "heads_kv": 2, "layers": 3, "layer": 1},
        {"heads": 2, "heads_kv": 1, "layers": 2, "layer": 1, "size": 1, "dim": 2, "dtype": torch.float16},
        {"dim": 128, "size": 32, "length": 2},
        {"found": 0.0},
    ],
    ids=str,
)
def test_outputs_and_gradient_equal_those_over_copies(kernels, shape, asking, softcap, recency):
    retrieved = searched(**shape)
    draw = torch.Generator().manual_seed(9)
    size = (*retrieved.chunk_ids.shape[:3], retrieved.storage.shape[-1])
    queries, weights = torch.randn(2, *size, generator=draw).to(DEVICE)
    queries = queries.to(asking).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert attention._kernels(queries, retrieved.storage) is kernels
    out, lse, found, _ = memory_attention(queries, retrieved, scaling=0.3, softcap=softcap, recency=recency)
    (ours,) = torch.autograd.grad((out.float() * weights).sum() + lse[found].sin().sum(), queries)
    wide = queries.detach().float().requires_grad_()
    plain, plain_lse, plain_found = over_copies(wide, retrieved, 0.3, softcap, recency)
    (theirs,) = torch.autograd.grad((plain * weights).sum() + plain_lse[found].sin().sum(), wide)
    assert (out.dtype, ours.dtype, lse.dtype) == (asking, asking, torch.float32)
    assert torch.equal(found, plain_found)
    close = {"atol": 1e-5, "rtol": 1e-5} if asking == torch.float32 else {"atol": 5e-2, "rtol": 5e-2}
    torch.testing.assert_close(out.float(), plain, **close)
    torch.testing.assert_close(lse[found], plain_lse[found], **close)
    torch.testing.assert_close(ours.float(), theirs, **close)


@pytest.mark.parametrize("shape", [{"dim": 12}, {"size": 3}, {"dtype": torch.float64}], ids=str)
def test_other_shapes_and_double_precision_stay_with_plain_torch(kernels, shape):
    retrieved = searched(**shape)
    queries = torch.zeros(*retrieved.chunk_ids.shape[:3], retrieved.storage.shape[-1], device=DEVICE)
    assert attention._kernels(queries, retrieved.storage) is None


def test_where_triton_fails_plain_torch_takes_over(kernels, monkeypatch, caplog):
    def fail(*args: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    kernels._compiles.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_double", {(1,): fail})
        assert attention._kernels(torch.zeros(1, device=DEVICE), searched().storage) is None
    assert "Failed to find C compiler" in caplog.text
    kernels._compiles.cache_clear()
