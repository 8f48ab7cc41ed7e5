"""From names to models and folders, each failure in one line."""

from __future__ import annotations

import os
import threading
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig

import longmem.modeling.alibi_gpt  # noqa: F401  the paper's own backbone, which transformers' Auto classes must know
from longmem.config import MemoryConfig, nearest
from longmem.errors import BackboneError, CheckpointError, ConfigError, first_line
from longmem.modeling.families import Family
from longmem.modeling.fingerprint import fingerprint_of, legacy_fingerprint, same_weights, sketch_of
from longmem.modeling.gguf import gguf_folder, is_gguf
from longmem.modeling.placement import check_bitsandbytes, quantization

Config = TypeVar("Config", bound=PreTrainedConfig)

# transformers exchanges methods of its classes while it loads; loads that end in another order than they began would
# leave the exchange in place, and no model of the process would be initialised or tied any more
_LOADING = threading.RLock()

# where a backbone is; kept in a checkpoint's config
_FINDING = ("subfolder", "gguf_file", "variant")
# what transformers' Auto classes add by themselves
_FROM_AUTO = ("adapter_kwargs", "code_revision", "_commit_hash", "_from_auto")
# how it is loaded this time
_LOADED = (
    "attn_implementation", "cache_dir", "device_map", "experts_implementation", "force_download", "local_files_only",
    "low_cpu_mem_usage", "max_memory", "offload_buffers", "offload_folder", "proxies", "quantization_config", "token",
    "tp_plan", "trust_remote_code", "use_safetensors",
)  # fmt: skip


@dataclass
class Loading:
    """How a backbone is to be loaded: the arguments of ``AutoModelForCausalLM.from_pretrained``."""

    revision: str | None = None
    dtype: torch.dtype | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def split(
        cls,
        given: dict[str, Any],
        *,
        revision: str | None,
        dtype: torch.dtype | str | None,
        backbone_kwargs: dict[str, Any] | None,
    ) -> tuple[Loading, dict[str, Any]]:
        """Arguments that say how to load, apart from all others."""
        kwargs = {name: value for name, value in given.items() if name in _FINDING + _LOADED}
        rest = {name: value for name, value in given.items() if name not in kwargs and name not in _FROM_AUTO}
        kwargs.update(backbone_kwargs or {})
        asked = rest.pop("torch_dtype", None) or kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None)
        wanted = asked if dtype is None else dtype
        if isinstance(wanted, str):
            wanted = None if wanted == "auto" else getattr(torch, wanted)
        for bits in ("8bit", "4bit"):
            if rest.pop(f"load_in_{bits}", False):
                kwargs["quantization_config"] = quantization(bits, wanted or torch.bfloat16)
        return cls(revision, wanted, kwargs), rest

    @property
    def found_by(self) -> dict[str, Any]:
        """The arguments without which the backbone would not be found again."""
        return {name: value for name, value in self.kwargs.items() if name in _FINDING}

    def backbone(self, backbone: str | Path | nn.Module) -> tuple[PreTrainedModel, str | None]:
        """The model itself, loaded or as given, and a name by which it will be found from anywhere."""
        if isinstance(backbone, nn.Module):
            if self.kwargs:
                raise ConfigError(
                    f"{', '.join(self.kwargs)}: says how to load a backbone, and the one given is loaded already; "
                    "give its name, or load it so"
                )
            model = _checked(backbone)
            if self.dtype is not None:
                nn.Module.to(model, self.dtype)
            return model, _absolute(model.config._name_or_path) or None
        name = _absolute(str(backbone))
        return load_backbone(name, self.revision, self.dtype, **self.kwargs), name

    def backbone_of(
        self, config: MemoryConfig, folder: Path, given: str | Path | nn.Module | None
    ) -> tuple[PreTrainedModel, str]:
        """The backbone of a checkpoint in ``folder``, or the one ``given``, and the fingerprint by which it goes there.

        The config's name of the backbone becomes one that holds from anywhere.
        """
        if isinstance(given, nn.Module):
            model = self.backbone(given)[0]
            return model, _recognised(model, config, folder, True)
        name = _absolute(named_backbone(config.backbone_name_or_path, folder) if given is None else str(given))
        kwargs = {**(config.backbone_kwargs if given is None else {}), **self.kwargs}
        quantised = getattr(config.backbone_config, "quantization_config", None)
        # the fingerprint is that of the weights as they are stored; they are rounded afterwards where that can be
        early = self.dtype if self.kwargs.get("device_map") is not None or quantised is not None else None
        revision = config.backbone_revision if given is None else None
        model = load_backbone(name, revision, early, quantised=quantised, **kwargs)
        config.backbone_name_or_path = name
        fingerprint = _recognised(model, config, folder, given is not None)
        return model if early is self.dtype else nn.Module.to(model, self.dtype), fingerprint


def _recognised(model: PreTrainedModel, config: MemoryConfig, folder: Path, given: bool) -> str:
    expected, own = config.backbone_fingerprint, fingerprint_of(model)
    if expected is None or expected in (own, legacy_fingerprint(model)):
        return expected or own
    if config.backbone_config is not None and expected == legacy_fingerprint(model, config.backbone_config):
        return expected
    if given and config.backbone_sketch is not None and same_weights(config.backbone_sketch, sketch_of(model)):
        warnings.warn(
            f"{folder} was made over backbone {expected} ({config.backbone_name_or_path}); the backbone given, {own} "
            f"({model.config._name_or_path or 'a loaded model'}, {model.dtype}), has the same weights in another "
            "precision and is taken for it",
            stacklevel=4,
        )
        return expected
    way_out = (
        "pass the backbone that it names"
        if given
        else "the checkpoint is damaged or of two runs, or that folder was changed: save it again, or pass backbone="
    )
    raise CheckpointError(
        f"{folder} was made over backbone {expected} ({config.backbone_name_or_path}), the backbone "
        f"{'given' if given else 'there'} is {own}; {way_out}"
    )


def check_arguments(method: str, rest: dict[str, Any]) -> None:
    """Refuse arguments that would do nothing."""
    known = ("backbone", "revision", "dtype", "side_dtype", "backbone_kwargs", "config", *_FINDING, *_LOADED)
    if rest:
        raise ConfigError([f"{method} has no argument {name}{nearest(name, known)}" for name in rest])


def _checked(model: nn.Module) -> PreTrainedModel:
    """The model, if it is one of transformers."""
    if isinstance(model, PreTrainedModel):
        return model
    if hasattr(model, "merge_and_unload"):
        raise BackboneError(
            f"a {type(model).__name__} wraps its model; give model.merge_and_unload(), or the adapter's folder by name"
        )
    raise BackboneError(
        f"a {type(model).__name__} is no causal language model of transformers; give one, its folder or its hub id"
    )


def _absolute(name: str) -> str:
    """A folder's or file's path from the root, so that it holds wherever the process goes; hub ids stay."""
    return os.path.abspath(name) if os.path.exists(name) else name


def default_memory_layer(model: PreTrainedModel, stride: int) -> int:
    """The paper's choice, layer 18 of 24 read by SideNet layer 9 of 12, for any depth, counted from 0.

    The nearest layer below that the family allows is taken: in hybrid models one with full attention.
    """
    family = Family.of(model)
    sources = family.side_layout(stride).sources
    wanted = sources[max(0, int(0.75 * len(sources) + 0.5) - 1)] if sources else 0
    allowed = family.memory_layers()
    if wanted in allowed or not allowed:
        return wanted
    return min(allowed, key=lambda layer: (layer not in sources, abs(layer - wanted)))


def load_backbone(
    name: str, revision: str | None, dtype: torch.dtype | None, *, quantised: Any = None, **kwargs: Any
) -> PreTrainedModel:
    """``AutoModelForCausalLM.from_pretrained`` with one clear line where it fails; threads load one after the other.

    ``quantised`` is the ``quantization_config`` of the backbone that a SideNet was trained over, to load this one
    alike; one among ``kwargs`` comes first.
    """
    if dtype is not None:
        kwargs["dtype"] = dtype
    if quantised is not None and not kwargs.get("gguf_file"):
        settings = quantised if isinstance(quantised, dict) else quantised.to_dict()
        check_bitsandbytes(str(settings.get("quant_method", "")))
        kwargs.setdefault("quantization_config", AutoQuantizationConfig.from_dict(dict(settings)))
    name = str(gguf_folder(name)) if is_gguf(name) else name
    try:
        with _LOADING:
            return cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(name, revision=revision, **kwargs))
    except (OSError, ValueError, ImportError, SafetensorError) as problem:
        raise BackboneError(
            f"backbone {name!r} could not be loaded ({first_line(problem)}); give a folder with config.json and "
            "weights, or a hub id that can be reached, and with backbone_kwargs what else is needed to find it"
        ) from problem


def load_config(kind: type[Config], folder: Path) -> Config:
    """The config in a checkpoint folder; transformers would take one that is missing for one without settings."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {folder}")
    return kind.from_pretrained(folder)


def named_backbone(named: str | None, folder: Path) -> str:
    """Where a checkpoint in ``folder`` says its backbone is; a path may be relative to the folder."""
    if named is None:
        raise BackboneError(f"{folder} names no backbone; pass backbone=PATH or a loaded model")
    if not Path(named).is_absolute() and (folder / named).is_dir():
        return str(folder / named)
    return named


def resolve_folder(name: str, revision: str | None) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded."""
    folder = Path(name)
    if folder.is_dir():
        return folder.absolute()
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name} is not a folder; give one written by save_pretrained, or a hub id (owner/name)")
    try:
        return Path(snapshot_download(name, revision=revision))
    except Exception as problem:
        raise CheckpointError(
            f"{name} is neither a folder nor a hub id that can be reached ({first_line(problem)})"
        ) from problem
