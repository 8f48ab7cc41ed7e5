"""Numbers of an architecture that cost is made of.

They are counted on the real one, built without memory (torch's meta device).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from longmem.modeling.families import Family


@dataclass(frozen=True)
class Sizes:
    """Numbers of a model that cost is made of.

    Attributes:
        parameters: of the backbone, shared tensors once.
        layers: parameters of each decoder layer.
        active: of each decoder layer, the parameters that a token passes (fewer in a mixture of experts).
        norm: of the final norm.
        head: weights of the LM head, tied or not.
        width: C.
        inner: width of the feed-forward, as one token sees it.
        gated: the feed-forward has a gate beside its input projection.
        heads: H.
        heads_kv: Hkv.
        head_dim: D.
        vocab: V.
        masked: attention gets a (T, T) float mask per head (ALiBi).
        matrices: weights that quantisation makes small: all linear layers but the LM head.
        outputs: their output rows, each of which has a scale in 8 bits.
        largest: weights of the largest of them.
    """

    parameters: int
    layers: tuple[int, ...]
    active: tuple[int, ...]
    norm: int
    head: int
    width: int
    inner: int
    gated: bool
    heads: int
    heads_kv: int
    head_dim: int
    vocab: int
    masked: bool
    matrices: int
    outputs: int
    largest: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Sizes:
        """Build the architecture on the meta device and count.

        Raises:
            BackboneError: a family that is not supported.
        """
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        return cls.of_model(model)

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> Sizes:
        """Count a model that exists."""
        family = Family.of(model)
        text = family.config
        heads = int(text.num_attention_heads)
        width = int(text.hidden_size)
        layers = tuple(_count(layer) for layer in family.layers)
        experts, chosen = getattr(text, "num_local_experts", None), getattr(text, "num_experts_per_tok", None)
        active = layers
        inner = int(_first(text, "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size") or 4 * width)
        if experts and chosen:
            active = tuple(_active(layer, experts, chosen) for layer in family.layers)
            inner *= chosen
        head = model.get_output_embeddings()
        # what bitsandbytes replaces: exactly these classes
        linear = [m for m in model.modules() if m is not head and type(m) in (nn.Linear, Conv1D)]
        weights: list[Tensor] = [m.weight for m in linear]  # type: ignore[misc]
        return cls(
            parameters=_count(model),
            layers=layers,
            active=active,
            norm=0 if family.final_norm is None else _count(family.final_norm),
            head=int(text.vocab_size) * width if head is None else sum(p.numel() for p in head.parameters()),
            width=width,
            inner=inner,
            gated=any("gate" in name for name, _ in family.layers[0].named_parameters()),
            heads=heads,
            heads_kv=_kv_heads(text, heads),
            head_dim=int(getattr(text, "head_dim", None) or width // heads),
            vocab=int(text.vocab_size),
            masked=text.model_type in ("alibi_gpt", "bloom", "mpt") or bool(getattr(text, "alibi", False)),
            matrices=sum(weight.numel() for weight in weights),
            outputs=sum(weight.shape[type(m) is Conv1D] for m, weight in zip(linear, weights, strict=True)),
            largest=max((weight.numel() for weight in weights), default=0),
        )

    @property
    def attention(self) -> int:
        """Weights of one layer's four attention projections."""
        return self.width * self.head_dim * (2 * self.heads + 2 * self.heads_kv)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _active(layer: nn.Module, experts: int, chosen: int) -> int:
    """Parameters of a layer that one token passes: its experts' share of theirs."""
    inside = sum(parameter.numel() for name, parameter in layer.named_parameters() if ".experts." in name)
    return _count(layer) - inside + inside * chosen // experts


def _kv_heads(text: Any, heads: int) -> int:
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1
    return int(_first(text, "num_key_value_heads", "num_kv_heads", "n_head_kv") or heads)


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None))), None)
