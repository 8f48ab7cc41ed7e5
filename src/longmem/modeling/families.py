"""How architectures name their parts; ``probe`` has adapters for those that hide their queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from longmem.config import layer_types, side_layout
from longmem.errors import BackboneError
from longmem.modeling.probe import PositionFreeProbe

# where the decoder's layers and the final norm are, in the order tried
_LAYERS = (
    "model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers", "transformer.blocks",
    "model.language_model.layers",
)  # fmt: skip
_FINAL_NORM = ("norm", "ln_f", "final_layer_norm", "norm_f", "final_layernorm", "embedding_norm")
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_ATTENTION_OUTPUT = ("o_proj", "out_proj", "c_proj", "dense")
_FFN_OUTPUT = (
    "mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc_out", "mlp.fc2", "mlp.experts.down_proj",
    "ffn.down_proj", "fc2", "feed_forward.w2", "shared_mlp.output_linear",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """The named parts of one backbone.

    Attributes:
        layers_path: where the decoder's layers are in the model.
        decoder: takes token ids and gives states after the final norm.
        layers: its layers.
        final_norm: None where each layer norms its own output (OPT-350m).
        tail: what the decoder applies after its norm (OPT-350m's projection), or None.
        config: of the text model.
    """

    layers_path: str
    decoder: nn.Module
    layers: nn.ModuleList
    final_norm: nn.Module | None
    tail: nn.Module | None
    config: PreTrainedConfig

    @classmethod
    def of(cls, model: PreTrainedModel) -> Family:
        """Find the parts of ``model``."""
        config = model.config.get_text_config(decoder=True)
        path = next((p for p in _LAYERS if isinstance(find(model, p), nn.ModuleList)), None)
        if config.is_encoder_decoder or path is None:
            raise BackboneError(
                f"{type(model).__name__} is not a decoder-only model with its layers at one of {', '.join(_LAYERS)}; "
                "use a causal language model of one of the families in the documentation"
            )
        decoder = find(model, path.rpartition(".")[0])
        norm = next((m for name in _FINAL_NORM if (m := getattr(decoder, name, None)) is not None), None)
        family = cls(path, decoder, find(model, path), norm, getattr(decoder, "project_out", None), config)
        attentions = [attention for layer in family.layers if (attention := attention_of(layer)) is not None]
        if not attentions:
            raise BackboneError(
                f"{type(family.layers[0]).__name__} of {type(model).__name__} has no attention module called "
                f"{', '.join(_ATTENTION)}; layers without attention cannot be remembered"
            )
        family.output_projection(attentions[0])
        return family

    @property
    def decoder_path(self) -> str:
        """Where the decoder is in the model."""
        return self.layers_path.rpartition(".")[0]

    def attention(self, layer: nn.Module) -> nn.Module:
        """The attention module of a layer that has one."""
        attention = attention_of(layer)
        if attention is None:
            raise BackboneError(f"{type(layer).__name__} has no attention module called {', '.join(_ATTENTION)}")
        return attention

    def probe(self, layer: int, attention: nn.Module | None = None) -> PositionFreeProbe:
        """The probe of backbone layer ``layer``, or of a copy of its attention."""
        rotary = getattr(self.decoder, "rotary_emb", None)
        # families with a rotation per layer type keep a scale for each
        own = getattr(rotary, f"{layer_types(self.config)[layer]}_attention_scaling", 1.0)
        scale: Any = getattr(rotary, "attention_scaling", own)
        return PositionFreeProbe(self.attention(self.layers[layer]) if attention is None else attention, float(scale))

    def output_projection(self, attention: nn.Module) -> nn.Module:
        """The projection that takes the heads' outputs, (B, T, H*D), back to the width of the model."""
        name = next((n for n in _ATTENTION_OUTPUT if hasattr(attention, n)), None)
        if name is None:
            raise BackboneError(
                f"{type(attention).__name__} has no output projection called {', '.join(_ATTENTION_OUTPUT)}; "
                "add its name to longmem.modeling.families"
            )
        return cast(nn.Module, getattr(attention, name))

    def zero_outputs(self, layer: nn.Module) -> None:
        """Make ``layer`` the identity: zero the output projections of its attention and its feed-forward."""
        ffn = next((part for path in _FFN_OUTPUT if (part := find(layer, path)) is not None), None)
        # where a layer norms after its residual sum (OPT-350m), zeroed outputs do not make it the identity
        if ffn is None or not getattr(self.config, "do_layer_norm_before", True):
            raise BackboneError(
                f'init "zero" needs pre-norm layers with a known feed-forward, and {type(layer).__name__} is not one; '
                'use init "copy"'
            )
        with torch.no_grad():
            for part in (self.output_projection(self.attention(layer)), ffn):
                for parameter in [part] if isinstance(part, nn.Parameter) else part.parameters():
                    parameter.zero_()

    def share_feed_forward(self, copied: nn.Module, source: nn.Module) -> None:
        """Let a copy of a layer use its source's own modules for all but attention and norms.

        They are no part of the copy: neither its parameters nor its ``state_dict`` have them.
        """
        for name, child in list(copied.named_children()):
            if child is not attention_of(copied) and any(parameter.ndim > 1 for parameter in child.parameters()):
                delattr(copied, name)
                copied.__dict__[name] = getattr(source, name)

    def memory_layers(self) -> list[int]:
        """The layers that may be remembered: those with full attention and keys of their own.

        Where no layer has full attention (Mistral), those with a sliding window.
        """
        types = layer_types(self.config)
        own = [i for i, layer in enumerate(self.layers) if attention_of(layer) is not None]
        full = [i for i in own if types[i] == "full_attention"]
        return full or [i for i in own if types[i] == "sliding_attention"]

    def default_memory_layer(self, stride: int) -> int:
        """The paper's choice for any depth, counted from 0: 17 of 24 (its layer 18, read by SideNet layer 9 of 12).

        Where the family does not allow it, as in hybrid models: the nearest that it does, of those that the SideNet
        copies if there are any.
        """
        sources = side_layout(self.config, stride).sources
        wanted = sources[max(0, int(0.75 * len(sources) + 0.5) - 1)] if sources else 0
        allowed = self.memory_layers()
        if wanted in allowed or not allowed:
            return wanted
        return min(allowed, key=lambda layer: (layer not in sources, abs(layer - wanted)))

    def kv_heads(self, layer: int) -> int:
        """Hkv of a layer; in Gemma 4 layers differ."""
        config = self.config.per_layer_config[layer]
        if config.model_type == "falcon":
            # an old-style Falcon shares one key/value head, or has one for each query head
            new, multi = config.new_decoder_architecture, config.multi_query
            return int(config.num_kv_heads if new else 1 if multi else config.num_attention_heads)
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)

    def head_dim(self, layer: int) -> int:
        """D of a layer."""
        config = self.config.per_layer_config[layer]
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def check_memory_layers(self, layers: tuple[int, ...]) -> None:
        """Refuse layers that cannot be remembered, or not together, and say which can."""
        allowed = self.memory_layers()
        for layer in set(layers) - set(allowed):
            reason = f"is out of range, the backbone has {len(self.layers)} layers counted from 0"
            if 0 <= layer < len(self.layers):
                reason = f"is a {layer_types(self.config)[layer]} layer, or has no keys of its own"
            would = ", ".join(map(str, allowed)) or "none"
            raise BackboneError(f"memory_layer {layer} {reason}; these would do: {would}")
        shapes = [(self.kv_heads(layer), self.head_dim(layer)) for layer in layers]
        if len(set(shapes)) > 1:
            raise BackboneError(
                f"memory_layers {list(layers)} have different key/value heads and sizes {shapes}; "
                "remember layers of one shape"
            )


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The attention module of a decoder layer; None where it has another kind of mixing (hybrids)."""
    return next((m for name in _ATTENTION if (m := getattr(layer, name, None)) is not None), None)


def find(root: Any, path: str) -> Any:
    """The attribute at a dotted path, or None."""
    for name in path.split(".") if path else []:
        root = getattr(root, name, None)
        if root is None:
            return None
    return root
