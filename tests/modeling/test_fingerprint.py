"""A fingerprint depends on what keys and values depend on, and on nothing else."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.family_table import FAMILIES, make_backbone
from transformers import AutoModelForCausalLM, PreTrainedModel

from longmem import LongMem, MemoryBank, TrainingFree
from longmem.errors import CheckpointError
from longmem.modeling.weights import fingerprint_of, legacy_fingerprint

HARMLESS = {
    "pad_token_id": 2,
    "attention_dropout": 0.1,
    "note": "a field of the user's own",
    "initializer_range": 0.5,
    "use_cache": False,
}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_settings_that_change_no_key_keep_the_fingerprint(name: str) -> None:
    model = make_backbone(name)
    before = fingerprint_of(model)
    for field, value in HARMLESS.items():
        setattr(model.config, field, value)
    assert fingerprint_of(model) == before
    assert fingerprint_of(model.bfloat16()) == before
    other = make_backbone(name, seed=1)
    assert fingerprint_of(other) != before


@pytest.mark.parametrize("field", ["rope_parameters", "rms_norm_eps", "hidden_act"])
def test_settings_that_change_keys_change_it(field: str) -> None:
    model = make_backbone("llama")
    before = fingerprint_of(model)
    changed: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}, "rms_norm_eps": 0.1}
    setattr(model.config, field, changed.get(field, "gelu"))
    assert fingerprint_of(model) != before


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path]:
    make_backbone("llama").save_pretrained(tmp_path / "backbone")
    LongMem.from_backbone(tmp_path / "backbone").save_pretrained(tmp_path / "side")
    return tmp_path / "backbone", tmp_path / "side"


def rounded(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """As a quantised copy has its weights: blocks of 32 in so many steps."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                blocks = parameter.view(-1, 32)
                low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
                step = (high - low) / (2**bits - 1)
                blocks.copy_(((blocks - low) / step).round() * step + low)
    return model


@pytest.mark.parametrize("harm", ["half", "8", "4"])
def test_the_same_weights_in_another_precision_are_taken_with_a_warning(harm: str, saved: tuple[Path, Path]) -> None:
    backbone, side = saved
    model = AutoModelForCausalLM.from_pretrained(backbone)
    model = model.half() if harm == "half" else rounded(model, int(harm))
    own = fingerprint_of(model)
    with pytest.warns(UserWarning, match="the same weights in another precision") as warned:
        loaded = LongMem.from_pretrained(side, backbone=model)
    written = LongMem.from_pretrained(side)
    assert loaded.fingerprint == written.fingerprint != own
    assert own in str(warned[0].message) and written.fingerprint in str(warned[0].message)
    bank = MemoryBank.for_model(written, rows=1)
    assert bank.fingerprint is not None and loaded.accepts(bank.fingerprint)


def test_weights_of_which_one_is_another_stay_refused(saved: tuple[Path, Path]) -> None:
    scaled = AutoModelForCausalLM.from_pretrained(saved[0])
    with torch.no_grad():
        scaled.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    with pytest.raises(CheckpointError, match="pass the backbone that it names"):
        LongMem.from_pretrained(saved[1], backbone=scaled)


def test_fingerprints_written_before_stay_valid() -> None:
    backbone = make_backbone("llama")
    model = LongMem.from_backbone(backbone, num_retrieved=8)
    bank = MemoryBank(1, 64, 2, 8, fingerprint=legacy_fingerprint(backbone))
    assert bank.fingerprint != model.fingerprint
    assert model(torch.tensor([[3, 4, 5, 6]]), memory=bank).logits.isfinite().all()


def test_half_precision_is_asked_for_by_name_without_a_warning(saved: tuple[Path, Path]) -> None:
    backbone, side = saved
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = LongMem.from_pretrained(side, dtype=torch.float16)
    assert loaded.dtype == torch.float16
    assert loaded.fingerprint == TrainingFree.from_backbone(backbone).fingerprint
