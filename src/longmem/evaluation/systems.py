"""The systems that are compared: loaded and named."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longmem.config import CONFIGS, positions, usual_window
from longmem.data.tokens import load_tokenizer
from longmem.errors import CheckpointError, ConfigError, not_a_multiple
from longmem.evaluation.asking import Asker
from longmem.modeling.baselines import MemTRM, TrainingFree
from longmem.modeling.checkpoints import backbone_of, checked_device, checkpoint_folder, model_type, tokenizer_beside
from longmem.modeling.loading import load_backbone
from longmem.modeling.longmem import LongMem
from longmem.modeling.weights import fingerprint_of, legacy_fingerprint

BACKBONE, MEMORY_OFF, CONTROL = "backbone", "memory_off", "control"
LONGMEM, MEMTRM, TRAINING_FREE, WINDOW = "memory", "memtrm", "training_free", "window"
MEMTRM_OFF = f"{MEMTRM}_off"
LINEAR_POSITIONS = ("alibi_gpt", "bloom", "mpt")  # ALiBi has no last position


def sized(name: str) -> tuple[str, int] | None:
    """``memory_64`` -> ``("memory", 64)``: which kind of memory, and how large; None where there is none."""
    found = re.fullmatch(r"(.+)_(\d+)", name)
    return None if found is None else (found[1], int(found[2]))


def largest(names: Iterable[str]) -> list[str]:
    """The systems without those memories of which there is a larger one of the same kind."""
    names = list(names)
    most = dict(sorted(filter(None, map(sized, names))))
    return [name for name in names if (memory := sized(name)) is None or most[memory[0]] == memory[1]]


def chosen(systems: Sequence[Asker], beginnings: Sequence[str]) -> list[Asker]:
    """The systems whose names begin so; without beginnings all.

    Raises:
        ConfigError: a beginning is that of none; names those there are.
    """
    names = [system.name for system in systems]
    lost = [start for start in beginnings if not any(name.startswith(start) for name in names)]
    if lost:
        raise ConfigError(f"--systems ({', '.join(lost)}) begins no system's name; there are {', '.join(names)}")
    return [system for system in systems if not beginnings or system.name.startswith(tuple(beginnings))]


def compared(names: Sequence[str]) -> list[tuple[str, str]]:
    """The differences reported between systems, (system, against).

    Every system against the backbone; memory against the same model without it, and against the control; LongMem
    against each longer window of the backbone, and against each other kind of memory, or of context, of the same size.
    """
    pairs = [(name, BACKBONE) for name in names if name != BACKBONE and BACKBONE in names]
    sizes = {name: found for name in names if (found := sized(name)) is not None}
    for kind, other in ((LONGMEM, MEMORY_OFF), (LONGMEM, CONTROL), (MEMTRM, MEMTRM_OFF)):
        pairs += [(name, other) for name, (mine, _) in sizes.items() if mine == kind and other in names]
    longer = [name for name, (kind, _) in sizes.items() if kind == WINDOW]
    pairs += [(name, other) for name, (mine, _) in sizes.items() if mine == LONGMEM for other in longer]
    same = {other: f"{LONGMEM}_{size}" for other, (kind, size) in sizes.items() if kind not in (LONGMEM, WINDOW)}
    return pairs + [(name, other) for other, name in same.items() if name in names]


# loading


def load_systems(
    path: str,
    *,
    backbone: str | None = None,
    control: str | None = None,
    memtrm: str | None = None,
    training_free: Sequence[str] = (),
    memory_sizes: Sequence[int] | None = None,
    default_sizes: Sequence[int] | None = None,
    tokenizer: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    window: int | None = None,
    rows: int = 8,
    windows: Sequence[int] = (),
    full_context: int | None = None,
    reading: Mapping[str, Any] | None = None,
) -> list[Asker]:
    """Load a LongMem checkpoint, a baseline, or a causal LM by itself, and what is compared with it.

    Args:
        path: of a LongMem, a MemTRM, training-free settings or a causal LM, see ``checkpoint_folder``.
        control: a SideNet checkpoint trained equally long without memory, over the same backbone.
        memtrm: a MemTRM checkpoint whose training started from the same backbone.
        training_free: for each training-free model the share of its heads that memory gets, or the folder of its
            settings; by share, it remembers and retrieves as the LongMem (or else the MemTRM) beside it does.
        memory_sizes: tokens; None is ``default_sizes``.
        default_sizes: rounded up to whole chunks; None is the size in the model's config.
        tokenizer: folder or hub id, if not beside the model or its backbone.
        dtype: of the weights; None is as saved.
        window: None is the backbone's positions, at most 1024.
        windows: longer ones that the backbone alone has too.
        full_context: a window of the backbone alone that has what others have in memory.
        reading: settings of the LongMem in place of its own.

    Raises:
        ConfigError: settings that do not go together, or a device that is not here.
        CheckpointError, BackboneError: a model that is missing, damaged or made for another backbone.
    """
    device, where = checked_device(device), checkpoint_folder(path)
    kind = model_type(where)
    memtrms = [each for each in (where if kind == "memtrm" else None, memtrm) if each]
    if kind == "training_free":
        training_free = (where, *training_free)
    own = control or reading or (memory_sizes and not (memtrms or training_free))
    if (kind != "longmem" and own) or (kind not in CONFIGS and backbone):
        said = "--control, --set, --memory-sizes and --backbone are of a LongMem checkpoint"
        raise ConfigError(f"{said}; {where} is none")
    # everything is loaded as it was saved, because a backbone is known by its weights; then it is converted
    main = beside = settings = None
    if kind == "longmem":
        main = LongMem.from_pretrained(where, backbone=backbone, **(reading or {}))
        bare, named, settings = main.backbone.model, main.config.backbone_name_or_path, main.config
        if control is not None:
            said = "not a LongMem checkpoint; --control takes a SideNet trained without memory"
            beside = LongMem.from_pretrained(checkpoint_folder(control, "longmem", said), backbone=bare)
    else:
        named, revision = (backbone, None) if backbone else backbone_of(where)
        bare = load_backbone(named, revision, None).eval()
    others: list[Any] = []
    for each in memtrms:
        said = "not a MemTRM checkpoint; --memtrm takes one trained with method = 'memtrm'"
        trained = MemTRM.from_pretrained(checkpoint_folder(each, "memtrm", said))
        start = trained.config.start_fingerprint
        if not (main.accepts(start) if main else start in (fingerprint_of(bare), legacy_fingerprint(bare))):
            raise CheckpointError(
                f"MemTRM was made from backbone {start}, the others stand on {fingerprint_of(bare)}; compare models of "
                "one backbone"
            )
        others.append(trained)
        settings = settings or trained.config
    others += [_load_training_free(gate, bare, settings) for gate in training_free]
    for model in filter(None, (main or bare, beside, *others)):
        torch.nn.Module.to(model, device=device, dtype=dtype)
    how: dict[str, Any] = {
        "tokenizer": load_tokenizer(tokenizer or tokenizer_beside(where, named), bare),
        "window": window or usual_window(bare.config),
        "rows": rows,
    }
    sizes = _sizes(memory_sizes, default_sizes, settings) if main else ()
    systems = systems_of(main or bare, sizes, control=beside, **how)
    for other in others:
        systems += systems_of(other, _sizes(memory_sizes, default_sizes, other.config), **how)
    names = [system.name for system in systems]
    if twice := [system.label for system in systems if names.count(system.name) > 1]:
        raise ConfigError(f"{twice[0]}: compared twice; leave one of them away")
    longer = [with_window(systems[0], size) for size in windows]
    return systems + longer + ([with_window(systems[0], full_context, whole=True)] if full_context else [])


def _load_training_free(gate: str, backbone: Any, settings: Any) -> Any:
    """Over the backbone that is already there, with the settings of the model beside it, or from a folder."""
    try:
        share = float(gate)
    except ValueError:
        said = "no training-free settings; --training-free takes a share from 0 to 1, or the folder of a TrainingFree"
        return TrainingFree.from_pretrained(checkpoint_folder(gate, "training_free", said), backbone=backbone)
    names = ("memory_layers", "chunk_size", "num_retrieved", "memory_size")
    alike = {} if settings is None else {name: getattr(settings, name) for name in names}
    return TrainingFree.from_backbone(backbone, gate=share, **alike)


def _sizes(sizes: Sequence[int] | None, default: Sequence[int] | None, config: Any) -> list[int]:
    """Of memory, sorted. A default is rounded up to whole chunks: nobody has typed it."""
    chunk = config.chunk_size
    if problems := [line for size in sizes or () for line in not_a_multiple("memory size", size, "chunk_size", chunk)]:
        raise ConfigError(problems)
    return sorted(set(sizes or (-(-size // chunk) * chunk for size in default or [config.memory_size])))


def systems_of(
    model: Any, memory_sizes: Sequence[int] = (), *, control: LongMem | None = None, **how: Any
) -> list[Asker]:
    """What is measured of a model.

    A causal language model is the backbone alone. A LongMem comes with its backbone, memory switched off, the control,
    and memory at each size. A Memorizing Transformer was trained, and is measured without memory too; training-free
    attention without memory is the backbone.

    Args:
        how: ``tokenizer``, ``window`` and ``rows`` of all of them.
    """
    if not hasattr(model, "memory_layers"):
        return [Asker(BACKBONE, "backbone alone", {"backbone": digest(model.state_dict().items())}, model, **how)]
    identity, found = _identity(model), list[tuple[str, str, dict[str, Any], Any, int | None]]()
    if hasattr(model, "sidenet"):
        kind, label = LONGMEM, "LongMem"
        alone = {name: identity[name] for name in ("backbone", "dtype")}
        found.append((BACKBONE, "backbone alone", alone, model.backbone.model, None))
        found.append((MEMORY_OFF, "SideNet, memory off", identity, model, None))
        if control is not None:
            found.append((CONTROL, "SideNet trained without memory", _identity(control), control, None))
    elif model.frozen:
        share = "calibrated" if model.config.fusion == "token" else f"{float(model.memory_share.mean()):.4g}"
        kind, label = f"{TRAINING_FREE}_{share}", f"training-free {share}"
    else:
        kind, label = MEMTRM, "MemTRM"
        found.append((MEMTRM_OFF, "MemTRM, memory off", identity, model, None))
    for size in memory_sizes:
        found.append((f"{kind}_{size}", f"{label}, {size:,} tokens", identity | {"memory": size}, model, size))
    return [Asker(*each, **how) for each in found]


def with_window(backbone: Asker, window: int, *, whole: bool = False) -> Asker:
    """The backbone with a longer window; ``whole``: one that has what others have in memory.

    Raises:
        ConfigError: it is no longer, or the backbone has no positions for it.
    """
    name, said, option = ("full", "full context", "--full-context") if whole else (WINDOW, "longer window", "--windows")
    config = backbone.model.config
    most = 0 if config.model_type in LINEAR_POSITIONS else positions(config) or 0  # 0: as many as one likes
    if window <= backbone.window or 0 < most < window:
        within = f" and at most the backbone's positions ({most})" if most else ""
        raise ConfigError(
            f"{said} ({window}) must be above the window ({backbone.window}){within}; change {option} or leave it away"
        )
    return replace(
        backbone,
        name=f"{name}_{window}",
        label=f"backbone, {said.removeprefix('longer ')} of {window:,}",
        identity=backbone.identity | {"window": window},
        window=window,
        rows=max(1, backbone.rows * backbone.window // window),  # as many tokens in a batch as the others have
        whole=whole,
    )


def _identity(model: Any) -> dict[str, Any]:
    """The weights beside the frozen backbone's, and the settings that outputs depend on besides them."""
    names = (
        "memory_layers", "stride", "chunk_size", "num_retrieved", "final_state", "fusion", "recency",
        "memory_temperature",
    )  # fmt: skip
    found: dict[str, Any] = {"backbone": model.fingerprint, "dtype": str(model.dtype).removeprefix("torch.")}
    trained = zip(model.trainable_parameter_names(), model.trainable_parameters(), strict=True)
    if hasattr(model, "sidenet"):
        found["side"] = digest(trained)
    else:
        found["gates"] = digest([("memory_gate", model.memory_gate), *(trained if model.frozen else ())])
        if not model.frozen:
            found["weights"] = digest(model.state_dict().items())
    return found | {name: getattr(model.config, name) for name in names if hasattr(model.config, name)}


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of named tensors, bit for bit."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
