"""From names to models and folders, each failure in one line."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig

from longmem.errors import BackboneError, CheckpointError
from longmem.modeling.families import Family, side_sources
from longmem.modeling.placement import check_bitsandbytes

Config = TypeVar("Config", bound=PreTrainedConfig)

# transformers exchanges methods of its classes while it loads; loads that end in another order than they began would
# leave the exchange in place, and no model of the process would be initialised or tied any more
_LOADING = threading.RLock()


def default_memory_layer(model: PreTrainedModel, stride: int) -> int:
    """The paper's choice, layer 18 of 24 read by SideNet layer 9 of 12, for any depth, counted from 0.

    The nearest layer below that the family allows is taken: in hybrid models one with full attention.
    """
    family = Family.of(model)
    sources = side_sources(len(family.layers), stride)
    wanted = sources[max(0, int(0.75 * len(sources) + 0.5) - 1)] if sources else 0
    allowed = family.memory_layers()
    if wanted in allowed or not allowed:
        return wanted
    return min(allowed, key=lambda layer: (layer not in sources, abs(layer - wanted)))


def load_backbone(
    name: str,
    revision: str | None,
    dtype: torch.dtype | None,
    *,
    quantised: Any = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """``AutoModelForCausalLM.from_pretrained`` with one clear line where it fails; threads load one after the other.

    Args:
        name: folder or hub id.
        revision: of a hub id.
        dtype: None is as stored.
        quantised: ``quantization_config`` of the backbone that a SideNet was trained over, to load this one alike.
        **kwargs: go on to transformers; its own ``quantization_config`` comes first.

    Raises:
        BackboneError: if it cannot be loaded.
    """
    if dtype is not None:
        kwargs["dtype"] = dtype
    if quantised is not None:
        settings = quantised if isinstance(quantised, dict) else quantised.to_dict()
        check_bitsandbytes(str(settings.get("quant_method", "")))
        kwargs.setdefault("quantization_config", AutoQuantizationConfig.from_dict(dict(settings)))
    try:
        with _LOADING:
            return cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(name, revision=revision, **kwargs))
    except (OSError, ValueError, ImportError, SafetensorError) as problem:
        raise BackboneError(
            f"backbone {name!r} could not be loaded ({first_line(problem)}); "
            "give a folder with config.json and weights, or a hub id that can be reached"
        ) from problem


def load_config(kind: type[Config], folder: Path) -> Config:
    """The config in a checkpoint folder; transformers would take one that is missing for one without settings.

    Raises:
        OSError: there is none.
        ValueError: it cannot be read.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {folder}")
    return kind.from_pretrained(folder)


def named_backbone(named: str | None, folder: Path) -> str:
    """Where a checkpoint in ``folder`` says its backbone is; a path may be relative to the folder.

    Raises:
        BackboneError: it does not say.
    """
    if named is None:
        raise BackboneError(f"{folder} names no backbone; pass backbone=PATH or a loaded model")
    if not Path(named).is_absolute() and (folder / named).is_dir():
        return str(folder / named)
    return named


def resolve_folder(name: str, revision: str | None) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name} is not a folder; give one written by save_pretrained, or a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision))
    except Exception as problem:
        raise CheckpointError(
            f"{name} is neither a folder nor a hub id that can be reached ({first_line(problem)})"
        ) from problem


def first_line(problem: BaseException) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0]
