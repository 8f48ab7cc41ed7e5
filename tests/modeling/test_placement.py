"""Backbones that are spread over devices, kept elsewhere until needed, or quantised."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from tests import family_table
from tests.family_table import FAMILIES, RECURRENT, V, ids, make_backbone
from torch import nn

from longmem import LongMem, MemoryBank, TrainingFree
from longmem.errors import BackboneError
from longmem.modeling import backbone as backbone_module
from longmem.modeling.families import Family
from longmem.modeling.weights import place_of, quantization

SETTINGS = {**family_table.SETTINGS, "memory_layer": 1}
CPU = torch.device("cpu")


def filled(model: LongMem | TrainingFree) -> MemoryBank:
    return family_table.filled(model, ids(seed=1))


# kept elsewhere until they are needed


@pytest.mark.parametrize("kind", [LongMem, TrainingFree])
@pytest.mark.parametrize("family", ["llama", "gpt2", "alibi_gpt", "gemma2", "bloom", "falcon-alibi", "on disk"])
def test_an_offloaded_backbone_gives_the_same_model(family: str, kind: Any, tmp_path: Path) -> None:
    plain, backbone = (make_backbone("llama" if family == "on disk" else family) for _ in range(2))
    plain = kind.from_backbone(plain, **SETTINGS).eval()
    if family == "on disk":
        disk_offload(backbone, str(tmp_path), execution_device=CPU)
    else:
        cpu_offload(backbone, execution_device=CPU)
    model = kind.from_backbone(backbone, **SETTINGS).eval()
    assert all(parameter.is_meta for parameter in backbone.parameters())
    assert (model.device, model.memory_device) == (CPU, CPU)
    assert not any(parameter.is_meta for parameter in model.trainable_parameters())
    assert model.fingerprint == plain.fingerprint
    assert torch.equal(model(ids(), memory=filled(model)).logits, plain(ids(), memory=filled(plain)).logits)


def test_an_offloaded_backbone_is_trained_over_and_recomputing_gives_the_same_gradients() -> None:
    plain = LongMem.from_backbone(make_backbone("llama"), **SETTINGS).train()
    model = LongMem.from_backbone(cpu_offload(make_backbone("llama"), execution_device="cpu"), **SETTINGS).train()
    model.gradient_checkpointing_enable()
    for each in (plain, model):
        each(ids(), labels=ids(), memory=filled(each)).loss.backward()
    for mine, theirs in zip(model.trainable_parameters(), plain.trainable_parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None and torch.equal(mine.grad, theirs.grad)


# spread over devices: "meta" stands for the second one, so that shapes and devices are tested, but no values


def spread(family: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> LongMem:
    monkeypatch.setattr(backbone_module, "fingerprint_of", lambda model, weights=None: "0" * 16)
    backbone = make_backbone(family)
    parts = Family.of(backbone)
    for module in (*parts.layers[2:], parts.final_norm, backbone.get_output_embeddings()):
        if module is not None:
            add_hook_to_module(module, AlignDevicesHook(execution_device="meta", place_submodules=True))
    return LongMem.from_backbone(backbone, **{**SETTINGS, **settings})


# a mixture of experts multiplies in groups, which the meta device does in bf16 only; keys that layers share would have
# to come back from it
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("mixtral", "gemma4", *RECURRENT)])
def test_a_side_layer_runs_where_its_source_layer_does(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = spread(family, monkeypatch)
    assert [place_of(layer).type for layer in model.sidenet.layers] == ["cpu", "meta"]
    assert (model.device, model.memory_device) == (CPU, CPU)
    out = model(ids(), memory=filled(model))
    assert (out.logits.device.type, out.logits.shape) == ("meta", (2, 12, V))
    assert out.kv is not None and out.kv.keys.device == CPU
    if family == "llama":
        model = spread(family, monkeypatch, fusion="softmax", final_state="normed")
        assert model(ids(), memory=filled(model)).logits.device.type == "meta"


@pytest.mark.parametrize("kind", [LongMem, TrainingFree])
@pytest.mark.parametrize(("layer", "place"), [(1, "cpu"), (3, "meta")])
def test_memory_is_searched_where_the_reading_layer_is(
    kind: Any, layer: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = kind.from_backbone(spread("llama", monkeypatch).backbone.model, memory_layer=layer)
    assert model.memory_device.type == MemoryBank.for_model(model, rows=2).device.type == place


# quantised

WIDE = {"hidden_size": 64, "intermediate_size": 64}  # bitsandbytes packs 64 numbers of a row together


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_backbone("llama", **WIDE).save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("kind", [LongMem, TrainingFree])
def test_a_model_over_a_quantised_backbone_copies_what_its_weights_stand_for_and_is_loaded_so_again(
    bits: str, kind: Any, saved: Path, tmp_path: Path
) -> None:
    loading = {"quantization_config": quantization(bits, torch.float32), "device_map": {"": "cpu"}}
    model = kind.from_backbone(saved, **loading, **SETTINGS).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = kind.from_pretrained(tmp_path / "model", device_map={"": "cpu"})
    assert loaded.fingerprint == model.fingerprint != LongMem.from_backbone(saved, **SETTINGS).fingerprint
    found = model(ids(), memory=filled(model)).logits
    assert torch.equal(loaded(ids(), memory=filled(loaded)).logits, found)
    assert not torch.equal(model(ids()).logits, found)
    if kind is TrainingFree:
        return
    layers = (make_backbone("llama", **WIDE).model.layers, model.backbone.model.model.layers)
    for side, source in zip(model.sidenet.layers, model.sidenet.sources, strict=True):
        fine, coarse, copied = (layer.self_attn.q_proj for layer in (*(each[source] for each in layers), side))
        assert type(copied) is nn.Linear and type(coarse) is not nn.Linear
        distance = (copied.weight - fine.weight).norm() / fine.weight.norm()
        assert 0 < distance.item() < (0.15 if bits == "4bit" else 0.02)
        # the same product, by the plain weights and by the kernel that knows the coarse ones
        hidden = torch.randn(5, 64)
        torch.testing.assert_close(
            copied(hidden.to(copied.weight)), coarse(hidden).to(copied.weight), atol=0.03, rtol=0.03
        )


def test_without_bitsandbytes_one_line_says_so(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longmem.modeling.weights.is_bitsandbytes_available", lambda: False)
    with pytest.raises(BackboneError, match=r"by bitsandbytes, which is not installed; pip install 'longmem-lm\[quant"):
        quantization("4bit", torch.float32)
    LongMem.from_backbone(saved, **SETTINGS).save_pretrained(tmp_path / "side")
    config = (tmp_path / "side" / "config.json").read_text()
    marked = '"backbone_config": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true},'
    (tmp_path / "side" / "config.json").write_text(config.replace('"backbone_config": {', marked))
    with pytest.raises(BackboneError, match="which is not installed"):
        LongMem.from_pretrained(tmp_path / "side")


def test_a_model_out_of_a_gguf_file_counts_as_quantised_but_holds_floats() -> None:
    backbone = make_backbone("llama")
    backbone.quantization_method = "gguf"  # type: ignore[assignment]  # as transformers leaves it
    assert LongMem.from_backbone(backbone, **SETTINGS)(ids()).logits.isfinite().all()
