"""What a recipe trains: a SideNet over a backbone, a MemTRM, or a causal language model."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longmem.data.tokenizer import load_tokenizer
from longmem.errors import BackboneError, ConfigError
from longmem.modeling.alibi_gpt import AlibiGPTConfig, AlibiGPTForCausalLM
from longmem.modeling.baselines import MemTRM
from longmem.modeling.loading import load_backbone
from longmem.modeling.longmem import LongMem
from longmem.modeling.placement import quantization
from longmem.modeling.vocabulary import change_vocabulary, same_vocabulary
from longmem.training.recipe import Recipe


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> PreTrainedModel:
    """The model, its trained weights in float32, where it was loaded."""
    model: Any
    if recipe.task == "pretrain":
        model = trained = _causal(recipe, tokenizer)
    elif recipe.method == "memtrm":
        model = _memtrm(recipe)
        trained = model.backbone.model
    else:
        model = _longmem(recipe, device)
        trained = model.sidenet
    set_dropout(trained, recipe.optim.dropout)
    if recipe.optim.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ConfigError(
                f"optim.gradient_checkpointing is true, but {type(model).__name__} cannot recompute its layers; set it "
                "to false and take fewer optim.rows with more optim.accumulate"
            )
        model.gradient_checkpointing_enable()
    known = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > known:
        raise ConfigError(
            f"data.tokenizer has {len(tokenizer)} tokens, backbone.path ({recipe.backbone.path}) embeds {known}; "
            "use the tokenizer that the backbone was trained with"
        )
    return model  # type: ignore[no-any-return]


def backbone_shape(recipe: Recipe, vocab_size: int | None = None, **settings: Any) -> AlibiGPTConfig:
    """Configuration of the backbone that ``[model]`` describes; ``vocab_size`` is that of the tokenizer."""
    shape = recipe.model
    return AlibiGPTConfig(
        vocab_size=shape.vocab_size or vocab_size or recipe.data.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate_size,
        activation=shape.activation,
        layer_norm_epsilon=shape.layer_norm_epsilon,
        max_position_embeddings=recipe.data.window,
        **settings,
    )


def set_dropout(module: nn.Module, probability: float) -> None:
    """Give every dropout below ``module`` this probability, those written as a plain number included."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = probability
        for name in ("attention_dropout", "dropout", "activation_dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, probability)


def runs_bf16(precision: str, device: torch.device) -> bool:
    """Whether to compute in bfloat16; ``auto`` does where the hardware multiplies in it.

    A CPU without such instructions emulates them: at width 256 a step then takes fifteen times longer than in fp32.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    multiplies = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512" and multiplies


def storage_dtype(name: str | None) -> torch.dtype | None:
    """``bfloat16`` -> ``torch.bfloat16``; None and ``auto`` stay None."""
    return None if name in (None, "auto") else getattr(torch, str(name))


def _causal(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Fresh weights drawn from the global generator, or those of ``model.init`` with this tokenizer."""
    shape = recipe.model
    if shape.init is not None:
        try:
            model = load_backbone(shape.init, None, torch.float32)
        except BackboneError as error:
            raise BackboneError(f"model.init: {error}") from error
        before = load_tokenizer(shape.init)
        return model if same_vocabulary(before, tokenizer) else change_vocabulary(model, before, tokenizer)
    if shape.vocab_size is not None and shape.vocab_size < len(tokenizer):
        raise ConfigError(f"model.vocab_size ({shape.vocab_size}) must be at least the tokenizer's ({len(tokenizer)})")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return AlibiGPTForCausalLM(backbone_shape(recipe, len(tokenizer), dropout=recipe.optim.dropout, **special))


def _memory(recipe: Recipe) -> dict[str, Any]:
    side = recipe.sidenet
    names = ("memory_layers", "fusion", "chunk_size", "num_retrieved", "memory_size")
    return {"revision": recipe.backbone.revision} | {name: getattr(side, name) for name in names}


def _memtrm(recipe: Recipe) -> MemTRM:
    """With all that the recipe says of memory; what it says of a SideNet means nothing here."""
    dtype = storage_dtype(recipe.backbone.dtype or "float32")
    return MemTRM.from_backbone(str(recipe.backbone.path), dtype=dtype, gate=recipe.sidenet.gate, **_memory(recipe))


def _longmem(recipe: Recipe, device: torch.device) -> LongMem:
    side, named = recipe.sidenet, recipe.backbone
    halved = torch.bfloat16 if runs_bf16(recipe.optim.precision, device) and device.type != "cpu" else torch.float32
    dtype = halved if named.dtype is None else storage_dtype(named.dtype)
    if side.start is not None:
        return _go_on(recipe, dtype)
    loading: dict[str, Any] = {} if named.device_map is None else {"device_map": named.device_map}
    if named.quantised is not None:
        loading = {"device_map": {"": device}, **loading, "quantization_config": quantization(named.quantised, halved)}
    settings: dict[str, Any] = {} if side.final_state is None else {"final_state": side.final_state}
    model = LongMem.from_backbone(
        str(named.path),
        dtype=dtype,
        side_dtype=torch.float32,
        backbone_kwargs=loading,
        stride=side.stride,
        init=side.init,
        trained=side.trained,
        **_memory(recipe),
        **settings,
    )
    biases = [gate.bias for gate in model.sidenet.gates] if model.sidenet.gates else [model.sidenet.memory_gate]
    for bias in biases:
        nn.init.constant_(bias, math.log(side.gate / (1 - side.gate)))  # type: ignore[arg-type]
    return model


def _go_on(recipe: Recipe, dtype: torch.dtype | None) -> LongMem:
    """A SideNet that was trained before; how much it retrieves, and from how much, may be another number."""
    side, backbone = recipe.sidenet, str(recipe.backbone.path)
    model = LongMem.from_pretrained(str(side.start), backbone=backbone, dtype=dtype, side_dtype=torch.float32)
    fixed: dict[str, Any] = {"stride": side.stride, "fusion": side.fusion}
    if side.memory_layers is not None:
        fixed["memory_layers"] = side.memory_layers
    other = [
        f"sidenet.{name} ({value!r}) is {getattr(model.config, name)!r} in sidenet.start ({side.start}); set it so"
        for name, value in fixed.items()
        if value != getattr(model.config, name)
    ]
    if other:
        raise ConfigError(other)
    for name in ("chunk_size", "num_retrieved", "memory_size"):
        setattr(model.config, name, getattr(side, name))
    model.config.backbone_name_or_path = os.path.abspath(backbone) if os.path.isdir(backbone) else backbone
    model.config.backbone_revision = recipe.backbone.revision or model.config.backbone_revision
    return model
