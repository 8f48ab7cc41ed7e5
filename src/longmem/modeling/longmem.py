"""``LongMem``: a frozen backbone and its SideNet as one transformers model (Wang et al., 2023)."""

from __future__ import annotations

from bisect import bisect_right
from collections import UserDict
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PreTrainedModel
from transformers.activations import ACT2FN

from longmem.config import LongMemConfig, side_layout
from longmem.errors import BackboneError, ConfigError
from longmem.modeling.backbone import Backbone, BackboneRun
from longmem.modeling.families import attention_of
from longmem.modeling.memory_lm import MemoryLM
from longmem.modeling.reading import MemoryReader, TokenGate
from longmem.modeling.weights import copy_module, packed_by, place_of


class LongMem(MemoryLM):
    """A causal language model with a long-term memory (paper, sections 3.1 to 3.3).

    Args:
        config, backbone, fingerprint: see ``MemoryLM``; the backbone is used as it is and never changed.
        side_dtype: dtype of the SideNet; None is the backbone's.
    """

    config_class = LongMemConfig
    weights_file = "sidenet.safetensors"
    weights_prefix = "sidenet."
    base_model_prefix = "longmem"
    supports_gradient_checkpointing = True

    def __init__(
        self,
        config: LongMemConfig,
        backbone: PreTrainedModel | None = None,
        *,
        side_dtype: torch.dtype | None = None,
        fingerprint: str | None = None,
    ) -> None:
        super().__init__(config, backbone, fingerprint=fingerprint)
        self.sidenet = SideNet(self.backbone, cast(LongMemConfig, self.config))
        self.sidenet.to(side_dtype or self.backbone.model.dtype)

    def read(self, run: BackboneRun) -> Tensor:
        """States (B, T, C) for the head: the SideNet's, after its own final norm."""
        final, last = self.sidenet(self.backbone, run), run.inputs[self.backbone.num_layers]
        # the head expects the dtype and device of the backbone's last layer; the SideNet may have others
        return self.backbone.finish(final.to(last), self.sidenet.final_norm)

    @property
    def memory_gate(self) -> Tensor:  # type: ignore[override]
        """(n*H,) gate logits, layer by layer."""
        return self.sidenet.memory_gate

    @property
    def augmented_layers(self) -> tuple[int, ...]:
        """For each memory layer, the 0-based SideNet layer that searches its keys."""
        return self.sidenet.augmented_layers

    @property
    def augmented_layer(self) -> int:
        """The first of them; in the paper there is one."""
        return self.augmented_layers[0]

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Recompute the SideNet's layers in backward. Write memory only after ``backward``."""
        self.sidenet.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.sidenet.gradient_checkpointing = False


class SideNet(nn.Module):
    """The trained part: copies of some backbone layers, their own final norm and the memory gate (section 3.2).

    Attributes:
        sources: the backbone layer that each SideNet layer is copied from.
        bounds: SideNet layer i stands beside the backbone layers from bounds[i] up to, not including, bounds[i+1].
        augmented_layers: for each memory layer, the SideNet layer that searches its keys.
        memory_gate: (n*H,) a logit per head of each augmented layer; where each token chooses, ``gates`` do instead.
        gates: with fusion "token" a ``TokenGate`` for each augmented layer, else None.

    Raises:
        BackboneError: if the backbone's weights cannot be copied.
        ConfigError: if the stride leaves no layer, or one layer would have to read two memory layers.
    """

    def __init__(self, backbone: Backbone, config: LongMemConfig) -> None:
        super().__init__()
        family = backbone.family
        if (method := packed_by(backbone.model)) not in (None, "bitsandbytes"):
            raise BackboneError(
                f"the backbone is quantised by {method}, whose layers cannot be copied into a "
                "SideNet; load it unquantised, or quantised by bitsandbytes"
            )
        self.delta = config.init == "delta"
        self.final_state = config.final_state
        layers = backbone.memory_layers if self.delta else ()
        self.sources, self.bounds = side_layout(family.config, config.stride, layers)
        if not self.sources:
            raise ConfigError(
                f"stride ({config.stride}) must not be larger than the backbone's {backbone.num_layers} layers; "
                f"try {min(2, backbone.num_layers)}"
            )
        self.augmented_layers = tuple(bisect_right(self.bounds[:-1], layer) - 1 for layer in backbone.memory_layers)
        if len(set(self.augmented_layers)) < len(self.augmented_layers):
            raise ConfigError(
                f"memory_layers {list(backbone.memory_layers)} would be read by SideNet layers "
                f"{list(self.augmented_layers)}, one of them twice; take layers further apart, or a smaller stride "
                f"than {config.stride}"
            )
        self.layers = nn.ModuleList(copy_module(family.layers[source]) for source in self.sources)
        norm = family.final_norm
        self.final_norm: nn.Module | None = None if norm is None else copy_module(norm)
        for index, (layer, source) in enumerate(zip(self.layers, self.sources, strict=True)):
            attention: Any = attention_of(layer)
            if hasattr(attention, "layer_idx"):  # its keys go to a layer of the cache of their own
                attention.layer_idx = backbone.num_layers + index
            if config.init == "zero":
                family.zero_outputs(layer)
            if config.trained == "attention":
                family.share_feed_forward(layer, family.layers[source])
        _override(self, config.side_activation, config.side_norm_eps)
        self.requires_grad_(True)
        # layers run where their sources do; what passes from one to the next has to follow
        self.spread = len({place_of(part) for part in (*family.layers, norm) if part is not None}) > 1

        places = [self.layers[index] for index in self.augmented_layers]
        heads, dim = int(family.config.num_attention_heads), family.head_dim(backbone.memory_layers[0])
        logits = torch.zeros(len(places) * heads, device=place_of(places[0]))
        self.gates: nn.ModuleList | None = None
        if config.fusion == "token":  # then the logits only say dtype and device
            self.register_buffer("memory_gate", logits, persistent=False)
            self.gates = nn.ModuleList(TokenGate(heads, dim).to(place_of(layer)) for layer in places)
        else:
            self.memory_gate = nn.Parameter(logits)
        for place, (memory_layer, index) in enumerate(zip(backbone.memory_layers, self.augmented_layers, strict=True)):
            attention = family.attention(self.layers[index])
            probe = family.probe(self.sources[index], attention)
            MemoryReader(attention, family, memory_layer, place, config.fusion, self, probe)
        self.gradient_checkpointing = False

    def forward(self, backbone: Backbone, run: BackboneRun) -> Tensor:
        """The SideNet's state before its final norm, (B, T, C).

        After layer i, what the backbone changed beside it is added (section 3.2, the cross-network residual):
        h = layer_i(h) + H[bounds[i+1]] - H[bounds[i]], from h = H[bounds[0]] on, where H[l] is the input of backbone
        layer l. With ``init="delta"`` the copy stands for its source layer: H[source+1] is subtracted instead.

        ``run`` is the backbone's forward: inputs and calls of its layers, and how memory is read.
        """
        dtype, last = self.memory_gate.dtype, run.inputs[self.bounds[-1]]
        if self.final_state == "normed":  # as in the released code
            last = backbone.normed(last)
        hidden = run.inputs[self.bounds[0]].to(dtype)
        for index, (layer, source) in enumerate(zip(self.layers, self.sources, strict=True)):
            device = next(layer.parameters()).device if self.spread else None
            # a copied layer gets the mask, positions and cache that its source got; only the hidden states differ
            call = _cast(run.calls[source], dtype, device)
            _ensure_cache(call, backbone.num_layers, self.sources)
            hidden = self._layer(layer, call, hidden.to(device), run)
            # delta: the layer stands for its source, so the backbone's part is that of the layers in between
            first, end = source + 1 if self.delta else self.bounds[index], self.bounds[index + 1]
            if first != end:
                after = last if end == self.bounds[-1] else run.inputs[end]
                hidden = hidden + (after.to(device, dtype) - run.inputs[first].to(device, dtype))
        return hidden

    def _layer(self, layer: nn.Module, call: dict[str, Any], hidden: Tensor, run: BackboneRun) -> Tensor:
        def replay(hidden: Tensor) -> Tensor:
            # in the attention of an augmented layer `MemoryReader.search` and then `MemoryReader.fuse` run (`__init__`
            # has put them there); they find the run because it is active, also when backward recomputes the layer
            with run.active():
                output = layer(**{**call, "hidden_states": hidden})
            return cast(Tensor, output[0] if isinstance(output, tuple) else output)

        if self.gradient_checkpointing and self.training:
            # the recomputation searches again, so memory must not be written before backward
            return cast(Tensor, checkpoint(replay, hidden, use_reentrant=False))
        return replay(hidden)


def _override(sidenet: SideNet, activation: str | None, norm_eps: float | None) -> None:
    """Give the copied layers another activation or norm epsilon, as the released code does."""
    if activation is not None and not (isinstance(activation, str) and activation in ACT2FN):
        raise ConfigError(f"side_activation ({activation}) is no activation of transformers; try gelu")
    acts = [module for module in sidenet.modules() if isinstance(getattr(module, "act", None), nn.Module)]
    if activation is not None and not acts:
        raise ConfigError(
            f"side_activation ({activation}) finds no `act` of the SideNet's own to replace; leave it out"
        )
    for module in acts if activation is not None else ():
        module.act = ACT2FN[activation]
    for module in sidenet.modules():
        if norm_eps is not None:
            for name in ("eps", "variance_epsilon"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, norm_eps)


def _cast(value: Any, dtype: torch.dtype, device: torch.device | None) -> Any:
    """Arguments of a call with floating tensors in ``dtype``, and all tensors on ``device`` if one is given."""
    if isinstance(value, Tensor):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype, device) for item in value)
    # layers of Gemma 4 share keys and values in a UserDict: a copied layer writes into this copy, not the backbone's
    if isinstance(value, dict | UserDict):
        return {name: _cast(item, dtype, device) for name, item in value.items()}
    return value


def _ensure_cache(call: dict[str, Any], num_layers: int, sources: list[int]) -> None:
    """Append a layer for every SideNet layer to a cache that was built for the backbone alone."""
    cache = next((value for value in call.values() if isinstance(value, Cache)), None)
    if cache is None or cache.layer_class_to_replicate is not None:  # such a cache grows by itself
        return
    # SideNet layers that have theirs from an earlier call are left out
    for source in sources[max(0, len(cache.layers) - num_layers) :]:
        like = cache.layers[source]
        window = getattr(like, "sliding_window", None)
        cache.layers.append(type(like)() if window is None else type(like)(sliding_window=window))


AutoConfig.register("longmem", LongMemConfig, exist_ok=True)
AutoModelForCausalLM.register(LongMemConfig, LongMem, exist_ok=True)
