"""The frozen backbone: run once, unmodified, with its layer states handed over.

All hooks of the project are here. They do nothing unless a ``splice`` or an ``encode`` of this very ``Backbone`` is
running, so the model behaves as ever for anybody else who calls it.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import CompileableContextVar

from longmem.modeling.families import QKV, Call, Family
from longmem.modeling.placement import place_of, real_parameters
from longmem.types import AttentionKV


@dataclass
class BackboneRun:
    """What one forward of the backbone left behind.

    Attributes:
        inputs: ``inputs[i]`` is the input of layer i, (B, T, C): H_LLM(i) of the paper. The last layer's output is
            handed to ``hand_over``.
        calls: the arguments of every layer's call: mask, rotary tables, ALiBi, cache.
        qkv: position-free projections of the memory layer.
    """

    inputs: dict[int, Tensor] = field(default_factory=dict)
    calls: dict[int, Call] = field(default_factory=dict)
    qkv: QKV | None = None
    hand_over: Callable[[BackboneRun, Tensor], Tensor] | None = None
    final_norm: Callable[[Tensor], Tensor] | None = None
    encode_only: bool = False

    def kv(self, mask: Tensor | None) -> AttentionKV:
        """The memory layer's keys and values, (B, Hkv, T, D) each, without gradient."""
        assert self.qkv is not None, "the memory layer has not run"
        return AttentionKV(self.qkv.keys.detach(), self.qkv.values.detach(), mask)


class _Stop(Exception):
    """Ends a forward whose later layers nobody needs."""


class Backbone(nn.Module):
    """An unmodified, frozen causal language model and the hooks that read it.

    Args:
        model: any ``AutoModelForCausalLM``; its parameters are frozen here and it is kept in eval mode.
        memory_layer: 0-based layer whose keys and values are remembered.
        frozen: False: all its parameters are trained, with its dropout (``MemTRM``).

    Raises:
        BackboneError: if the architecture is not supported, or the layer cannot be remembered.
    """

    def __init__(self, model: PreTrainedModel, memory_layer: int, *, frozen: bool = True) -> None:
        super().__init__()
        self.family = Family.of(model)
        self.family.check_memory_layer(memory_layer)
        self.memory_layer = memory_layer
        self.frozen = frozen
        self.model = model.requires_grad_(not frozen).train(model.training and not frozen)
        # False where a forward must not end half way: FSDP2 would leave layers gathered
        self.stops_early = True
        self._probe = self.family.probe(memory_layer)
        self._parameters_of_forward = set(inspect.signature(type(model).forward).parameters)
        self._current = CompileableContextVar(f"longmem_backbone_{id(self)}")
        self._hook()

    @property
    def device(self) -> torch.device:
        """Where its inputs go: the device of its first layer, also where weights are kept elsewhere until needed."""
        return place_of(self.model)

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.family.layers)

    @property
    def kv_heads(self) -> int:
        """Hkv."""
        return self.family.kv_heads()

    @property
    def head_dim(self) -> int:
        """D."""
        return self.family.head_dim()

    def train(self, mode: bool = True) -> Backbone:
        """A frozen backbone stays in eval mode: its dropout would change what memory holds."""
        super().train(mode and not self.frozen)
        return self

    @contextmanager
    def splice(
        self,
        hand_over: Callable[[BackboneRun, Tensor], Tensor] | None = None,
        final_norm: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[BackboneRun]:
        """While open, a forward of ``model`` ends in ``hand_over`` and the rest of the backbone's own code.

        Args:
            hand_over: called with the run and the last layer's output (B, T, C); what it returns takes that output's
                place in the backbone's final part: norm, head, caps, ``labels``. None: the run only gets the memory
                layer's projections, with a gradient.
            final_norm: stands in for the backbone's final norm; None keeps it.
        """
        with self._running(BackboneRun(hand_over=hand_over, final_norm=final_norm)) as run:
            yield run

    @torch.no_grad()
    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> QKV:
        """Position-free q, k, v of the memory layer for ids (B, T); nothing behind its projections runs."""
        with self._running(BackboneRun(encode_only=True)) as run, suppress(_Stop):
            self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)
        assert run.qkv is not None
        return run.qkv

    def accepted(self, **arguments: Any) -> dict[str, Any]:
        """Those of the arguments that the model's forward has by name and that are not None."""
        return {k: v for k, v in arguments.items() if v is not None and k in self._parameters_of_forward}

    def probed(self, call: Call) -> QKV:
        """The memory layer's projections in the forward that is running, as its hooks have just found them."""
        run = self._current.get()
        assert run is not None and run.qkv is not None, "only inside of a splice, once the memory layer has begun"
        return cast(QKV, run.qkv)

    def running_kv(self) -> AttentionKV:
        """Keys and values that the running forward will leave in memory, without a mask; see ``probed``."""
        run = self._current.get()
        assert run is not None and run.qkv is not None, "only inside of a splice, once the memory layer has begun"
        return cast(BackboneRun, run).kv(None)

    def normed(self, hidden: Tensor) -> Tensor:
        """The backbone's final norm of (B, T, C), past any hook."""
        norm = self.family.final_norm
        # `forward` and not a call: it still is accelerate's, where accelerate fetches the weights
        return hidden if norm is None else cast(Tensor, norm.forward(hidden))

    def fingerprint(self) -> str:
        """See ``fingerprint_of``."""
        return fingerprint_of(self.model)

    @contextmanager
    def _running(self, run: BackboneRun) -> Iterator[BackboneRun]:
        token = self._current.set(run)
        try:
            yield run
        finally:
            self._current.reset(token)

    def _hook(self) -> None:
        last = self.num_layers - 1
        for index, layer in enumerate(self.family.layers):
            layer.register_forward_pre_hook(self._before_layer(index), with_kwargs=True)
        attention = self.family.attention(self.family.layers[self.memory_layer])
        attention.register_forward_pre_hook(self._before_memory_attention, with_kwargs=True)
        self.family.layers[last].register_forward_hook(self._after_last_layer)
        if self.family.final_norm is not None:
            self.family.final_norm.register_forward_hook(self._after_final_norm)

    def _before_layer(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            run = self._current.get()
            if run is not None and run.hand_over is not None:
                run.calls[index] = Call.record(module, args, kwargs)
                run.inputs[index] = run.calls[index].arguments["hidden_states"]

        return hook

    def _before_memory_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = self._current.get()
        if run is None:
            return
        # a SideNet has queries of its own; a layer that reads memory itself searches with these
        with torch.set_grad_enabled(torch.is_grad_enabled() and run.hand_over is None):
            run.qkv = self._probe(Call.record(module, args, kwargs))
        if run.encode_only and self.stops_early:
            raise _Stop

    def _after_last_layer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        run = self._current.get()
        if run is None or run.hand_over is None:
            return output
        if isinstance(output, tuple):
            return (run.hand_over(run, output[0]), *output[1:])
        return run.hand_over(run, output)

    def _after_final_norm(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        run = self._current.get()
        if run is None or run.final_norm is None:
            return output
        return cast(Tensor, run.final_norm(args[0]))


def fingerprint_of(model: PreTrainedModel, weights: Mapping[str, Tensor] | None = None) -> str:
    """16 hex digits of a SHA-256 over the architecture and a sample of every weight.

    Two backbones with equal fingerprints give equal keys and values; memory and SideNets are tied to it.

    Args:
        model: any causal language model.
        weights: of the same names as its parameters, in their place.
    """
    fields = _architecture(model.config.get_text_config(decoder=True).to_dict())
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, sample in sorted((n, _sample(p)) for n, p in (weights.items() if weights else real_parameters(model))):
        digest.update(f"{name}{sample}".encode())
    return digest.hexdigest()[:16]


def _sample(parameter: Tensor) -> str:
    """Shape and 64 values of a parameter."""
    flat = parameter.detach().flatten()
    values = flat[:: max(1, flat.numel() // 64)][:64].to("cpu")
    # bf16 is the coarsest type a backbone is loaded in; the same weights must agree with themselves
    return f"{tuple(parameter.shape)}{values.to(torch.bfloat16).view(torch.int16).tolist()}"


# fields that say how a model was loaded or is used, not what it computes
_INCIDENTAL = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "return_dict",
    "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "problem_type", "id2label", "label2id",
}  # fmt: skip


def _architecture(fields: Any) -> Any:
    """A config's dict without what saving, loading and using a model may change."""
    if not isinstance(fields, dict):
        return fields
    kept = {k: _architecture(v) for k, v in fields.items() if k not in _INCIDENTAL and not str(k).startswith("_")}
    return {k: v for k, v in kept.items() if v is not None}


def position_free_qkv(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    layers: Iterable[int] | None = None,
) -> dict[int, QKV]:
    """Position-free q (B, H, T, D), k, v (B, Hkv, T, D) of the given layers of any backbone; None is every layer.

    Raises:
        BackboneError: if the architecture is not supported.
    """
    family = Family.of(model)
    wanted = list(range(len(family.layers))) if layers is None else list(layers)
    handles = []
    found: dict[int, QKV] = {}

    def watch(index: int) -> None:
        probe = family.probe(index)
        attention = family.attention(family.layers[index])

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[index] = probe(Call.record(module, args, kwargs))

        handles.append(attention.register_forward_pre_hook(hook, with_kwargs=True))

    for index in wanted:
        watch(index)
    try:
        with torch.no_grad():
            model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found
