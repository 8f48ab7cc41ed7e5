"""The SideNet: as ``init="delta"`` makes it, and in other dtypes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import family_table
from tests.family_table import SETTINGS, disturbed, ids, make_backbone

from longmem import LongMem, MemoryBank, TrainingFree

FAMILIES = {"llama": (1, 3), "gpt2": (1, 3), "gemma2": (1, 3), "qwen3": (1, 2), "lfm2": (2, 5)}


def made(family: str, **settings: Any) -> LongMem:
    settings = {"memory_layers": FAMILIES[family], "init": "delta", "fusion": "token", **SETTINGS, **settings}
    return LongMem.from_backbone(make_backbone(family), **settings)


def filled(model: Any) -> MemoryBank:
    return family_table.filled(model, ids(2, 20, seed=1))


@torch.no_grad()
@pytest.mark.parametrize("trained", ["all", "attention"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_memory_it_starts_as_the_backbone(family: str, stride: int, trained: str) -> None:
    model = made(family, stride=stride, trained=trained)
    assert {*FAMILIES[family]} <= {*model.sidenet.sources} and min(model.sidenet.sources) == FAMILIES[family][0]
    torch.testing.assert_close(model(ids()).logits, model.backbone.model(ids()).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"lfm2"}))  # between its layers with attention are others
def test_at_stride_1_it_starts_as_the_calibrated_reader(family: str) -> None:
    model = made(family, stride=1)
    reader = TrainingFree.from_backbone(
        model.backbone.model, memory_layers=FAMILIES[family], fusion="token", **SETTINGS
    )
    assert model.sidenet.gates is not None and reader.gates is not None
    for gate in model.sidenet.gates.parameters():
        gate.normal_(std=0.3)
    reader.gates.load_state_dict(model.sidenet.gates.state_dict())
    bank = filled(model)  # over one backbone, they read each other's memory
    ours, theirs = (each(ids(), memory=bank) for each in (model, reader))
    torch.testing.assert_close(ours.logits, theirs.logits)
    assert not torch.allclose(ours.logits, model(ids()).logits, atol=1e-4)


def test_attention_alone_is_trained_and_saved_and_loads_again(tmp_path: Path) -> None:
    model = disturbed(made("llama", stride=1, trained="attention"), 0.02)
    names = {name for name, _ in model.sidenet.named_parameters()}
    assert names and not any("mlp" in name for name in names)
    memory = filled(model)
    model(ids(), labels=ids(), memory=memory).loss.backward()
    assert all(weight.grad is not None for weight in model.trainable_parameters())
    assert all(weight.grad is None for weight in model.backbone.parameters())
    model.save_pretrained(tmp_path)
    again = LongMem.from_pretrained(tmp_path, backbone=make_backbone("llama"))
    with torch.no_grad():
        expected, found = (each(ids(), memory=memory).logits for each in (model, again))
    assert torch.equal(expected, found)


def test_a_bfloat16_backbone_with_a_float32_sidenet_runs() -> None:
    model = LongMem.from_backbone(make_backbone("llama").to(torch.bfloat16), side_dtype=torch.float32, **SETTINGS)
    out = model(ids(), labels=ids(), memory=filled(model))
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert {p.grad.dtype for p in model.trainable_parameters() if p.grad is not None} == {torch.float32}
