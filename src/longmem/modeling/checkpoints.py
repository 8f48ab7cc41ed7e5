"""Which model a folder, a GGUF file or a hub id is, and where its backbone and its tokenizer are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from longmem.errors import CheckpointError, ConfigError, first_line
from longmem.modeling.baselines import MemTRM, TrainingFree
from longmem.modeling.gguf import gguf_folder, is_gguf
from longmem.modeling.loading import named_backbone, resolve_folder
from longmem.modeling.longmem import LongMem

MODELS: dict[str, Any] = {each.config_class.model_type: each for each in (LongMem, MemTRM, TrainingFree)}
"""By ``model_type`` of a config file; any other is a causal language model."""


def checked_device(device: str) -> str:
    """The same name; ``auto`` is ``cuda`` where there is a GPU and else ``cpu``.

    Raises:
        ConfigError: torch has no such device, or none on this machine.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device ({device}) cannot be used ({first_line(error)}); try --device cpu") from error
    return device


def checkpoint_folder(path: str, kind: str | None = None, otherwise: str = "") -> str:
    """The folder with the model: a run folder stands for its ``final/``, a GGUF file for what it is converted to.

    A hub id stays as it is.

    Raises:
        CheckpointError: the folder holds no model, or one that is not of this kind (see ``model_type``).
    """
    folder, where = Path(path), path
    if is_gguf(path):
        where = str(gguf_folder(path))
    elif folder.exists():
        there = [str(each) for each in (folder, folder / "final") if (each / "config.json").is_file()]
        if not there:
            missing = "no model here (no config.json in it or in its final/); is the training finished?"
            raise CheckpointError(f"{path}: {missing}")
        where = there[0]
    elif path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith("/"):
        raise CheckpointError(f"{path}: no such folder; name a checkpoint folder, a run folder or a hub id")
    if kind is not None and model_type(where) != kind:
        raise CheckpointError(f"{where}: {otherwise}")
    return where


def tokenizer_beside(*places: str) -> str:
    """The first of these places with a tokenizer's files; else the last, which may be a hub id."""
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    there = (place for place in places if any((Path(place) / file).is_file() for file in files))
    return next(there, places[-1])


def model_type(where: str) -> str:
    """``model_type`` of the config in a folder or at a hub id; empty where it has none.

    Raises:
        CheckpointError: there is no config that can be read.
    """
    try:
        return str(PreTrainedConfig.get_config_dict(where)[0].get("model_type", ""))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        file = Path(where) / "config.json"
        if file.is_file():
            said = f"{file}: no JSON object ({first_line(error)}); the checkpoint is damaged, write it again"
        else:
            said = f"{where}: neither a folder nor a hub id that can be reached ({first_line(error)})"
        raise CheckpointError(said) from error


def backbone_of(where: str) -> tuple[str, str | None]:
    """Name and revision of the backbone of a checkpoint; a causal language model is its own.

    Raises:
        BackboneError: the checkpoint does not say.
    """
    kind = model_type(where)
    if kind not in MODELS:
        return where, None
    config: Any = MODELS[kind].config_class.from_pretrained(where)
    started = kind == "memtrm"  # its own backbone is the one that it trained
    name = config.start_name_or_path if started else config.backbone_name_or_path
    return named_backbone(name, resolve_folder(where, None)), None if started else config.backbone_revision
