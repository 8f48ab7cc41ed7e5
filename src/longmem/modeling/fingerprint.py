"""Which backbone is this? Memory and SideNets belong to one: its fingerprint says which, and a sketch of its weights
recognises it in another precision.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from longmem.errors import BackboneError
from longmem.modeling.placement import real_parameters

_SAMPLES = 64  # values of a weight in a fingerprint
_SKETCHED = 8  # and in a sketch
# relative differences, of all weights and of each, up to which they are the same in another precision; weights of 4
# bits differ by about 0.08
_CLOSE, _CLOSE_EACH = 0.15, 0.35
# fields of a config that say how a model was loaded or is used, not what it computes
_INCIDENTAL = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "return_dict",
    "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "problem_type", "id2label", "label2id",
}  # fmt: skip
_UNUSED = ("dropout", "pdrop", "_token_id", "initializer", "init_std", "quantization", "router_aux", "tie_word")


def fingerprint_of(model: PreTrainedModel, weights: Mapping[str, Tensor] | None = None) -> str:
    """16 hex digits of a SHA-256 over the architecture and a sample of every weight.

    Two backbones with equal fingerprints give equal keys and values. Settings on which these do not depend (token ids,
    dropout, initialisation, fields of the user's own) do not count. ``weights`` are in place of its parameters.
    """
    text = model.config.get_text_config(decoder=True)
    known = set(type(text)().to_dict())  # a field of the user's own is none of the architecture's
    fields = {name: value for name, value in _without_incidental(text.to_dict()).items() if name in known}
    fields = {name: value for name, value in fields.items() if not any(part in name for part in _UNUSED)}
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
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    # sampled one by one: what is kept elsewhere is there for a moment only
    named = ((name, _described(p)) for name, p in (weights.items() if weights else real_parameters(model)))
    for name, described in sorted(named):
        digest.update(f"{name}{described}".encode())
    return digest.hexdigest()[:16]


def _described(parameter: Tensor) -> str:
    # bf16 is the coarsest type a backbone is loaded in; the same weights must agree with themselves
    values = _sample(parameter, _SAMPLES).to(torch.bfloat16).view(torch.int16).tolist()
    return f"{tuple(parameter.shape)}{values}"


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
