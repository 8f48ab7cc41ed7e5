"""The systems that are compared on identical inputs, on one pass of their common backbone where they can share it.

B rows · T window tokens · C width · V vocabulary
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longmem.errors import CheckpointError, ConfigError
from longmem.evaluation.streaming import Forward, Subject
from longmem.memory import MemoryBank
from longmem.modeling.fingerprint import fingerprint_of, legacy_fingerprint
from longmem.modeling.reading import Reading
from longmem.types import AttentionKV

if TYPE_CHECKING:
    from longmem.modeling.longmem import LongMem
    from longmem.modeling.memtrm import MemTRM
    from longmem.modeling.training_free import TrainingFree

BACKBONE, MEMORY_OFF, CONTROL = "backbone", "memory_off", "control"
LONGMEM, MEMTRM, TRAINING_FREE = "memory", "memtrm", "training_free"
MEMTRM_OFF = f"{MEMTRM}_off"
LOGITS_BYTES = 1 << 30  # logits of systems that run together exist at one time


@dataclass(frozen=True)
class System:
    """One of the models compared.

    Attributes:
        name: its key in results: ``backbone``, ``memory_off``, ``memory_<tokens>``, ``control``, ``memtrm_off``,
            ``memtrm_<tokens>``, ``training_free_<share>_<tokens>``.
        label: its name for people.
        identity: what its numbers depend on, hashed into the key of its records.
        reader: the LongMem whose SideNet runs, or a model that reads memory in its own layers; None is the backbone
            alone.
        memory_size: tokens of memory a row holds; None is no memory.
    """

    name: str
    label: str
    identity: dict[str, Any]
    reader: Any = None
    memory_size: int | None = None

    @property
    def apart(self) -> bool:
        """Whether it reads memory in its own layers, and so cannot share a pass of the backbone."""
        return self.reader is not None and not hasattr(self.reader, "sidenet")


def sized(name: str) -> tuple[str, int] | None:
    """``memory_64`` -> ``("memory", 64)``: which kind of memory, and how large; None where there is none."""
    found = re.fullmatch(r"(.+)_(\d+)", name)
    return None if found is None else (found[1], int(found[2]))


def largest(names: Iterable[str]) -> list[str]:
    """The systems without those memories of which there is a larger one of the same kind."""
    names = list(names)
    most = dict(sorted(filter(None, map(sized, names))))
    return [name for name in names if (memory := sized(name)) is None or most[memory[0]] == memory[1]]


def chosen(names: Sequence[str], beginnings: Sequence[str], option: str = "--systems") -> list[str]:
    """The systems whose names begin so.

    Raises:
        ConfigError: a beginning is that of none; names those there are.
    """
    lost = [start for start in beginnings if not any(name.startswith(start) for name in names)]
    if lost:
        raise ConfigError(f"{option} ({', '.join(lost)}) begins no system's name; there are {', '.join(names)}")
    return [name for name in names if not beginnings or name.startswith(tuple(beginnings))]


def compared(names: Sequence[str]) -> list[tuple[str, str]]:
    """The differences reported between systems, (system, against).

    Every system against the backbone; memory against the same model without it, and against the control; LongMem
    against each other kind of memory, or of context, of the same size.
    """
    pairs = [(name, BACKBONE) for name in names if name != BACKBONE and BACKBONE in names]
    sizes = {name: found for name in names if (found := sized(name)) is not None}
    for kind, other in ((LONGMEM, MEMORY_OFF), (LONGMEM, CONTROL), (MEMTRM, MEMTRM_OFF)):
        pairs += [(name, other) for name, (mine, _) in sizes.items() if mine == kind and other in names]
    same = {other: f"{LONGMEM}_{size}" for other, (kind, size) in sizes.items() if kind != LONGMEM}
    return pairs + [(name, other) for other, name in same.items() if name in names]


@dataclass(frozen=True)
class Comparison:
    """Systems over one backbone; the first of them is the backbone alone, the baseline of all differences.

    ``fingerprints`` are more of those by which the backbone goes: as it was before it was converted to another dtype.
    """

    model: PreTrainedModel
    systems: tuple[System, ...]
    main: LongMem | None = None
    make_memory: Callable[..., MemoryBank] = MemoryBank.for_model
    fingerprints: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def of_backbone(cls, model: PreTrainedModel) -> Comparison:
        """A causal language model by itself."""
        return cls(model, (System(BACKBONE, "backbone alone", {"backbone": digest(model.state_dict().items())}),))

    @classmethod
    def of_longmem(cls, model: LongMem, memory_sizes: Sequence[int], *, control: LongMem | None = None) -> Comparison:
        """Backbone alone, memory switched off, a control SideNet, and memory at each size.

        Raises:
            CheckpointError: the control stands on another backbone.
        """
        if control is not None and not model.accepts(control.fingerprint):
            raise CheckpointError(
                f"the control's backbone ({control.fingerprint}) is not the model's ({model.fingerprint}); "
                "compare SideNets trained over the same backbone"
            )
        mine = _identity(model)
        systems = [
            System(BACKBONE, "backbone alone", {name: mine[name] for name in ("backbone", "dtype")}),
            System(MEMORY_OFF, "SideNet, memory off", mine, model),
        ]
        if control is not None:
            systems.append(System(CONTROL, "SideNet trained without memory", _identity(control), control))
        return cls(
            model.backbone.model, (*systems, *_with_memory(LONGMEM, "LongMem", mine, model, memory_sizes)), model
        )

    def beside(self, model: MemTRM | TrainingFree, memory_sizes: Sequence[int]) -> Comparison:
        """And a model that reads memory in its own layers, at each size.

        A Memorizing Transformer was trained from this backbone, and is measured without memory too; training-free
        attention without memory is the backbone.

        Raises:
            CheckpointError: it is of another backbone.
            ConfigError: there is one of this kind already.
        """
        config: Any = model.config
        identity, more = _identity(model), list[System]()
        if model.frozen:
            start, share = model.fingerprint, f"{float(model.memory_share.mean()):.4g}"
            share = "calibrated" if config.fusion == "token" else share
            kind, label = f"{TRAINING_FREE}_{share}", f"training-free {share}"
        else:
            start, kind, label = str(config.start_fingerprint), MEMTRM, "MemTRM"
            more = [System(MEMTRM_OFF, "MemTRM, memory off", identity, model)]
        mine = self.fingerprint
        if start not in self.fingerprints | {mine, fingerprint_of(self.model), legacy_fingerprint(self.model)}:
            raise CheckpointError(
                f"{label} was made from backbone {start}, the others stand on {mine}; compare models of one backbone"
            )
        more += _with_memory(kind, label, identity, model, memory_sizes)
        if {system.name for system in self.systems} & {system.name for system in more}:
            raise ConfigError(f"{label} is compared twice; leave one of them away")
        return replace(self, systems=(*self.systems, *more))

    @property
    def fingerprint(self) -> str:
        """Of the common backbone."""
        return self.main.fingerprint if self.main is not None else fingerprint_of(self.model)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The differences reported, see ``compared``."""
        return compared([system.name for system in self.systems])

    def described(self) -> dict[str, dict[str, Any]]:
        """Every system's identity and number of parameters, for the header of a result."""
        found = {}
        for system in self.systems:
            reader: Any = system.reader or self.model
            found[system.name] = system.identity | {"parameters": sum(p.numel() for p in reader.parameters())}
            if system.reader is not None and not system.apart:
                found[system.name]["trained_parameters"] = sum(p.numel() for p in reader.trainable_parameters())
        return found

    def passes(self, names: Sequence[str], rows: int, window: int) -> list[tuple[str, ...]]:
        """The named systems in tuples that run together: on one pass of the backbone, with no more logits than fit."""
        apart = {system.name for system in self.systems if system.apart}
        shared = [name for name in names if name not in apart]
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        most = max(1, LOGITS_BYTES // (4 * rows * window * vocabulary))
        runs = [tuple(shared[at : at + most]) for at in range(0, len(shared), most)]
        return runs + [(name,) for name in names if name in apart]

    def prepare(self, systems: Sequence[System], rows: int, longest: int) -> Subject:
        """One of the tuples of ``passes`` with fresh, empty memories, for documents of at most ``longest`` tokens."""
        memories: dict[str, MemoryBank] = {}
        for system in systems:
            if system.reader is not None and system.memory_size is not None:
                chunk = system.reader.config.chunk_size
                # a bank larger than the longest document is never filled: do not reserve it
                capacity = min(system.memory_size, -(-longest // chunk) * chunk)
                memories[system.name] = self.make_memory(system.reader, rows, capacity)
        banks, first = list(memories.values()), systems[0]
        if first.apart:
            return Subject(_alone(first.reader, memories.get(first.name)), banks)
        if self.main is None:
            return Subject(lambda input_ids, rows, keep: ([last_logits(self.model, input_ids, keep)], None))
        return Subject(_together(self.main, systems, memories), banks)


def _with_memory(kind: str, label: str, identity: dict[str, Any], model: Any, sizes: Sequence[int]) -> list[System]:
    return [
        System(f"{kind}_{size}", f"{label}, {size:,} tokens", identity | {"memory": size}, model, size)
        for size in sizes
    ]


def _alone(model: Any, memory: MemoryBank | None) -> Forward:
    def forward(input_ids: Tensor, rows: Tensor, keep: int) -> tuple[list[Tensor], AttentionKV | None]:
        out = model(input_ids, memory=memory, memory_rows=rows, use_cache=False, logits_to_keep=keep)
        return [out.logits[:, -keep:]], out.kv

    return forward


def _together(main: LongMem, systems: Sequence[System], memories: dict[str, Any]) -> Forward:
    """Run the backbone once; its final part (norm, head, caps) then runs on the systems' states, one batch after
    another."""
    backbone = main.backbone

    def forward(input_ids: Tensor, rows: Tensor, keep: int) -> tuple[Sequence[Tensor], AttentionKV]:
        batch = len(input_ids)
        run = backbone.run(input_ids, use_cache=False)
        assert run.output is not None
        states: list[Any] = []
        for system in systems:
            if system.reader is None:
                states.append(run.output.last_hidden_state)
                continue
            run.reading = Reading.of(system.reader, memories.get(system.name), rows, explain=False)
            states.append(system.reader.read(run))
        logits: Any = backbone.head(torch.cat(states), run, logits_to_keep=keep).logits
        return torch.split(logits[:, -keep:], batch), run.kv(None)

    return forward


def last_logits(model: Any, input_ids: Tensor, keep: int, **reads: Any) -> Tensor:
    """Of the last ``keep`` positions, (B, keep, V); a model that does not know ``logits_to_keep`` gives all."""
    known = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    some = {"logits_to_keep": keep} if known else {}
    logits: Tensor = model(input_ids=input_ids, use_cache=False, **some, **reads).logits
    return logits[:, -keep:]


def _identity(model: Any) -> dict[str, Any]:
    """The weights beside the frozen backbone's, and the settings that outputs depend on besides them."""
    names = ("memory_layers", "stride", "chunk_size", "num_retrieved", "final_state", "fusion")
    found: dict[str, Any] = {"backbone": model.fingerprint, "dtype": str(model.dtype).removeprefix("torch.")}
    if hasattr(model, "sidenet"):
        found["side"] = digest(zip(model.trainable_parameter_names(), model.trainable_parameters(), strict=True))
    else:
        trained = zip(model.trainable_parameter_names(), model.trainable_parameters(), strict=True)
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
