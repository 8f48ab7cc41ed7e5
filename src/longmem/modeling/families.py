"""The only place that knows how architectures name their parts.

Everything else works on a ``Family``: the decoder layers, the final norm, the attention module of a layer, its output
projection, and a way to its queries, keys and values before any rotary embedding.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longmem.errors import BackboneError

# where the decoder layers and the final norm are, in the order tried
_LAYERS = (
    "model.layers",
    "transformer.h",
    "gpt_neox.layers",
    "model.decoder.layers",
    "transformer.blocks",
    "model.language_model.layers",
)
_FINAL_NORM = ("norm", "ln_f", "final_layer_norm", "norm_f", "final_layernorm")
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_ATTENTION_OUTPUT = ("o_proj", "out_proj", "c_proj", "dense")
_FFN_OUTPUT = (
    "mlp.down_proj",
    "mlp.c_proj",
    "mlp.dense_4h_to_h",
    "mlp.fc_out",
    "mlp.fc2",
    "mlp.experts.down_proj",
    "ffn.down_proj",
    "fc2",
)


@dataclass(frozen=True)
class QKV:
    """Position-free queries, keys and values of one layer, with what turns products into scores.

    Attributes:
        queries: (B, H, T, D), before any rotary embedding.
        keys: (B, Hkv, T, D).
        values: (B, Hkv, T, D).
        scaling: factor on every query-key product.
        softcap: c of ``c * tanh(score / c)``, None where the family has none.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    softcap: float | None = None


@dataclass(frozen=True)
class Call:
    """The recorded arguments of one module call, by name."""

    arguments: dict[str, Any]

    @classmethod
    def record(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Bind the call to the signature of the module's own forward (HF wraps it)."""
        signature = inspect.signature(inspect.unwrap(type(module).forward))
        bound = signature.bind(module, *args, **kwargs).arguments
        bound.pop("self")
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                bound.update(bound.pop(name, {}))
        return cls(dict(bound))

    def replace(self, **changes: Any) -> Call:
        """The same call with other values for the arguments it has."""
        return Call({**self.arguments, **{k: v for k, v in changes.items() if k in self.arguments}})

    def cast(self, dtype: torch.dtype, device: torch.device | None = None) -> Call:
        """The same call with floating tensors in ``dtype`` and all tensors on ``device``, None being where they are."""
        return Call({name: _cast(value, dtype, device) for name, value in self.arguments.items()})


def _cast(value: Any, dtype: torch.dtype, device: torch.device | None) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype, device) for item in value)
    return value


class PositionFreeProbe:
    """Queries, keys and values of an attention module as they are before any rotary embedding.

    Families that go through transformers' attention interface are called a second time with an identity rotation and an
    attention function that records; so partial and interleaved rotation, query-key norms, fused projections and yarn's
    scale come out exactly. The others have an adapter that stops before the rotation. Shares the module's parameters.
    """

    def __init__(self, attention: nn.Module, rope_scale: float = 1.0) -> None:
        self._rope_scale = rope_scale
        self._adapter = _ADAPTERS.get(type(attention).__name__)
        if self._adapter is not None:
            self._module = attention
            return
        probe = copy.copy(attention)
        probe.__dict__ = {**attention.__dict__, "_forward_hooks": {}, "_forward_pre_hooks": {}}
        probe.config = copy.deepcopy(attention.config)
        probe.config._attn_implementation = _RECORDER  # type: ignore[union-attr]
        self._module = probe

    def __call__(self, call: Call) -> QKV:
        if self._adapter is not None:
            return self._adapter(self._module, call.arguments["hidden_states"])
        arguments = dict(call.arguments)
        for name in ("attention_mask", "past_key_values", "layer_past"):
            if name in arguments:
                arguments[name] = None
        if arguments.get("position_embeddings") is not None:
            cos, sin = arguments["position_embeddings"]
            # yarn multiplies its tables by a scale, which is part of the score and stays
            arguments["position_embeddings"] = (torch.full_like(cos, self._rope_scale), torch.zeros_like(sin))
        type(self._module).forward(self._module, **arguments)
        recorded = self._module.__dict__.pop("_longmem_recorded", None)
        if recorded is None:
            raise BackboneError(
                f"{type(self._module).__name__} does not go through transformers' attention interface; "
                "add an adapter for it to longmem.modeling.families"
            )
        return cast(QKV, recorded)


_RECORDER = "longmem_record"


def _record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    scaling = kwargs.get("scaling")
    if scaling is None:
        scaling = getattr(module, "scaling", None) or query.shape[-1] ** -0.5
    module.__dict__["_longmem_recorded"] = QKV(query, key, value, float(scaling), kwargs.get("softcap"))
    return torch.zeros_like(query).transpose(1, 2), None


AttentionInterface.register(_RECORDER, _record)


_LOCAL = "longmem_local"


@dataclass(frozen=True)
class LocalScores:
    """What the local attention of one call was computed from.

    Attributes:
        queries: (B, H, T, D), with their positions.
        keys: (B, Hkv, T_keys, D), the cached ones first.
        mask: additive or boolean, broadcast to (B, H, T, T_keys); None is causal.
        scaling: factor on the products.
        softcap: of the scores, or None.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None


def record_local(attention: nn.Module) -> None:
    """Make an attention module able to remember what its next local attention is computed from; once or again.

    Raises:
        BackboneError: if the module does not go through transformers' attention interface.
    """
    if type(attention).__name__ in _ADAPTERS and type(attention).__name__ != "AlibiGPTAttention":
        raise BackboneError(
            f'fusion "softmax" needs the local scores, which {type(attention).__name__} does not give; '
            'use fusion "gate"'
        )
    if attention.config._attn_implementation == _LOCAL:  # type: ignore[union-attr]
        return
    config = copy.deepcopy(attention.config)
    attention.__dict__["_longmem_delegate"] = config._attn_implementation  # type: ignore[union-attr]
    config._attn_implementation = _LOCAL  # type: ignore[union-attr]
    attention.config = config


def want_local(attention: nn.Module) -> None:
    """Ask for the record of the next call; without that nothing is kept alive."""
    attention.__dict__["_longmem_wanted"] = True


def take_local(attention: nn.Module) -> LocalScores:
    """The record of the last call, which is dropped."""
    return cast(LocalScores, attention.__dict__.pop("_longmem_local"))


def _attend_and_record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    if module.__dict__.pop("_longmem_wanted", False):
        module.__dict__["_longmem_local"] = LocalScores(query, key, attention_mask, scaling, kwargs.get("softcap"))
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.__dict__["_longmem_delegate"], eager)
    return cast("tuple[Tensor, Tensor | None]", attend(module, query, key, value, attention_mask, **kwargs))


AttentionInterface.register(_LOCAL, _attend_and_record)


def _alibi_gpt(attention: Any, hidden: Tensor) -> QKV:
    queries, keys, values = (
        attention.split_heads(projection(hidden))
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return QKV(queries, keys, values, attention.scaling)


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


_ADAPTERS: dict[str, Callable[[Any, Tensor], QKV]] = {
    "AlibiGPTAttention": _alibi_gpt,
    "BloomAttention": _bloom,
    "MptAttention": _mpt,
    "FalconAttention": _falcon,
    "GPTJAttention": _gptj,
}


@dataclass(frozen=True)
class Family:
    """The named parts of one backbone."""

    layers: nn.ModuleList
    final_norm: nn.Module | None
    rotary: nn.Module | None
    attention_name: str
    config: PreTrainedConfig

    @classmethod
    def of(cls, model: PreTrainedModel) -> Family:
        """Find the parts of ``model``.

        Raises:
            BackboneError: if the layers, their attention or its output projection go by names not known here.
        """
        config = model.config.get_text_config(decoder=True)
        path = next((p for p in _LAYERS if isinstance(find(model, p), nn.ModuleList)), None)
        if config.is_encoder_decoder or path is None:
            raise BackboneError(
                f"{type(model).__name__} is not a decoder-only model with its layers at one of {', '.join(_LAYERS)}; "
                "use a causal language model of one of the families in the documentation"
            )
        layers = cast(nn.ModuleList, find(model, path))
        trunk = find(model, path.rpartition(".")[0])
        final_norm = next((m for name in _FINAL_NORM if (m := getattr(trunk, name, None)) is not None), None)
        attention = next((name for name in _ATTENTION if hasattr(layers[0], name)), None)
        if attention is None:
            raise BackboneError(
                f"{type(layers[0]).__name__} of {type(model).__name__} has no attention module called "
                f"{', '.join(_ATTENTION)}; layers without attention cannot be remembered"
            )
        family = cls(layers, final_norm, getattr(trunk, "rotary_emb", None), attention, config)
        family.output_projection(family.attention(layers[0]))
        return family

    def attention(self, layer: nn.Module) -> nn.Module:
        return cast(nn.Module, getattr(layer, self.attention_name))

    def probe(self, layer: int, attention: nn.Module | None = None) -> PositionFreeProbe:
        """The probe of backbone layer ``layer``, or of a copy of its attention."""
        kind = self.layer_types()[layer]
        # families with a rotation per layer type keep a scale for each
        fallback = getattr(self.rotary, f"{kind}_attention_scaling", 1.0)
        scale: Any = getattr(self.rotary, "attention_scaling", fallback)
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
        if ffn is None or not self.pre_norm:
            raise BackboneError(
                f'init "zero" needs pre-norm layers with a known feed-forward, and {type(layer).__name__} is not one; '
                'use init "copy"'
            )
        with torch.no_grad():
            for part in (self.output_projection(self.attention(layer)), ffn):
                for parameter in [part] if isinstance(part, nn.Parameter) else part.parameters():
                    parameter.zero_()

    @property
    def pre_norm(self) -> bool:
        """False where a layer norms its sum, and so is never the identity (OPT-350m)."""
        return bool(getattr(self.config, "do_layer_norm_before", True))

    def layer_types(self) -> list[str]:
        """``full_attention``, ``sliding_attention``, ... of every layer."""
        return layer_types(self.config)

    def memory_layers(self) -> list[int]:
        """Layers whose keys and values are worth keeping: full attention, and keys of their own.

        A backbone that slides its window in every layer (Mistral) keeps all its layers.
        """
        types = self.layer_types()
        sharing = getattr(self.config, "kv_sharing_modes", None) or ["own"] * len(types)
        own = [i for i, mode in enumerate(sharing) if mode != "reuse" and hasattr(self.layers[i], self.attention_name)]
        full = [i for i in own if types[i] == "full_attention"]
        sliding = [i for i in own if types[i] == "sliding_attention"]
        return full or sliding

    def kv_heads(self) -> int:
        """Hkv of the attention layers."""
        config = self.config
        if config.model_type == "falcon":
            # an old-style Falcon shares one key/value head, or has one for each query head
            new, multi = config.new_decoder_architecture, config.multi_query
            return int(config.num_kv_heads if new else 1 if multi else config.num_attention_heads)
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)

    def head_dim(self) -> int:
        """D of the attention layers."""
        config = self.config
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def check_memory_layer(self, layer: int) -> None:
        """Refuse a layer that cannot be remembered, and say which can."""
        allowed = self.memory_layers()
        if layer in allowed:
            return
        count = len(self.layers)
        if not 0 <= layer < count:
            reason = f"is out of range, the backbone has {count} layers counted from 0"
        else:
            reason = f"is a {self.layer_types()[layer]} layer, or has no keys of its own"
        raise BackboneError(f"memory_layer {layer} {reason}; these would do: {', '.join(map(str, allowed)) or 'none'}")


def find(root: Any, path: str) -> Any:
    """The attribute at a dotted path, or None."""
    for name in path.split(".") if path else []:
        root = getattr(root, name, None)
        if root is None:
            return None
    return root


def layer_types(config: PreTrainedConfig) -> list[str]:
    """The attention type of every layer of a text config."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    return list(get_layer_types_and_kwargs(config)[0])


def side_sources(num_layers: int, stride: int) -> list[int]:
    """The backbone layer each SideNet layer is copied from: ``stride*i + 1`` (paper, section 3.2)."""
    offset = min(1, stride - 1)
    return [stride * i + offset for i in range(num_layers // stride)]


def cache_view(backbone_config: PreTrainedConfig, stride: int) -> PreTrainedConfig:
    """The backbone's text config with one more layer for each SideNet layer, of its source's type."""
    config = backbone_config.get_text_config(decoder=True)
    types, sources = layer_types(config), side_sources(config.num_hidden_layers, stride)
    view = copy.deepcopy(config)
    view.num_hidden_layers = config.num_hidden_layers + len(sources)
    if getattr(config, "layer_types", None) is not None:
        view.layer_types = types + [types[source] for source in sources]
    return view
