"""Queries, keys and values of an attention layer as they are before any rotary embedding.

B rows · H query heads · Hkv key/value heads · T tokens · D head_dim
"""

from __future__ import annotations

import copy
import inspect
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

    def __init__(self, attention: nn.Module, rope_scale: float = 1.0) -> None:
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
