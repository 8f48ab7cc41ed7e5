"""Wrong input gets one line: the value, the rule, the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.family_table import V, make_backbone
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from longmem import LongMem, LongMemConfig, MemoryBank
from longmem.errors import BackboneError, CheckpointError, ConfigError, LongMemError, MemoryBankError

IDS = torch.arange(3, 11)[None]


def line(problem: pytest.ExceptionInfo[LongMemError]) -> str:
    text = str(problem.value)
    assert "\n" not in text
    return text


def test_settings_that_break_rules_are_reported_together() -> None:
    with pytest.raises(ConfigError) as problem:
        LongMemConfig(num_retrieved=50, chunk_size=4, init="clone", fusion="sum")
    text = line(problem)
    assert "num_retrieved (50) must be a multiple of chunk_size (4); try 48 or 52" in text
    assert "init ('clone') must be one of copy, zero" in text
    assert len(problem.value.problems) == 3


def t5() -> Any:
    return T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


OUT_OF_RANGE = "is out of range, the backbone has 4 layers counted from 0; these would do: 0, 1, 2, 3"


@pytest.mark.parametrize(
    ("backbone", "settings", "says"),
    [
        ("llama", {"memory_layer": -1}, f"memory_layer -1 {OUT_OF_RANGE}"),
        ("llama", {"memory_layer": 4}, f"memory_layer 4 {OUT_OF_RANGE}"),
        ("gemma2", {"memory_layer": 2}, "sliding_attention layer, or has no keys of its own; these would do: 1, 3"),
        ("opt-post-norm", {"init": "zero"}, 'use init "copy"'),
        ("bloom", {"fusion": "softmax"}, 'use fusion "gate"'),
        ("llama", {"stride": 9}, "stride (9) must not be larger than the backbone's 4 layers; try 2"),
        (t5, {}, "not a decoder-only model"),
        ("nothing", {}, "could not be loaded"),
    ],
)
def test_backbones_and_settings_that_cannot_be_used_are_refused(backbone: Any, settings: Any, says: str) -> None:
    given = backbone if backbone == "nothing" else make_backbone(backbone) if isinstance(backbone, str) else backbone()
    with pytest.raises((BackboneError, ConfigError)) as problem:
        LongMem.from_backbone(given, **settings)
    assert says in line(problem)


def test_chunks_longer_than_what_is_retrieved_are_refused() -> None:
    model = LongMem.from_backbone(make_backbone("llama"), num_retrieved=8, chunk_size=4)
    bank = MemoryBank.for_model(model, rows=1, capacity_tokens=64, chunk_size=16)
    with pytest.raises(MemoryBankError, match=r"chunk_size \(16\) must not exceed num_retrieved \(8\)"):
        model(IDS, memory=bank)


def test_checkpoint_cut_in_half_is_refused(tmp_path: Path) -> None:
    LongMem.from_backbone(make_backbone("llama")).save_pretrained(tmp_path)
    weights = tmp_path / "sidenet.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(CheckpointError) as problem:
        LongMem.from_pretrained(tmp_path, backbone=make_backbone("llama"))
    assert "not a complete LongMem checkpoint" in line(problem)


def test_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it needs config.json and sidenet.safetensors"):
        LongMem.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"is not a folder"):
        LongMem.from_pretrained(tmp_path / "nothing")


def test_checkpoint_without_its_backbone_asks_for_it(tmp_path: Path) -> None:
    LongMem.from_backbone(make_backbone("llama")).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="names no backbone"):
        LongMem.from_pretrained(tmp_path)


def test_auto_class_loads_the_backbone_that_the_checkpoint_names(tmp_path: Path) -> None:
    """The stock loader would leave random weights in the backbone without a word."""
    backbone = make_backbone("llama")
    backbone.save_pretrained(tmp_path / "backbone")
    model = LongMem.from_backbone(str(tmp_path / "backbone"))
    model.save_pretrained(tmp_path / "side")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "side")
    assert isinstance(loaded, LongMem)
    ids = torch.randint(3, V, (1, 9))
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    assert torch.equal(loaded.backbone.model(ids).logits, backbone(ids).logits)


def test_bfloat16_backbone_with_a_float32_sidenet_runs() -> None:
    backbone = make_backbone("llama").to(torch.bfloat16)
    model = LongMem.from_backbone(backbone, side_dtype=torch.float32)
    bank = MemoryBank.for_model(model, rows=1, capacity_tokens=64)
    bank.add(model.encode(IDS))
    out = model(IDS, labels=IDS, memory=bank)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert {p.grad.dtype for p in model.trainable_parameters() if p.grad is not None} == {torch.float32}


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = LongMem.from_backbone(make_backbone("llama"), chunk_size=2, num_retrieved=8).train()
    bank = MemoryBank.for_model(model, rows=1, capacity_tokens=64)
    bank.add(model.encode(IDS))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(IDS, labels=IDS, memory=bank, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.trainable_parameters() if p.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))
