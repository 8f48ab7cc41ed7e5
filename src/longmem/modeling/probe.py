"""Queries, keys and values of an attention layer as they are before any rotary embedding.

B rows · H query heads · Hkv key/value heads · T tokens · D head_dim
"""

from __future__ import annotations

import copy
import inspect
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from longmem.errors import BackboneError


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


@dataclass(frozen=True)
class Call:
    """The recorded arguments of one module call, by name."""

    arguments: dict[str, Any]

    @classmethod
    def record(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Bind the call to the signature of the module's own forward, below the decorators of transformers."""
        signature = inspect.signature(inspect.unwrap(type(module).forward))
        bound = signature.bind(module, *args, **kwargs).arguments
        bound.pop("self")
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                bound.update(bound.pop(name, {}))
        return cls(dict(bound))

    def replace(self, **changes: Any) -> Call:
        """The same call with changed values; changes to arguments that it does not have are ignored."""
        return Call({**self.arguments, **{k: v for k, v in changes.items() if k in self.arguments}})

    def cast(self, dtype: torch.dtype, device: torch.device | None = None) -> Call:
        """The same call with floating tensors in ``dtype``, and all tensors on ``device`` if one is given."""
        return Call({name: _cast(value, dtype, device) for name, value in self.arguments.items()})


def _cast(value: Any, dtype: torch.dtype, device: torch.device | None) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype, device) for item in value)
    # the keys and values that layers share (Gemma 4): a copied layer writes into this copy, not into the backbone's
    if isinstance(value, UserDict):
        return {name: _cast(item, dtype, device) for name, item in value.items()}
    return value


class PositionFreeProbe:
    """Computes ``QKV`` from the arguments of an attention module's call, with the module's own weights.

    Families that go through transformers' attention interface are called a second time with an identity rotation and an
    attention function that ends the call; so partial and interleaved rotation, query-key norms, fused projections and
    yarn's scale come out exactly. The others have an adapter that stops before the rotation.

    ``rope_scale`` is a factor on its rotary tables (yarn). It scales the scores too, so the projections keep it.
    """

    def __init__(self, attention: nn.Module, rope_scale: float = 1.0) -> None:
        self._rope_scale = rope_scale
        self._adapter = ADAPTERS.get(type(attention).__name__)
        self._module = attention
        if self._adapter is None:
            self._module = copy.copy(attention)  # shares parameters and projections, but neither hooks nor settings
            self._module.__dict__.update(_forward_hooks={}, _forward_pre_hooks={})
            self._module.config = copy.deepcopy(attention.config)
            self._module.config._attn_implementation = _RECORDER  # type: ignore[union-attr]

    def __call__(self, call: Call) -> QKV:
        """The projections for recorded arguments of the module's forward."""
        if self._adapter is not None:
            return self._adapter(self._module, call.arguments["hidden_states"])
        arguments = dict(call.arguments)
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
            "add an adapter for it to longmem.modeling.probe"
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
