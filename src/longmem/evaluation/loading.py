"""From paths to the systems that are compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longmem.data.tokens import load_tokenizer as load_tokenizer
from longmem.errors import CheckpointError, ConfigError
from longmem.evaluation.systems import Comparison
from longmem.modeling.gguf import gguf_folder, is_gguf

KINDS = {"longmem": "LongMem", "memtrm": "MemTRM", "training_free": "training-free model"}
"""By ``model_type`` of a config file; any other is a causal language model."""
LONGEST_DEFAULT_WINDOW = 1024  # the paper's; long-context backbones would otherwise get all they can take


@dataclass(frozen=True)
class Loaded:
    """The comparison, the folder that was read, and the tokenizer's."""

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
        control: a SideNet checkpoint trained equally long without memory, over the same backbone.
        memtrm: a MemTRM checkpoint whose training started from the same backbone.
        training_free: for each training-free model the share of its heads that memory gets, or the folder of its
            settings; by share, it remembers and retrieves as the LongMem (or else the MemTRM) beside it does.
        memory_sizes: tokens; None is the size in the model's config. 0, memory switched off, is always measured.
        tokenizer: folder or hub id, if not beside the model or its backbone.
        dtype: of the weights; None is as saved.

    Raises:
        ConfigError: settings that do not go together, or a device that is not here.
        CheckpointError, BackboneError: a model that is missing, damaged or made for another backbone.
    """
    from longmem.modeling.baselines import MemTRM
    from longmem.modeling.fingerprint import fingerprint_of, legacy_fingerprint
    from longmem.modeling.loading import load_backbone
    from longmem.modeling.longmem import LongMem

    device, where = checked_device(device), checkpoint_folder(path)
    kind = model_type(where)
    if kind == "memtrm" and memtrm is None:
        memtrm = where
    if kind == "training_free":
        training_free = (where, *training_free)
    own = control or (memory_sizes and not (memtrm or training_free))
    if (kind != "longmem" and own) or (kind not in KINDS and backbone):
        raise ConfigError(
            f"--control, --memory-sizes and --backbone are of a LongMem checkpoint; {where} is a "
            f"{KINDS.get(kind, 'causal language model')} by itself"
        )
    # everything is loaded as it was saved, because a backbone is known by its weights; then it is converted
    main = beside = trained = None
    if kind == "longmem":
        main = LongMem.from_pretrained(where, backbone=backbone)
        bare, named = main.backbone.model, main.config.backbone_name_or_path
        if control is not None:
            said = "not a LongMem checkpoint; --control takes a SideNet trained without memory"
            beside = LongMem.from_pretrained(_checked(control, "longmem", said), backbone=bare)
    else:
        named, revision = (backbone, None) if backbone else backbone_of(where)
        bare = load_backbone(named, revision, None).eval()
    if memtrm is not None:
        said = "not a MemTRM checkpoint; --memtrm takes one trained with method = 'memtrm'"
        trained = MemTRM.from_pretrained(_checked(memtrm, "memtrm", said))
    settings = main.config if main else trained.config if trained else None
    others = [*filter(None, [trained]), *(_load_training_free(gate, bare, settings) for gate in training_free)]
    known = frozenset((fingerprint_of(bare), legacy_fingerprint(bare)) if others else ())
    for each in filter(None, (main or bare, beside, *others)):
        torch.nn.Module.to(each, device=device, dtype=dtype)
    if main is None:
        comparison = Comparison.of_backbone(bare)
    else:
        comparison = Comparison.of_longmem(main, _sizes(memory_sizes, main.config), control=beside)
    comparison = replace(comparison, fingerprints=known)
    for other in others:
        comparison = comparison.beside(other, _sizes(memory_sizes, other.config))
    config: Any = comparison.model.config
    return Loaded(
        comparison=comparison,
        model=where,
        tokenizer=tokenizer or _tokenizer_folder([where, backbone, named]),
        max_positions=getattr(config.get_text_config(), "max_position_embeddings", None),
    )


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
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"device ({device}) cannot be used ({reason}); try --device cpu") from error
    return device


def has_memory(path: str) -> bool:
    """Whether a checkpoint, run folder or hub id is a model that reads memory, not a causal LM by itself."""
    return model_type(checkpoint_folder(path)) in KINDS


def checkpoint_folder(path: str) -> str:
    """The folder with the model: a run folder stands for its ``final/``, a GGUF file for what it is converted to.

    A hub id stays as it is.

    Raises:
        CheckpointError: the folder holds no model.
    """
    if is_gguf(path):
        return str(gguf_folder(path))
    folder = Path(path)
    if not folder.exists():
        if path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith("/"):
            raise CheckpointError(f"{path}: no such folder; name a checkpoint folder, a run folder or a hub id")
        return path
    for candidate in (folder, folder / "final"):
        if (candidate / "config.json").is_file():
            return str(candidate)
    raise CheckpointError(f"{path}: no model here (no config.json in it or in its final/); is the training finished?")


def model_type(where: str) -> str:
    """``model_type`` of the config in a folder or at a hub id; empty where it has none.

    Raises:
        CheckpointError: there is no config that can be read.
    """
    from transformers import PreTrainedConfig

    file = Path(where) / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        settings = PreTrainedConfig.get_config_dict(where)[0] if found is None else dict(found)
    except (OSError, ValueError, TypeError) as error:
        if file.is_file():
            raise CheckpointError(
                f"{file}: no JSON object ({error}); the checkpoint is damaged, write it again"
            ) from error
        raise CheckpointError(
            f"{where}: neither a folder nor a hub id that can be reached ({str(error).splitlines()[0]})"
        ) from error
    return str(settings.get("model_type", ""))


def backbone_of(where: str) -> tuple[str, str | None]:
    """Name and revision of the backbone of a checkpoint; a causal language model is its own.

    Raises:
        BackboneError: the checkpoint does not say.
    """
    from longmem.config import LongMemConfig, MemTRMConfig, TrainingFreeConfig
    from longmem.modeling.loading import named_backbone, resolve_folder

    configs: dict[str, Any] = {"longmem": LongMemConfig, "memtrm": MemTRMConfig, "training_free": TrainingFreeConfig}
    kind = model_type(where)
    if kind not in configs:
        return where, None
    config: Any = configs[kind].from_pretrained(where)
    started = kind == "memtrm"  # its own backbone is the one that it trained
    name = config.start_name_or_path if started else config.backbone_name_or_path
    return named_backbone(name, resolve_folder(where, None)), None if started else config.backbone_revision


def _checked(path: str, kind: str, otherwise: str) -> str:
    """The folder of a model of this kind; else a CheckpointError."""
    where = checkpoint_folder(path)
    if model_type(where) != kind:
        raise CheckpointError(f"{where}: {otherwise}")
    return where


def _load_training_free(gate: str, backbone: Any, settings: Any) -> Any:
    """Over the backbone that is already there, with the settings of the model beside it, or from a folder."""
    from longmem.modeling.baselines import TrainingFree

    try:
        share = float(gate)
    except ValueError:
        said = "no training-free settings; --training-free takes a share from 0 to 1, or the folder of a TrainingFree"
        return TrainingFree.from_pretrained(_checked(gate, "training_free", said), backbone=backbone)
    names = ("memory_layers", "chunk_size", "num_retrieved", "memory_size")
    alike = {} if settings is None else {name: getattr(settings, name) for name in names}
    return TrainingFree.from_backbone(backbone, gate=share, **alike)


def _sizes(sizes: Sequence[int] | None, config: Any) -> list[int]:
    """Sorted, without 0, which is the system with memory switched off."""
    chosen, chunk = sorted(set(sizes if sizes is not None else [config.memory_size])), config.chunk_size
    problems = [
        f"memory size ({size}) must be a multiple of chunk_size ({chunk}), 0 is memory switched off; try "
        f"{max(chunk, round(size / chunk) * chunk)}"
        for size in chosen
        if size < 0 or size % chunk
    ]
    if problems:
        raise ConfigError(problems)
    return [size for size in chosen if size]


def _tokenizer_folder(candidates: Sequence[str | None]) -> str:
    """The first folder with a tokenizer in it; else the last name given, for transformers to say what is missing."""
    named = [name for name in candidates if name]
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    with_files = [name for name in named if any((Path(name) / file).is_file() for file in files)]
    return with_files[0] if with_files else named[-1]
