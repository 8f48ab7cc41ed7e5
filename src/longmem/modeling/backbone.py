"""The frozen backbone: run once, unmodified, with its layer states recorded.

Nothing is ever attached to the user's model. A ``Backbone`` runs a mirror of it: modules of its own over the very same
weights, which carry the hooks. What a call records is kept in its ``BackboneRun``, found through a context variable,
so that calls in different threads never meet.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.output_capturing import CompileableContextVar

from longmem.modeling.families import QKV, Family, arguments_of, find
from longmem.modeling.weights import fingerprint_of, mirror_of
from longmem.types import AttentionKV

_CURRENT = CompileableContextVar("longmem_run")


@dataclass
class BackboneRun:
    """What one forward of the backbone left behind.

    Attributes:
        inputs: ``inputs[i]`` is the input of layer i, (B, T, C): H_LLM(i) of the paper; ``inputs[L]`` is the last
            layer's output, before the final norm.
        calls: the arguments of every layer's call by name: mask, rotary tables, ALiBi, cache. SideNet layers get
            the same.
        qkv: position-free projections of each memory layer.
        output: what the decoder gave: ``last_hidden_state`` (B, T, C) after the final norm, the cache, and the
            hidden states and attentions that were asked for.
        reading: how memory is read in this call, see ``modeling.reading``; None without memory.
        decoded: what the decoder gives in place of running once more, see ``Backbone.head``.
        stop_after: the memory layer after whose projections the forward ends; None runs it whole.
    """

    inputs: dict[int, Tensor] = field(default_factory=dict)
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    qkv: dict[int, QKV] = field(default_factory=dict)
    output: BaseModelOutputWithPast | None = None
    reading: Any = None  # a Reading; its module imports this one
    decoded: BaseModelOutputWithPast | None = None
    stop_after: int | None = None

    def kv(self, mask: Tensor | None) -> AttentionKV:
        """The memory layers' keys and values, (B, n*Hkv, T, D) each, without gradient."""
        layers = [self.qkv[layer] for layer in sorted(self.qkv)]
        keys = torch.cat([each.keys for each in layers], dim=1) if len(layers) > 1 else layers[0].keys
        values = torch.cat([each.values for each in layers], dim=1) if len(layers) > 1 else layers[0].values
        return AttentionKV(keys.detach(), values.detach(), mask)

    @contextmanager
    def active(self) -> Iterator[None]:
        """While open, hooks that run in this thread write to this run."""
        before = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(before)


def current_run() -> BackboneRun | None:
    """The run that this thread is in."""
    return cast("BackboneRun | None", _CURRENT.get())


class _Stop(Exception):
    """Ends a forward whose later layers nobody needs."""


class Backbone(nn.Module):
    """An unmodified causal language model; it is frozen, except in ``MemTRM``.

    Args:
        model: any ``AutoModelForCausalLM``; its parameters are frozen here and it is kept in eval mode.
        memory_layers: 0-based layers whose keys and values are remembered, ascending.
        frozen: False: all its parameters are trained, with its dropout (``MemTRM``).
    """

    def __init__(self, model: PreTrainedModel, memory_layers: tuple[int, ...], *, frozen: bool = True) -> None:
        super().__init__()
        self.family = Family.of(model)
        self.family.check_memory_layers(memory_layers)
        self.memory_layers = memory_layers
        self.frozen = frozen
        self.model = model.requires_grad_(not frozen).train(model.training and not frozen)
        # False where a forward must not end half way: FSDP2 would leave layers gathered
        self.stops_early = True
        # called with each memory layer's attention in a new mirror: the baselines put their MemoryReader there
        self.attach: Callable[[nn.Module, int], None] | None = None

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.family.layers)

    @property
    def fingerprint(self) -> str:
        """A hash of its weights as they are now."""
        return fingerprint_of(self.model)

    def train(self, mode: bool = True) -> Backbone:
        """A frozen backbone stays in eval mode: its dropout would change what memory holds."""
        super().train(mode and not self.frozen)
        if "mirror" in self.__dict__:
            self.mirror.train(mode and not self.frozen)
        return self

    def run(self, input_ids: Tensor | None, *, reading: Any = None, **options: Any) -> BackboneRun:
        """Run the decoder, without the head, on (B, T) ids.

        Args:
            reading: the ``Reading`` of this call: what to search, and where to keep what is found.
            **options: of the backbone's own forward: attention_mask, past_key_values, ...; see ``_accepted``.
        """
        run = BackboneRun(reading=reading)
        output = self._decode(run, input_ids, options)
        run.output = BaseModelOutputWithPast(last_hidden_state=output) if isinstance(output, Tensor) else output
        return run

    @torch.no_grad()
    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BackboneRun:
        """Position-free q, k, v of the memory layers for ids (B, T); no layer above the last of them runs."""
        run = BackboneRun(stop_after=self.memory_layers[-1] if self.stops_early else None)
        with suppress(_Stop):
            self._decode(run, input_ids, {"attention_mask": attention_mask, "use_cache": False})
        return run

    def _decode(self, run: BackboneRun, input_ids: Tensor | None, options: dict[str, Any]) -> Any:
        decoder = find(self.mirror, self.family.decoder_path)
        with run.active():
            return decoder(input_ids=input_ids, **_accepted(decoder, options))

    def head(self, hidden: Tensor, run: BackboneRun, **options: Any) -> CausalLMOutputWithPast:
        """The backbone's own way from final states to its output: head, caps, scales, loss.

        The whole model runs once more, but its decoder computes nothing: it gives ``hidden`` (B, T, C), and of the run
        all the rest, cache, hidden states, attentions. ``options``: ``labels``, ``logits_to_keep`` and what else the
        loss takes.
        """
        assert run.output is not None
        run.decoded = type(run.output)(**{**run.output, "last_hidden_state": hidden})
        unread = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        try:
            with run.active():
                return cast(CausalLMOutputWithPast, self.mirror(input_ids=unread, **_accepted(self.mirror, options)))
        finally:
            run.decoded = None  # another SideNet may read the same run

    def finish(self, hidden: Tensor, norm: nn.Module | None) -> Tensor:
        """The states (B, T, C) that the head takes, from those before the final norm, whose place ``norm`` takes."""
        if norm is not None:
            weight = next(norm.parameters())
            hidden = norm(hidden.to(weight.device, weight.dtype)).to(hidden)
        return cast(Tensor, self.family.tail(hidden)) if self.family.tail is not None else hidden

    def normed(self, hidden: Tensor) -> Tensor:
        """The backbone's final norm of (B, T, C)."""
        norm = self.family.final_norm
        # `forward` and not a call: no hook runs, while accelerate, which has replaced `forward`, fetches weights
        return hidden if norm is None else cast(Tensor, norm.forward(hidden))

    @functools.cached_property
    def mirror(self) -> nn.Module:
        """The modules that run, made at the first call; copies and pickles make their own."""
        mirror = mirror_of(self.model)
        decoder, layers = find(mirror, self.family.decoder_path), find(mirror, self.family.layers_path)
        decoder.forward = functools.partial(_unless_decoded, decoder.forward)
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(functools.partial(_before_layer, index), with_kwargs=True)
        layers[-1].register_forward_hook(functools.partial(_after_layer, len(layers)))
        for index in self.memory_layers:
            _record_projections(self.family, index, layers[index])
            if self.attach is not None:
                self.attach(self.family.attention(layers[index]), index)
        return mirror.train(self.model.training)

    def rebuild(self) -> None:
        """Forget the mirror: for whoever has exchanged or wrapped modules of the model since the first call."""
        self.__dict__.pop("mirror", None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "mirror"}


def _unless_decoded(decode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The forward of a mirror's decoder; in ``Backbone.head`` it has already run."""
    run = current_run()
    return decode(*args, **kwargs) if run is None or run.decoded is None else run.decoded


def _before_layer(index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    run = current_run()
    if run is not None and run.stop_after is None:  # a run that stops early is for keys and values alone
        run.calls[index] = arguments_of(module, args, kwargs)
        run.inputs[index] = run.calls[index]["hidden_states"]


def _after_layer(index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    run = current_run()
    if run is not None:
        run.inputs[index] = output[0] if isinstance(output, tuple) else output


def _record_projections(family: Family, index: int, layer: nn.Module) -> None:
    """Let a mirror's layer leave its position-free projections in the run."""
    attention = family.attention(layer)
    probe = family.probe(index, attention)

    def before_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = current_run()
        if run is not None:
            run.qkv[index] = probe(module, args, kwargs)
            if run.stop_after == index:
                raise _Stop

    attention.register_forward_pre_hook(before_attention, with_kwargs=True)


def _accepted(module: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """The options that the module's forward takes.

    A parameter of that name takes any value. ``**kwargs`` takes the others, except None, ``position_ids`` and
    ``use_cache``.
    """
    known = _parameters_of(type(module))  # type: ignore[arg-type]
    return {
        name: value
        for name, value in options.items()
        if name in known or (value is not None and "kwargs" in known and name not in ("position_ids", "use_cache"))
    }


@functools.lru_cache(maxsize=64)
def _parameters_of(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def position_free_qkv(model: PreTrainedModel, input_ids: Tensor) -> dict[int, QKV]:
    """Position-free q (B, H, T, D), k, v (B, Hkv, T, D) of every layer of any backbone that has keys."""
    family, mirror, run = Family.of(model), mirror_of(model), BackboneRun()
    for index in family.memory_layers():
        _record_projections(family, index, find(mirror, family.layers_path)[index])
    with run.active(), torch.no_grad():
        find(mirror, family.decoder_path)(input_ids=input_ids, use_cache=False)
    return run.qkv
