"""The weights of a backbone: where they are, copies of its modules, and by what the same weights are known again.

A backbone may be spread over devices (``device_map``), keep its weights elsewhere until they are needed (accelerate's
offload, where the parameters themselves are empty) or hold them in 4 or 8 bits (bitsandbytes). A SideNet layer is an
ordinary module in a trainable dtype, on the device where its source layer runs.

Memory and SideNets belong to one backbone: its fingerprint says which, and a sketch of its weights recognises it in
another precision.
"""

from __future__ import annotations

import base64
import copy
import functools
import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.import_utils import is_bitsandbytes_available

from longmem.errors import BackboneError

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
# what accelerate writes onto a module whose inputs or weights it moves
_MOVED = ("_hf_hook", "_old_forward", "forward")
_SAMPLES, _SKETCHED = 64, 8  # values of each weight in a fingerprint, and in a sketch
# relative differences, of all weights and of each, up to which they are the same in another precision; weights of 4
# bits differ by about 0.08
_CLOSE, _CLOSE_EACH = 0.15, 0.35
# fields of a config that say how a model was loaded or is used, not what it computes
_INCIDENTAL = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "return_dict",
    "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "problem_type", "id2label", "label2id",
}  # fmt: skip
# parts of names of fields that do not change keys either
_UNUSED = ("dropout", "pdrop", "_token_id", "initializer", "init_std", "quantization", "router_aux", "tie_word")


def quantization(bits: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """How to load a frozen backbone in ``4bit`` (NF4, doubly quantised) or ``8bit`` (LLM.int8)."""
    check_bitsandbytes()
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute_dtype}
    return BitsAndBytesConfig(load_in_4bit=True, **nf4)


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
    if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        held = {"weight": dequantize_bnb_weight(module.weight, getattr(module, "state", None)), "bias": module.bias}
        plain = nn.Linear(module.in_features, module.out_features, held["bias"] is not None)
        plain.load_state_dict({name: value for name, value in held.items() if value is not None}, assign=True)
        return plain
    for name, child in module.named_children():
        setattr(module, name, _dequantised(child))
    return module


def fingerprint_of(model: PreTrainedModel, weights: Mapping[str, Tensor] | None = None) -> str:
    """16 hex digits of a SHA-256 over the architecture and a sample of every weight.

    Two backbones with equal fingerprints give equal keys and values. Settings on which these do not depend (token ids,
    dropout, initialisation, fields of the user's own) do not count. ``weights`` are in place of its parameters.
    """
    text = model.config.get_text_config(decoder=True)
    known = set(type(text)().to_dict())  # a field of the user's own is none of the architecture's
    counts = {name for name in known if not any(part in name for part in _UNUSED)}
    fields = {name: value for name, value in _without_incidental(text.to_dict()).items() if name in counts}
    return _digest(fields, model, weights)


def legacy_fingerprint(model: PreTrainedModel, config: PreTrainedConfig | None = None) -> str:
    """The fingerprint that releases before 0.2 wrote; ``config`` may be the one that was saved with it."""
    fields = (model.config if config is None else config).get_text_config(decoder=True).to_dict()
    return _digest(_without_incidental(fields), model, None)


def sketch_of(model: PreTrainedModel) -> str:
    """A few values of every weight, as text: 16 bytes a weight."""
    named = sorted(real_parameters(model), key=lambda pair: pair[0])
    values = [_sample(parameter, _SKETCHED).to(torch.float16) for _, parameter in named]
    padded = [torch.nn.functional.pad(each, (0, _SKETCHED - len(each))) for each in values]
    return base64.b64encode(torch.stack(padded).numpy().tobytes()).decode()


def same_weights(sketch: str, other: str) -> bool:
    """Whether two sketches are of the same weights up to rounding, of 4 bits at the coarsest."""
    one, two = (
        torch.frombuffer(bytearray(base64.b64decode(each)), dtype=torch.float16).float().view(-1, _SKETCHED)
        for each in (sketch, other)
    )
    if one.shape != two.shape:
        return False
    difference, size = (one - two).norm(dim=1), torch.minimum(one.norm(dim=1), two.norm(dim=1))
    return bool(difference.norm() <= _CLOSE * size.norm()) and bool((difference <= _CLOSE_EACH * size + 1e-3).all())


def _digest(fields: Any, model: PreTrainedModel, weights: Mapping[str, Tensor] | None) -> str:
    sampled = {}
    # one by one: what is kept elsewhere is there for a moment only
    for name, parameter in weights.items() if weights else real_parameters(model):
        # bf16 is the coarsest type a backbone is loaded in; the same weights must agree with themselves
        values = _sample(parameter, _SAMPLES).to(torch.bfloat16).view(torch.int16).tolist()
        sampled[name] = f"{name}{tuple(parameter.shape)}{values}"
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for name in sorted(sampled):
        digest.update(sampled[name].encode())
    return digest.hexdigest()[:16]


def _sample(parameter: Tensor, count: int) -> Tensor:
    if parameter.is_meta:
        raise BackboneError(
            "the backbone's weights are on the meta device, which holds no values; load it onto a real one"
        )
    flat = parameter.detach().flatten()
    return flat[:: max(1, flat.numel() // count)][:count].to("cpu")


def _without_incidental(fields: Any) -> Any:
    """A config's dict without what saving, loading and using a model may change."""
    if not isinstance(fields, dict):
        return fields
    kept = {k: _without_incidental(v) for k, v in fields.items() if k not in _INCIDENTAL and not str(k).startswith("_")}
    return {k: v for k, v in kept.items() if v is not None}
