"""All that differs between architectures: the names of their parts, and how they make queries, keys and values.

``Family`` finds the parts of a backbone. ``PositionFreeProbe`` computes what an attention layer asks, keeps and gives
before any rotary embedding. A new architecture needs its names in the lists below, and an adapter at the end of this
file if it does not go through transformers' attention interface.

B rows · H query heads · Hkv key/value heads · T tokens · D head_dim
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from longmem.config import CONFIGS, layer_types, side_layout
from longmem.errors import BackboneError

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
        if model.config.model_type in CONFIGS:
            raise BackboneError(
                f"a {type(model).__name__} reads memory already, over a backbone of its own: load it with "
                f"{type(model).__name__}.from_pretrained, or give the backbone that it names"
            )
        if config.is_encoder_decoder or path is None:
            raise BackboneError(
                f"{type(model).__name__} is not a decoder-only model with its layers at one of {', '.join(_LAYERS)}; "
                "use a causal language model of one of the families in the documentation"
            )
        decoder = find(model, path.rpartition(".")[0])
        norm = next((m for name in _FINAL_NORM if (m := getattr(decoder, name, None)) is not None), None)
        family = cls(path, decoder, find(model, path), norm, getattr(decoder, "project_out", None), config)
        # a backbone without attention, or with one that has no output projection of a known name, is refused here
        first = next((layer for layer in family.layers if attention_of(layer) is not None), family.layers[0])
        family.output_projection(family.attention(first))
        return family

    @property
    def decoder_path(self) -> str:
        """Where the decoder is in the model."""
        return self.layers_path.rpartition(".")[0]

    def attention(self, layer: nn.Module) -> nn.Module:
        """The attention module of a layer that has one."""
        attention = attention_of(layer)
        if attention is None:
            raise BackboneError(
                f"{type(layer).__name__} has no attention module called {', '.join(_ATTENTION)}; layers without "
                "attention cannot be remembered"
            )
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
        """Refuse layers that cannot be remembered, and say which can."""
        allowed = self.memory_layers()
        for layer in set(layers) - set(allowed):
            reason = f"is out of range, the backbone has {len(self.layers)} layers counted from 0"
            if 0 <= layer < len(self.layers):
                reason = f"is a {layer_types(self.config)[layer]} layer, or has no keys of its own"
            would = ", ".join(map(str, allowed)) or "none"
            raise BackboneError(f"memory_layer {layer} {reason}; these would do: {would}")


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


# queries, keys and values before any rotary embedding


@dataclass(frozen=True)
class QKV:
    """Queries (B, H, T, D), keys and values (B, Hkv, T, D) of one layer before any rotary embedding.

    Attributes:
        scaling: factor on every query-key product.
        softcap: c of ``c * tanh(score / c)``, None where the family has none.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    softcap: float | None = None


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names in the module's own forward, below the decorators of transformers."""
    signature = inspect.signature(inspect.unwrap(type(module).forward))
    bound = signature.bind(module, *args, **kwargs).arguments
    bound.pop("self")
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return dict(bound)


class PositionFreeProbe:
    """Computes ``QKV`` from the arguments of an attention module's call, with the module's own weights.

    Families that go through transformers' attention interface are called a second time with an identity rotation and an
    attention function that ends the call; so partial and interleaved rotation, query-key norms, fused projections and
    yarn's scale come out exactly. The others have an adapter that stops before the rotation.

    ``rope_scale`` is a factor on its rotary tables (yarn). It scales the scores too, so the projections keep it.
    """

    def __init__(self, attention: nn.Module, rope_scale: float) -> None:
        self._rope_scale = rope_scale
        self._adapter = ADAPTERS.get(type(attention).__name__)
        self._module = attention
        if self._adapter is None:
            self._module = copy.copy(attention)  # shares parameters and projections, but neither hooks nor settings
            self._module.__dict__.update(_forward_hooks={}, _forward_pre_hooks={})
            self._module.config = copy.deepcopy(attention.config)
            self._module.config._attn_implementation = _RECORDER  # type: ignore[union-attr]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> QKV:
        """The projections in a call of the module, given what a forward pre-hook is given."""
        arguments = arguments_of(module, args, kwargs)
        if self._adapter is not None:
            return self._adapter(self._module, arguments["hidden_states"])
        # the second call must not write to the cache, and ends before a mask is needed
        for name in ("attention_mask", "past_key_values", "layer_past"):
            if name in arguments:
                arguments[name] = None
        if arguments.get("position_embeddings") is not None:
            # cos 1 and sin 0 rotate by nothing
            cos, sin = arguments["position_embeddings"]
            arguments["position_embeddings"] = (torch.full_like(cos, self._rope_scale), torch.zeros_like(sin))
        if arguments.get("shared_kv_states") is not None:  # a layer may put its keys there for later ones (Gemma 4)
            arguments["shared_kv_states"] = dict(arguments["shared_kv_states"])
        try:
            type(self._module).forward(self._module, **arguments)
        except _Recorded as recorded:
            return recorded.qkv
        raise BackboneError(
            f"{type(self._module).__name__} does not go through transformers' attention interface; "
            "add an adapter for it to longmem.modeling.families"
        )


class _Recorded(Exception):
    """Carries the projections out of the call that made them: nothing of a call is kept on a module."""

    def __init__(self, qkv: QKV) -> None:
        self.qkv = qkv


def _record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    raise _Recorded(QKV(query, key, value, scaling_of(module, query, kwargs), kwargs.get("softcap")))


_RECORDER = "longmem_record"
AttentionInterface.register(_RECORDER, _record)


def scaling_of(module: nn.Module, query: Tensor, kwargs: dict[str, Any]) -> float:
    """The factor on query-key products in a call of the attention interface."""
    scaling = kwargs.get("scaling")
    if scaling is None:
        scaling = getattr(module, "scaling", None) or query.shape[-1] ** -0.5
    return float(scaling)


def _bloom(attention: Any, hidden: Tensor) -> QKV:
    queries, keys, values = attention._reshape(attention.query_key_value(hidden))
    return QKV(queries, keys, values, attention.inv_norm_factor)


def _mpt(attention: Any, hidden: Tensor) -> QKV:
    mixed = attention.Wqkv(hidden)
    if attention.clip_qkv:
        mixed = mixed.clamp(-attention.clip_qkv, attention.clip_qkv)
    queries, keys, values = (
        part.unflatten(-1, (attention.n_heads, attention.head_dim)).transpose(1, 2) for part in mixed.chunk(3, -1)
    )
    return QKV(queries, keys, values, attention.softmax_scale)


def _falcon(attention: Any, hidden: Tensor) -> QKV:
    queries, keys, values = (part.transpose(1, 2) for part in attention._split_heads(attention.query_key_value(hidden)))
    if attention.new_decoder_architecture:
        # the module repeats every key/value head for its group; one copy each is kept
        group = attention.num_heads // attention.num_kv_heads
        keys, values = keys[:, ::group], values[:, ::group]
    return QKV(queries, keys, values, attention.inv_norm_factor)


def _gptj(attention: Any, hidden: Tensor) -> QKV:
    queries, keys, values = (
        projection(hidden).unflatten(-1, (attention.num_attention_heads, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return QKV(queries, keys, values, attention.head_dim**-0.5)


ADAPTERS: dict[str, Callable[[Any, Tensor], QKV]] = {
    "BloomAttention": _bloom,
    "MptAttention": _mpt,
    "FalconAttention": _falcon,
    "GPTJAttention": _gptj,
}
