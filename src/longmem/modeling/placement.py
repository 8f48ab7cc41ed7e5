"""Where a backbone's weights are, and real, trainable copies of its modules wherever that is.

A backbone may be spread over devices (``device_map``), keep its weights elsewhere until they are needed (accelerate's
offload, where the parameters themselves are empty) or hold them in 4 or 8 bits (bitsandbytes). A SideNet layer is an
ordinary module in a trainable dtype, on the device where its source layer runs.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils.import_utils import is_bitsandbytes_available

from longmem.errors import BackboneError

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
# what accelerate writes onto a module whose inputs or weights it moves
_MOVED = ("_hf_hook", "_old_forward", "forward")
_QUANTISED = ("Linear4bit", "Linear8bitLt")


def quantization(bits: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """How to load a frozen backbone in ``4bit`` (NF4, doubly quantised) or ``8bit`` (LLM.int8)."""
    check_bitsandbytes()
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )  # fmt: skip


def check_bitsandbytes(method: str = "bitsandbytes") -> None:
    """Refuse to quantise where bitsandbytes is asked for and not there."""
    if method.endswith("bitsandbytes") and not is_bitsandbytes_available():
        raise BackboneError(
            "the backbone is to be quantised by bitsandbytes, which is not installed; "
            "pip install 'longmem-lm[quantised]', or load it unquantised"
        )


def packed_by(model: PreTrainedModel) -> str | None:
    """What has quantised a model, where it keeps weights in integers: parameters, or buffers of linear layers."""
    method = getattr(model, "quantization_method", None)
    packed = method is not None and any(
        not tensor.is_floating_point() and tensor.numel() > 1
        for module in model.modules()
        if "linear" in type(module).__name__.lower() or module._parameters
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    )
    return str(getattr(method, "value", method)) if packed else None


def place_of(module: nn.Module) -> torch.device:
    """The device on which a module runs."""
    for part in module.modules():
        for hook in _accelerate_hooks(part):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
        for tensor in part._parameters.values():
            if tensor is not None:
                return tensor.device
    return torch.device("cpu")


def mirror_of(module: nn.Module) -> nn.Module:
    """Twins of a module and its parts over the same weights; a hook or attribute set on a twin is its own."""
    made: dict[int, nn.Module] = {}

    def reflect(part: nn.Module) -> nn.Module:
        if id(part) in made:
            return made[id(part)]
        # not the class's own `__new__`: FSDP2's makes another class
        twin = made[id(part)] = object.__new__(type(part))
        twin.__dict__.update(part.__dict__)
        for name, value in part.__dict__.items():
            if "_hooks" in name and isinstance(value, OrderedDict | dict):
                twin.__dict__[name] = type(value)(value)
        # accelerate replaces `forward` by one that is bound to the module it moves
        if isinstance(part.__dict__.get("forward"), functools.partial):
            twin.__dict__["forward"] = functools.partial(part.__dict__["forward"].func, twin)
        if isinstance(part.__dict__.get("_old_forward"), MethodType):
            twin.__dict__["_old_forward"] = MethodType(part.__dict__["_old_forward"].__func__, twin)
        twin.__dict__["_modules"] = {
            name: None if child is None else reflect(child) for name, child in part._modules.items()
        }
        return twin

    return reflect(module)


def copy_module(module: nn.Module) -> nn.Module:
    """A deep copy with real, floating weights, on the device where the module runs; hooks stay behind."""
    with _present(module.modules()):
        mirror = mirror_of(module)
        for part in mirror.modules():
            part.__dict__.update({name: OrderedDict() for name in _HOOKS})
            for name in _MOVED:
                part.__dict__.pop(name, None)
        real: nn.Module = _dequantised(copy.deepcopy(mirror))
    return real.to(place_of(module))


def real_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter with its values, shared ones once; what is kept elsewhere is fetched, a module at a time."""
    tied, seen = set(getattr(model, "all_tied_weights_keys", None) or ()), set()
    for path, part in model.named_modules():
        fetched = _keeps_elsewhere(part)
        with _present([part]):
            for short, parameter in part._parameters.items():
                name = f"{path}.{short}" if path else short
                # fetched twice, a shared parameter is two objects, which are gone again by the next
                if parameter is None or (name in tied if fetched else id(parameter) in seen):
                    continue
                if not fetched:
                    seen.add(id(parameter))
                yield name, parameter.detach()


@contextmanager
def _present(parts: Iterable[nn.Module]) -> Iterator[None]:
    """While open, weights of these modules that are kept elsewhere are where the modules run."""
    fetched: list[Any] = [part for part in parts if _keeps_elsewhere(part)]
    for part in fetched:
        part._hf_hook.pre_forward(part)
    try:
        yield
    finally:
        for part in fetched:
            part._hf_hook.post_forward(part, None)


def _keeps_elsewhere(part: nn.Module) -> bool:
    return any(getattr(hook, "offload", False) for hook in _accelerate_hooks(part))


def _accelerate_hooks(part: nn.Module) -> list[Any]:
    hook = part.__dict__.get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _dequantised(module: Any) -> Any:
    """With ordinary layers in place of quantised and adapted (peft) ones, holding what those stand for."""
    if hasattr(module, "base_layer") and hasattr(module, "merge"):
        module.merge()
        module = module.base_layer
    if type(module).__name__ in _QUANTISED:
        return _linear(module)
    for name, child in module.named_children():
        setattr(module, name, _dequantised(child))
    return module


@torch.no_grad()
def _linear(quantised: Any) -> nn.Linear:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    weight = dequantize_bnb_weight(quantised.weight, getattr(quantised, "state", None))
    bias = quantised.bias
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    plain.weight.copy_(weight)
    if bias is not None:
        plain.bias.copy_(bias)
    return plain
