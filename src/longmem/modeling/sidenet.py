"""SideNet: copies of every second backbone layer, fed by differences of the backbone's states (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.activations import ACT2FN

from longmem.config import Fusion, LongMemConfig
from longmem.errors import ConfigError
from longmem.modeling.attention import MemoryAttentionOutput, chunk_parts, memory_attention
from longmem.modeling.backbone import Backbone, BackboneRun
from longmem.modeling.families import QKV, Call, Family, record_local, side_sources, take_local, want_local
from longmem.modeling.fusion import fuse, fuse_softmax, local_lse
from longmem.modeling.placement import check_quantisation, copy_module, is_spread
from longmem.types import RetrievedMemory, Retriever


@dataclass
class SideRun:
    """What the SideNet saw in one forward.

    Attributes:
        retrieved: what the augmented layer found; None without memory.
        share: (B, H, T), the share of every token and head given to memory.
        explain: whether ``parts`` are wanted.
        parts: (B, H, T, R), how each head's attention over memory was divided among the chunks; None if not asked for.
        hidden: the input and the output of each layer, (B, T, C), if asked for.
    """

    retrieved: RetrievedMemory | None = None
    share: Tensor | None = None
    explain: bool = False
    parts: Tensor | None = None
    hidden: list[Tensor] | None = None


class SideNet(nn.Module):
    """The trained part: copied layers, their own final norm and the memory gate.

    Args:
        backbone: whose layers are copied; SideNet layer i from backbone layer ``stride*i + 1``.
        config: ``memory_layer`` must be resolved.
    """

    def __init__(self, backbone: Backbone, config: LongMemConfig) -> None:
        super().__init__()
        family = backbone.family
        self.stride = config.stride
        self.final_state = config.final_state
        self.sources = side_sources(backbone.num_layers, config.stride)
        if not self.sources:
            raise ConfigError(
                f"stride ({config.stride}) must not be larger than the backbone's {backbone.num_layers} layers; "
                f"try {min(2, backbone.num_layers)}"
            )
        check_quantisation(backbone.model)
        assert config.memory_layer is not None
        # layers run where their sources do; what passes from one to the next has to follow
        self.spread = is_spread([*family.layers, *([] if family.final_norm is None else [family.final_norm])])
        self.augmented_layer = min(config.memory_layer // config.stride, len(self.sources) - 1)
        self.layers = nn.ModuleList(
            copy_layer(family.layers[source], family.attention_name, backbone.num_layers + index)
            for index, source in enumerate(self.sources)
        )
        norm = family.final_norm
        self.final_norm: nn.Module | None = None if norm is None else copy_module(norm)
        if config.init == "zero":
            for layer in self.layers:
                family.zero_outputs(layer)
        override(self, config.side_activation, config.side_norm_eps)
        self.requires_grad_(True)
        attention = family.attention(self.layers[self.augmented_layer])
        probe = family.probe(self.sources[self.augmented_layer], attention)
        self.reader = MemoryReader(attention, family, config.fusion, probe)
        place = next(self.layers[self.augmented_layer].parameters()).device
        self.memory_gate = nn.Parameter(torch.zeros(self.reader.num_heads, device=place))
        self.gradient_checkpointing = False

    def forward(
        self, backbone: Backbone, run: BackboneRun, final: Tensor, retrieve: Retriever | None, side: SideRun
    ) -> Tensor:
        """The SideNet's state before its final norm, (B, T, C).

        Args:
            run: the backbone's forward: inputs and calls of its layers.
            final: output of the backbone's last layer, (B, T, C).
            retrieve: searches memory; None is no memory.
            side: filled with what was found.
        """
        dtype = self.memory_gate.dtype
        # residuals end at the last layer whatever L is, so that they telescope to it
        ends = [run.inputs[self.stride * (i + 1)] for i in range(len(self.layers) - 1)]
        ends.append(backbone.normed(final) if self.final_state == "normed" else final)
        starts = [run.inputs[self.stride * i] for i in range(len(self.layers))]
        hidden = starts[0].to(dtype)
        if side.hidden is not None:
            side.hidden.append(hidden)
        for index, (layer, source) in enumerate(zip(self.layers, self.sources, strict=True)):
            place = next(layer.parameters()).device if self.spread else None
            call = run.calls[source].cast(dtype, place)
            ensure_cache(call, backbone.num_layers, self.sources)
            hidden = hidden.to(place)
            cross_residual = ends[index].to(place, dtype) - starts[index].to(place, dtype)
            reads = retrieve if index == self.augmented_layer else None
            hidden = self._layer(layer, call, hidden, reads, side) + cross_residual
            if side.hidden is not None:
                side.hidden.append(hidden)
        return hidden

    def _layer(self, layer: nn.Module, call: Call, hidden: Tensor, retrieve: Retriever | None, side: SideRun) -> Tensor:
        def replay(hidden: Tensor) -> Tensor:
            with self.reader.reading(retrieve, self.memory_gate, side):
                output = layer(**call.replace(hidden_states=hidden).arguments)
            return cast(Tensor, output[0] if isinstance(output, tuple) else output)

        if self.gradient_checkpointing and self.training:
            # the recomputation searches again: the bank must not be written before backward
            return cast(Tensor, checkpoint(replay, hidden, use_reentrant=False))
        return replay(hidden)


class MemoryReader:
    """Lets the attention of one layer read memory, for every family alike.

    Before the attention runs, its position-free queries search memory and attend to what they find; before its output
    projection, where the heads are still apart, the result is mixed into theirs.

    Args:
        attention: of the layer: a SideNet's, or the backbone's own.
        family: of the backbone.
        fusion: how both are mixed.
        probe: gives the position-free projections of a call of ``attention``.
    """

    def __init__(self, attention: nn.Module, family: Family, fusion: Fusion, probe: Callable[[Call], QKV]) -> None:
        text = family.config
        self.num_heads = int(text.num_attention_heads)
        self._probe = probe
        self._joint = attention if fusion == "softmax" else None
        if self._joint is not None:
            record_local(attention)
        self._retrieve: Retriever | None = None
        self._gate: Tensor | None = None
        self._side = SideRun()
        self._memory: MemoryAttentionOutput | None = None
        attention.register_forward_pre_hook(self._before_attention, with_kwargs=True)
        family.output_projection(attention).register_forward_pre_hook(self._before_output)

    @contextmanager
    def reading(self, retrieve: Retriever | None, gate: Tensor, side: SideRun) -> Iterator[None]:
        """Within this context the layer reads memory through ``retrieve``."""
        self._retrieve, self._gate, self._side, self._memory = retrieve, gate, side, None
        try:
            yield
        finally:
            self._retrieve, self._gate, self._side, self._memory = None, None, SideRun(), None

    def _before_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._retrieve is None:
            return
        call = Call.record(module, args, kwargs)
        qkv = self._probe(call)
        retrieved = self._retrieve(qkv.queries.detach())
        if self._joint is not None:
            want_local(self._joint)
        self._side.retrieved = retrieved
        self._memory = memory_attention(qkv.queries, retrieved, scaling=qkv.scaling, softcap=qkv.softcap)
        if self._side.explain:
            self._side.parts = chunk_parts(
                qkv.queries, retrieved, self._memory.lse, scaling=qkv.scaling, softcap=qkv.softcap
            )

    def _before_output(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
        if self._memory is None:
            return None
        assert self._gate is not None
        memory, self._memory = self._memory, None
        local_out = args[0].unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        if self._joint is None:
            fused = fuse(local_out, memory.out, memory.found, self._gate)
        else:
            seen = take_local(self._joint)
            lse = local_lse(seen.queries, seen.keys, seen.mask, scaling=seen.scaling, softcap=seen.softcap)
            fused = fuse_softmax(local_out, lse, memory.out, memory.lse, memory.found, self._gate)
        self._side.share = fused.share.detach()
        return (fused.out.transpose(1, 2).flatten(2), *args[1:])


def copy_layer(layer: nn.Module, attention_name: str, cache_index: int) -> nn.Module:
    """A trainable copy of a decoder layer whose keys go to their own place in the cache."""
    copied = copy_module(layer)
    attention = getattr(copied, attention_name)
    if hasattr(attention, "layer_idx"):
        attention.layer_idx = cache_index
    return copied


def override(sidenet: SideNet, activation: str | None, norm_eps: float | None) -> None:
    """Give the copied layers another activation or norm epsilon, as the released code does."""
    for module in sidenet.modules():
        if activation is not None and hasattr(module, "act") and isinstance(module.act, nn.Module):
            module.act = ACT2FN[activation]
        if norm_eps is not None:
            for name in ("eps", "variance_epsilon"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, norm_eps)


def ensure_cache(call: Call, num_layers: int, sources: list[int]) -> None:
    """Append a place for every SideNet layer to a cache that was built for the backbone alone."""
    cache = next((value for value in call.arguments.values() if isinstance(value, Cache)), None)
    if cache is None or cache.layer_class_to_replicate is not None:
        return
    for source in sources[max(0, len(cache.layers) - num_layers) :]:
        like = cache.layers[source]
        window = getattr(like, "sliding_window", None)
        cache.layers.append(type(like)() if window is None else type(like)(sliding_window=window))
