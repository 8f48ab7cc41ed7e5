"""The released checkpoints at full size, without their weights: every key and shape, on the meta device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from longmem.convert import (
    FairseqCheckpoint,
    backbone_config,
    backbone_name,
    load_tensors,
    longmem_config,
    side_name,
)
from longmem.modeling.alibi_gpt import AlibiGPTForCausalLM
from longmem.modeling.backbone import Backbone
from longmem.modeling.longmem import SideNet

E, V, F, H = 1024, 51_200, 4096, 16
SETTINGS = {
    "decoder_attention_heads": H,
    "layer_reduction_factor": 2,
    "retrieval_layer_index": 17,
    "k": 64,
    "chunk_size": 4,
    "memory_size": 65_536,
    "tokens_per_sample": 1024,
}


def block(norm: str, attention: str, first: str, second: str) -> dict[str, tuple[int, ...]]:
    """Released names and shapes of one decoder layer."""
    shapes: dict[str, tuple[int, ...]] = {f"{attention}.{each}_proj.weight": (E, E) for each in ("q", "k", "v", "out")}
    shapes |= {f"{norm}.{each}": (E,) for each in ("weight", "bias")}
    shapes |= {f"{first}.weight": (F, E), f"{first}.bias": (F,), f"{second}.weight": (E, F), f"{second}.bias": (E,)}
    return shapes


def released_backbone() -> dict[str, tuple[int, ...]]:
    """The table of the backbone's file."""
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (V, E)}
    for layer in range(24):
        parts = block("ln_1", "attn", "mlp.fc_in", "mlp.fc_out")
        shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in parts.items()}
    shapes |= {"transformer.ln_f.weight": (E,), "transformer.ln_f.bias": (E,)}
    shapes |= {"lm_head.weight": (V, E), "lm_head.bias": (V,)}
    return {f"decoder.model.{name}": shape for name, shape in shapes.items()}


def released_longmem() -> dict[str, tuple[int, ...]]:
    """The table of LongMem's file."""
    shapes: dict[str, tuple[int, ...]] = {"decoder.version": (1,), "decoder.embed_tokens.weight": (V, E)}
    for layer in range(12):
        parts = block("ln_1", "self_attn", "fc1", "fc2")
        shapes |= {f"decoder.layers.{layer}.{name}": shape for name, shape in parts.items()}
    shapes |= {"decoder.layers.8.self_attn.memory_bias": (H,)}
    shapes |= {"decoder.layer_norm.weight": (E,), "decoder.layer_norm.bias": (E,)}
    shapes |= {f"decoder.pretrained_model.{name}": shape for name, shape in released_backbone().items()}
    return {**shapes, "decoder.output_projection.weight": (V, E)}


def tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def released() -> FairseqCheckpoint:
    found = tensors(released_longmem())
    return FairseqCheckpoint(
        path=Path("checkpoint_last.pt"),
        settings=SETTINGS,
        backbone={ours: value for name, value in found.items() if (ours := backbone_name(name)) is not None},
        side={ours: value for name, value in found.items() if (ours := side_name(name)) is not None},
        augmented_layer=8,
    )


def test_every_released_key_has_a_place_in_our_models_and_every_place_a_key(released: FairseqCheckpoint) -> None:
    config = backbone_config(released)
    with torch.device("meta"):
        model = AlibiGPTForCausalLM(config)
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == (24, H, E)
    load_tensors(released.path, model, released.backbone, assign=True)
    settings = longmem_config(released, config)
    assert (settings.memory_layers, settings.num_retrieved, settings.memory_size) == ((17,), 64, 65_536)
    with torch.device("meta"):
        side = SideNet(Backbone(model, (17,)), settings)
    assert side.augmented_layers == (8,)
    load_tensors(released.path, side, released.side, assign=True)
    trained = sum(parameter.numel() for parameter in side.parameters())
    assert trained == 151_083_024
    assert trained + sum(parameter.numel() for parameter in model.parameters()) == 558_155_792
    placed = [name for name in released_longmem() if backbone_name(name) or side_name(name)]
    assert len(placed) == 371 - 3, "all but the version and the two tensors that are there twice"
