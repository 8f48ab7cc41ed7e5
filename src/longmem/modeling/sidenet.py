"""SideNet: copies of every second backbone layer, fed by differences of the backbone's states (paper, section 3.2)."""

from __future__ import annotations

import functools
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.activations import ACT2FN

from longmem.config import LongMemConfig
from longmem.errors import ConfigError
from longmem.modeling.backbone import Backbone, BackboneRun
from longmem.modeling.families import attention_of
from longmem.modeling.gates import TokenGate
from longmem.modeling.placement import check_quantisation, copy_module, is_spread, place_of
from longmem.modeling.probe import Call
from longmem.modeling.reading import MemoryReader, gate_slice


class SideNet(nn.Module):
    """The trained part: copied layers, their own final norm and the memory gate.

    Args:
        backbone: whose layers are copied, see ``config.side_layout``.
        config: ``memory_layers`` must be resolved.

    Attributes:
        sources: the backbone layer that each SideNet layer is copied from.
        bounds: SideNet layer i stands beside the backbone layers from bounds[i] up to, not including, bounds[i+1].
        augmented_layers: for each memory layer, the SideNet layer that searches its keys.
        memory_gate: (n*H,) a logit per head of each augmented layer; where each token chooses, ``gates`` do instead.
        gates: with fusion "token" a ``TokenGate`` for each augmented layer, else None.

    Raises:
        ConfigError: if the stride leaves no layer, or one layer would have to read two memory layers.
    """

    def __init__(self, backbone: Backbone, config: LongMemConfig) -> None:
        super().__init__()
        family = backbone.family
        self.delta = config.init == "delta"
        self.final_state = config.final_state
        self.sources, self.bounds = family.side_layout(config.stride, backbone.memory_layers if self.delta else ())
        if not self.sources:
            raise ConfigError(
                f"stride ({config.stride}) must not be larger than the backbone's {backbone.num_layers} layers; "
                f"try {min(2, backbone.num_layers)}"
            )
        check_quantisation(backbone.model)
        # layers run where their sources do; what passes from one to the next has to follow
        self.spread = is_spread([*family.layers, *([] if family.final_norm is None else [family.final_norm])])
        self.augmented_layers = tuple(self._augmented_beside(layer) for layer in backbone.memory_layers)
        if len(set(self.augmented_layers)) < len(self.augmented_layers):
            raise ConfigError(
                f"memory_layers {list(backbone.memory_layers)} would be read by SideNet layers "
                f"{list(self.augmented_layers)}, one of them twice; take layers further apart, or a smaller stride "
                f"than {config.stride}"
            )
        self.layers = nn.ModuleList(
            copy_layer(family.layers[source], backbone.num_layers + index) for index, source in enumerate(self.sources)
        )
        norm = family.final_norm
        self.final_norm: nn.Module | None = None if norm is None else copy_module(norm)
        if config.init == "zero":
            for layer in self.layers:
                family.zero_outputs(layer)
        if config.trained == "attention":
            for layer, source in zip(self.layers, self.sources, strict=True):
                family.share_feed_forward(layer, family.layers[source])
        override(self, config.side_activation, config.side_norm_eps)
        self.requires_grad_(True)
        heads = int(family.config.num_attention_heads)
        device = place_of(self.layers[self.augmented_layers[0]])
        logits = torch.zeros(len(self.augmented_layers) * heads, device=device)
        self.gates: nn.ModuleList | None = None
        if config.fusion == "token":
            self.register_buffer("memory_gate", logits, persistent=False)
            places = [place_of(self.layers[index]) for index in self.augmented_layers]
            self.gates = nn.ModuleList(TokenGate(heads, backbone.head_dim).to(place) for place in places)
        else:
            self.memory_gate = nn.Parameter(logits)
        for place, (memory_layer, index) in enumerate(zip(backbone.memory_layers, self.augmented_layers, strict=True)):
            attention = family.attention(self.layers[index])
            gate = functools.partial(self._gate, place, heads)
            probe = family.probe(self.sources[index], attention)
            MemoryReader(attention, family, memory_layer, place, config.fusion, gate, probe)
        self.gradient_checkpointing = False

    def forward(self, backbone: Backbone, run: BackboneRun, side_hidden: list[Tensor] | None = None) -> Tensor:
        """The SideNet's state before its final norm, (B, T, C).

        Args:
            run: the backbone's forward: inputs and calls of its layers, and how memory is read.
            side_hidden: a list to which the SideNet's input and each layer's output, (B, T, C), are appended.
        """
        dtype = self.memory_gate.dtype
        states = [run.inputs[bound] for bound in self.bounds]
        if self.final_state == "normed":  # as in the released code
            states[-1] = backbone.normed(states[-1])
        hidden = states[0].to(dtype)
        if side_hidden is not None:
            side_hidden.append(hidden)
        for index, (layer, source) in enumerate(zip(self.layers, self.sources, strict=True)):
            device = next(layer.parameters()).device if self.spread else None
            # a copied layer gets the mask, positions and cache that its source got; only the hidden states differ
            call = run.calls[source].cast(dtype, device)
            ensure_cache(call, backbone.num_layers, self.sources)
            hidden = self._layer(layer, call, hidden.to(device), run)
            # delta: the layer stands for its source, so the backbone's part is that of the layers in between
            first = source + 1 if self.delta else self.bounds[index]
            if first != self.bounds[index + 1]:
                before = run.inputs[first] if self.delta else states[index]
                hidden = hidden + (states[index + 1].to(device, dtype) - before.to(device, dtype))
            if side_hidden is not None:
                side_hidden.append(hidden)
        return hidden

    def _layer(self, layer: nn.Module, call: Call, hidden: Tensor, run: BackboneRun) -> Tensor:
        def replay(hidden: Tensor) -> Tensor:
            with run:  # the MemoryReader asks for the current run; backward recomputes long after forward left it
                output = layer(**call.replace(hidden_states=hidden).arguments)
            return cast(Tensor, output[0] if isinstance(output, tuple) else output)

        if self.gradient_checkpointing and self.training:
            # the recomputation searches again, so memory must not be written before backward
            return cast(Tensor, checkpoint(replay, hidden, use_reentrant=False))
        return replay(hidden)

    def _gate(self, place: int, heads: int) -> Tensor | TokenGate:
        return gate_slice(self.memory_gate, place, heads) if self.gates is None else cast(TokenGate, self.gates[place])

    def _augmented_beside(self, memory_layer: int) -> int:
        """The SideNet layer that stands beside a backbone layer, see ``bounds``."""
        return max(i for i, bound in enumerate(self.bounds[:-1]) if bound <= memory_layer)


def copy_layer(layer: nn.Module, cache_index: int) -> nn.Module:
    """A trainable copy of a decoder layer whose keys go to their own place in the cache."""
    copied = copy_module(layer)
    attention = attention_of(copied)
    if hasattr(attention, "layer_idx"):
        attention.layer_idx = cache_index  # type: ignore[union-attr]
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
    if cache is None or cache.layer_class_to_replicate is not None:  # such a cache grows by itself
        return
    # SideNet layers that have their place from an earlier call are left out
    for source in sources[max(0, len(cache.layers) - num_layers) :]:
        like = cache.layers[source]
        window = getattr(like, "sliding_window", None)
        cache.layers.append(type(like)() if window is None else type(like)(sliding_window=window))
