"""The fused kernels against plain torch, on a GPU or, with TRITON_INTERPRET=1, interpreted on the CPU."""

import os
from types import ModuleType

import pytest
import torch
from tests.modeling.test_memory_attention import check_against_copies, searched

from longmem.modeling import attention

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
    retrieved = searched(**shape, device=DEVICE)
    assert attention._kernels(retrieved.keys[..., 0, :].to(asking), retrieved.storage) is kernels
    check_against_copies(retrieved, asking, recency, softcap=softcap)


@pytest.mark.parametrize("shape", [{"dim": 12}, {"size": 3}, {"dtype": torch.float64}], ids=str)
def test_other_shapes_and_double_precision_stay_with_plain_torch(kernels, shape):
    retrieved = searched(**shape, device=DEVICE)
    assert attention._kernels(retrieved.keys[..., 0, :].float(), retrieved.storage) is None


def test_where_triton_fails_plain_torch_takes_over(kernels, monkeypatch, caplog):
    def fail(*args: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    kernels._compiles.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_double", {(1,): fail})
        assert attention._kernels(torch.zeros(1, device=DEVICE), searched(device=DEVICE).storage) is None
    assert "Failed to find C compiler" in caplog.text
    kernels._compiles.cache_clear()
