"""The models that are compared on identical inputs, and what makes two measurements of one the same."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longmem.errors import CheckpointError
from longmem.evaluation.streaming import Forward, Subject, WritableMemory
from longmem.types import AttentionKV

MemoryFactory = Callable[..., WritableMemory]
"""``MemoryBank.for_model`` or its like: ``(model, rows=..., capacity_tokens=...)``."""

BACKBONE, MEMORY_OFF, CONTROL = "backbone", "memory_off", "control"


@dataclass(frozen=True)
class System:
    """A model under comparison.

    Attributes:
        name: its key in results: ``backbone``, ``memory_off``, ``memory_<tokens>``, ``control``.
        label: its name for people.
        identity: hashed into the key of its records.
        prepare: ``(rows, longest document)`` -> the model with a fresh, empty memory.
        memory_size: tokens of memory a row holds; None for a system without memory.
    """

    name: str
    label: str
    identity: dict[str, Any]
    prepare: Callable[[int, int], Subject]
    memory_size: int | None = None


def plain_systems(model: Any) -> list[System]:
    """A causal model by itself."""
    return [_alone(model, weights_digest(model))]


def longmem_systems(
    model: Any, memory_sizes: Sequence[int], *, control: Any | None = None, make_memory: MemoryFactory | None = None
) -> list[System]:
    """Backbone alone, memory switched off, memory at each size, and a control SideNet without memory.

    Raises:
        CheckpointError: the control stands on another backbone.
    """
    if control is not None and control.fingerprint != model.fingerprint:
        raise CheckpointError(
            f"the control's backbone ({control.fingerprint[:12]}) is not the model's ({model.fingerprint[:12]}); "
            "compare SideNets trained over the same backbone"
        )
    side = {"backbone": model.fingerprint, "side": trainable_digest(model), "config": _settings(model)}
    systems = [
        _alone(model.backbone.model, model.fingerprint),
        System(MEMORY_OFF, "SideNet, memory off", side, lambda rows, longest: Subject(_logits_only(model))),
    ]
    if control is not None:
        identity = {"backbone": control.fingerprint, "side": trainable_digest(control), "config": _settings(control)}
        label = "SideNet trained without memory"
        systems.append(System(CONTROL, label, identity, lambda rows, longest: Subject(_logits_only(control))))
    make = make_memory or _bank
    for size in memory_sizes:
        systems.append(
            System(
                name=f"memory_{size}",
                label=f"LongMem, {size:,} tokens",
                identity=side | {"memory": size},
                prepare=_with_memory(model, size, make),
                memory_size=size,
            )
        )
    return systems


def compared_pairs(systems: Sequence[System]) -> list[tuple[str, str]]:
    """The differences reported: every system against the backbone, and memory against each of its controls."""
    names = [system.name for system in systems]
    pairs = [(name, BACKBONE) for name in names if name != BACKBONE]
    with_memory = [system.name for system in systems if system.memory_size is not None]
    return pairs + [(name, other) for other in (MEMORY_OFF, CONTROL) if other in names for name in with_memory]


def trainable_digest(model: Any) -> str:
    """Hash of a LongMem's own weights."""
    return _digest(zip(model.trainable_parameter_names(), model.trainable_parameters(), strict=True))


def weights_digest(model: nn.Module) -> str:
    return _digest(model.state_dict().items())


def _digest(tensors: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _settings(model: Any) -> dict[str, Any]:
    """The settings of a LongMem that its outputs depend on besides its weights."""
    names = ("memory_layer", "stride", "chunk_size", "num_retrieved", "final_state", "fusion")
    return {name: getattr(model.config, name) for name in names}


def _alone(model: Any, digest: str) -> System:
    return System(BACKBONE, "backbone alone", {"backbone": digest}, lambda rows, longest: Subject(_logits_only(model)))


def _logits_only(model: Any) -> Forward:
    extra = _keep_argument(model)

    def forward(input_ids: Tensor, rows: Tensor, keep: int) -> tuple[Tensor, AttentionKV | None]:
        return model(input_ids=input_ids, use_cache=False, **extra(keep)).logits[:, -keep:], None

    return forward


def _keep_argument(model: Any) -> Callable[[int], dict[str, int]]:
    """``logits_to_keep`` where the model knows it: the head is a large part of a small model."""
    parameters = inspect.signature(model.forward).parameters
    known = "logits_to_keep" in parameters
    return (lambda keep: {"logits_to_keep": keep}) if known else (lambda keep: {})


def _with_memory(model: Any, size: int, make_memory: MemoryFactory) -> Callable[[int, int], Subject]:
    def prepare(rows: int, longest: int) -> Subject:
        chunk = model.config.chunk_size
        # a bank larger than the longest document is never filled: do not reserve it
        capacity = min(size, -(-longest // chunk) * chunk)
        memory = make_memory(model, rows=rows, capacity_tokens=capacity)
        extra = _keep_argument(model)

        def forward(input_ids: Tensor, rows: Tensor, keep: int) -> tuple[Tensor, AttentionKV | None]:
            out = model(
                input_ids=input_ids,
                memory=memory,
                memory_rows=rows.to(input_ids.device),
                use_cache=False,
                **extra(keep),
            )
            return out.logits[:, -keep:], out.kv

        return Subject(forward, memory)

    return prepare


def _bank(model: Any, rows: int, capacity_tokens: int) -> WritableMemory:
    from longmem.memory import MemoryBank

    return MemoryBank.for_model(model, rows=rows, capacity_tokens=capacity_tokens)
