"""From paths to the systems that are compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longmem.errors import CheckpointError, ConfigError, DataError
from longmem.evaluation.systems import Comparison

OWN_KINDS = {"memtrm": "MemTRM", "training_free": "training-free model"}
LONGEST_DEFAULT_WINDOW = 1024  # the paper's; long-context backbones would otherwise get all they can take


@dataclass(frozen=True)
class Loaded:
    """The comparison, the folder that was really read, and the tokenizer's."""

    comparison: Comparison
    model: str
    tokenizer: str
    max_positions: int | None

    def default_window(self) -> int:
        return min(self.max_positions or LONGEST_DEFAULT_WINDOW, LONGEST_DEFAULT_WINDOW)


def load_comparison(
    path: str,
    *,
    backbone: str | None = None,
    control: str | None = None,
    memtrm: str | None = None,
    training_free: Sequence[str] = (),
    memory_sizes: Sequence[int] | None = None,
    tokenizer: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> Loaded:
    """Load a LongMem checkpoint, a baseline, or a causal LM by itself (then there is the backbone only to measure).

    Args:
        path: folder of a LongMem, a MemTRM, training-free settings or a causal LM, a run folder that has one in
            ``final/``, or a hub id.
        backbone: where the backbone is, if not where the checkpoint says.
        control: a SideNet checkpoint trained equally long without memory, over the same backbone.
        memtrm: a MemTRM checkpoint whose training started from the same backbone.
        training_free: for each training-free model the share of its heads that memory gets, or the folder of its
            settings; by share, it remembers and retrieves as the LongMem (or else the MemTRM) beside it does.
        memory_sizes: tokens; None is the size in the model's config. 0, memory switched off, is always measured.
        tokenizer: folder or hub id, if not beside the model or its backbone.
        device: where the models go.
        dtype: of the weights; None is as saved.

    Raises:
        ConfigError: settings that do not go together; lists all. Or a device that is not here.
        CheckpointError, BackboneError: a model that is missing, damaged or made for another backbone.
    """
    from longmem.modeling.loading import load_backbone

    checked_device(device)
    where = checkpoint_folder(path)
    kind = _model_type(where)
    if kind == "memtrm" and memtrm is None:
        memtrm = where
    if kind == "training_free":
        training_free = (where, *training_free)
    problems = _unused(kind, where, backbone, control, memory_sizes if not (memtrm or training_free) else None)
    if problems:
        raise ConfigError(problems)
    if kind == "longmem":
        from longmem.modeling.longmem import LongMem

        model: Any = LongMem.from_pretrained(where, backbone=backbone, dtype=dtype)  # in eval mode
        model.to(device)
        sizes = _checked_sizes(memory_sizes, model.config)
        comparison = Comparison.of_longmem(model, sizes, control=_load_control(control, model))
        settings, named = model.config, model.config.backbone_name_or_path
    else:
        named = where if kind not in OWN_KINDS else backbone or _named_backbone(where, kind)
        alone: Any = load_backbone(named, None, dtype)
        comparison = Comparison.of_backbone(alone.to(device).eval())
        settings = None
    if memtrm is not None:
        trained = _load_memtrm(memtrm, dtype).to(device)
        settings = settings or trained.config
        comparison = comparison.with_memtrm(trained, _checked_sizes(memory_sizes, trained.config))
    for gate in training_free:
        free = _load_training_free(gate, comparison.model, settings)
        comparison = comparison.with_training_free(free, _checked_sizes(memory_sizes, free.config))
    return Loaded(
        comparison=comparison,
        model=where,
        tokenizer=tokenizer or _tokenizer_folder([where, backbone, named]),
        max_positions=_positions(comparison.model.config),
    )


def checked_device(device: str) -> str:
    """The same name.

    Raises:
        ConfigError: torch has no such device, or none on this machine.
    """
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"device ({device}) cannot be used ({reason}); try --device cpu") from error
    return device


def _unused(
    kind: str, where: str, backbone: str | None, control: str | None, memory_sizes: Sequence[int] | None
) -> list[str]:
    """Options that mean nothing beside a model of this kind, one line each."""
    if kind == "longmem":
        return []
    what = f"{where} is a {OWN_KINDS.get(kind, 'causal language model')} by itself"
    given = [("--control", control), ("--memory-sizes", memory_sizes)]
    given += [("--backbone", backbone)] if kind not in OWN_KINDS else []
    return [f"{option} needs a LongMem checkpoint; {what}" for option, value in given if value]


def _named_backbone(where: str, kind: str) -> str:
    """The backbone that a baseline's checkpoint started from, or stands on."""
    from longmem.config import MemTRMConfig, TrainingFreeConfig
    from longmem.modeling.loading import named_backbone, resolve_folder

    folder = resolve_folder(where, None)
    if kind == "memtrm":
        return named_backbone(MemTRMConfig.from_pretrained(where).start_name_or_path, folder)
    return named_backbone(TrainingFreeConfig.from_pretrained(where).backbone_name_or_path, folder)


def _load_memtrm(path: str, dtype: torch.dtype | None) -> Any:
    from longmem.modeling.memtrm import MemTRM

    where = checkpoint_folder(path)
    if _model_type(where) != "memtrm":
        raise CheckpointError(f"{where}: not a MemTRM checkpoint; --memtrm takes one trained with method = 'memtrm'")
    return MemTRM.from_pretrained(where, dtype=dtype)


def _load_training_free(gate: str, backbone: Any, settings: Any) -> Any:
    """Over the backbone that is already there, with the settings of the model beside it, or from a folder."""
    from longmem.modeling.training_free import TrainingFree

    try:
        share = float(gate)
    except ValueError:
        where = checkpoint_folder(gate)
        if _model_type(where) != "training_free":
            raise CheckpointError(
                f"{where}: no training-free settings; --training-free takes a share from 0 to 1, or the folder of a "
                "TrainingFree"
            ) from None
        return TrainingFree.from_pretrained(where, backbone=backbone)
    names = ("memory_layer", "chunk_size", "num_retrieved", "memory_size")
    alike = {} if settings is None else {name: getattr(settings, name) for name in names}
    return TrainingFree.from_backbone(backbone, gate=share, **alike)


def _load_control(path: str | None, model: Any) -> Any:
    """Over the backbone that is already there, which is compared with the one that the control names."""
    if path is None:
        return None
    from longmem.modeling.longmem import LongMem

    where = checkpoint_folder(path)
    if _model_type(where) != "longmem":
        raise CheckpointError(f"{where}: not a LongMem checkpoint; --control takes a SideNet trained without memory")
    control: Any = LongMem.from_pretrained(where, backbone=model.backbone.model)
    return control.to(model.device)


def has_memory(path: str) -> bool:
    """Whether a checkpoint, run folder or hub id is a model that reads memory, not a causal LM by itself."""
    return _model_type(checkpoint_folder(path)) in ("longmem", *OWN_KINDS)


def load_tokenizer(path: str, model: Any = None) -> Any:
    """The tokenizer of a folder or hub id.

    Args:
        path: of either.
        model: whose ids it must make.

    Raises:
        DataError: there is none, or it knows more tokens than the model.
    """
    from longmem.data.tokenizer import load_tokenizer as load

    tokenizer = load(path)
    if model is not None:
        known = model.get_input_embeddings().weight.shape[0]
        # without those added later: some checkpoints bring one or two that no text has and no embedding knows
        if tokenizer.vocab_size > known:
            raise DataError(
                f"{path}: a tokenizer of {tokenizer.vocab_size:,} tokens, the model knows {known:,}: it is another "
                "model's; name the right one with --tokenizer"
            )
    return tokenizer


def checkpoint_folder(path: str) -> str:
    """A run folder stands for what it has in ``final/``; a hub id stays as it is.

    Raises:
        CheckpointError: the folder holds no model.
    """
    folder = Path(path)
    if not folder.exists():
        if path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith("/"):
            raise CheckpointError(f"{path}: no such folder; name a checkpoint folder, a run folder or a hub id")
        return path
    for candidate in (folder, folder / "final"):
        if (candidate / "config.json").is_file():
            return str(candidate)
    raise CheckpointError(f"{path}: no model here (no config.json in it or in its final/); is the training finished?")


def _model_type(where: str) -> str:
    file = Path(where) / "config.json"
    if not file.is_file():
        return _model_type_on_hub(where)
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON ({error}); the checkpoint is damaged, write it again") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file}: no object at its top; the checkpoint is damaged, write it again")
    return str(settings.get("model_type", ""))


def _model_type_on_hub(name: str) -> str:
    from transformers import PreTrainedConfig

    try:
        return str(PreTrainedConfig.get_config_dict(name)[0].get("model_type", ""))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name}: neither a folder nor a hub id that can be reached ({str(error).splitlines()[0]})"
        ) from error


def _checked_sizes(sizes: Sequence[int] | None, config: Any) -> list[int]:
    """Sorted, without 0, which is the system with memory switched off."""
    chosen = sorted(set(sizes if sizes is not None else [config.memory_size]))
    chunk, least = config.chunk_size, config.chunk_size
    problems = []
    for size in chosen:
        if size < 0:
            problems.append(f"memory size ({size}) must not be below 0, which is memory switched off; try {chunk}")
        elif size % chunk:
            nearest = max(least, round(size / chunk) * chunk)
            problems.append(f"memory size ({size}) must be a multiple of chunk_size ({chunk}); try {nearest}")
    if problems:
        raise ConfigError(problems)
    return [size for size in chosen if size]


def _tokenizer_folder(candidates: Sequence[str | None]) -> str:
    """The first folder with a tokenizer in it; else the last name given, for transformers to say what is missing."""
    named = [name for name in candidates if name]
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    with_files = [name for name in named if any((Path(name) / file).is_file() for file in files)]
    return with_files[0] if with_files else named[-1]


def _positions(config: Any) -> int | None:
    text = config.get_text_config() if config is not None else None
    return getattr(text, "max_position_embeddings", None)
