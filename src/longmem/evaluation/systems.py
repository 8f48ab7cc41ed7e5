"""The systems that are compared on identical inputs, run together on one pass of their common backbone.

B rows · T window tokens · C width · V vocabulary
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longmem.errors import CheckpointError
from longmem.evaluation.streaming import Forward, Subject
from longmem.memory import MemoryBank
from longmem.modeling.sidenet import SideRun
from longmem.types import AttentionKV

if TYPE_CHECKING:
    from longmem.modeling.backbone import BackboneRun
    from longmem.modeling.longmem import LongMem

BACKBONE, MEMORY_OFF, CONTROL = "backbone", "memory_off", "control"
LOGITS_BYTES = 1 << 30  # logits of systems that run together exist at one time


@dataclass(frozen=True)
class System:
    """One of the models compared.

    Attributes:
        name: its key in results: ``backbone``, ``memory_off``, ``memory_<tokens>``, ``control``.
        label: its name for people.
        identity: what its numbers depend on, hashed into the key of its records.
        side: the LongMem whose SideNet runs; None is the backbone alone.
        memory_size: tokens of memory a row holds; None is no memory.
    """

    name: str
    label: str
    identity: dict[str, Any]
    side: LongMem | None = None
    memory_size: int | None = None


MakeMemory = Callable[["LongMem", int, int], MemoryBank]
"""``(model, rows, capacity in tokens)``."""


def _make_bank(model: LongMem, rows: int, capacity_tokens: int) -> MemoryBank:
    return MemoryBank.for_model(model, rows=rows, capacity_tokens=capacity_tokens)


@dataclass(frozen=True)
class Comparison:
    """Systems over one backbone; the first of them is the backbone alone, the baseline of all differences."""

    model: PreTrainedModel
    systems: tuple[System, ...]
    main: LongMem | None = None
    make_memory: MakeMemory = _make_bank

    @classmethod
    def of_backbone(cls, model: PreTrainedModel) -> Comparison:
        """A causal language model by itself."""
        return cls(model, (System(BACKBONE, "backbone alone", {"backbone": digest(model.state_dict().items())}),))

    @classmethod
    def of_longmem(
        cls,
        model: LongMem,
        memory_sizes: Sequence[int],
        *,
        control: LongMem | None = None,
        make_memory: MakeMemory = _make_bank,
    ) -> Comparison:
        """Backbone alone, memory switched off, a control SideNet, and memory at each size.

        Raises:
            CheckpointError: the control stands on another backbone.
        """
        if control is not None and control.fingerprint != model.fingerprint:
            raise CheckpointError(
                f"the control's backbone ({control.fingerprint}) is not the model's ({model.fingerprint}); "
                "compare SideNets trained over the same backbone"
            )
        mine = _identity(model)
        systems = [
            System(BACKBONE, "backbone alone", {"backbone": model.fingerprint}),
            System(MEMORY_OFF, "SideNet, memory off", mine, model),
        ]
        if control is not None:
            systems.append(System(CONTROL, "SideNet trained without memory", _identity(control), control))
        systems += [
            System(f"memory_{size}", f"LongMem, {size:,} tokens", mine | {"memory": size}, model, size)
            for size in memory_sizes
        ]
        return cls(model.backbone.model, tuple(systems), model, make_memory)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The differences reported: every system against the backbone, and memory against each of its controls."""
        names = [system.name for system in self.systems]
        pairs = [(name, BACKBONE) for name in names if name != BACKBONE]
        with_memory = [system.name for system in self.systems if system.memory_size is not None]
        return pairs + [(name, other) for other in (MEMORY_OFF, CONTROL) if other in names for name in with_memory]

    def together(self, rows: int, window: int) -> int:
        """How many systems may run at once without more than ``LOGITS_BYTES`` of logits."""
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        return max(1, LOGITS_BYTES // (4 * rows * window * vocabulary))

    def prepare(self, systems: Sequence[System], rows: int, longest: int) -> Subject:
        """Some systems with fresh, empty memories, to run together on documents of at most ``longest`` tokens."""
        memories: dict[str, MemoryBank] = {}
        for system in systems:
            if system.side is not None and system.memory_size is not None:
                chunk = system.side.config.chunk_size
                # a bank larger than the longest document is never filled: do not reserve it
                capacity = min(system.memory_size, -(-longest // chunk) * chunk)
                memories[system.name] = self.make_memory(system.side, rows, capacity)
        if self.main is None:
            return Subject(_plain(self.model))
        return Subject(_spliced(self.main, systems, memories), list(memories.values()))


def _plain(model: PreTrainedModel) -> Forward:
    def forward(input_ids: Tensor, rows: Tensor, keep: int) -> tuple[list[Tensor], None]:
        return [_logits(model, input_ids, keep)], None

    return forward


def _spliced(main: LongMem, systems: Sequence[System], memories: dict[str, MemoryBank]) -> Forward:
    """Run the backbone once; its final part (norm, head, caps) then runs on the systems' states, one batch behind
    another."""
    backbone = main.backbone

    def forward(input_ids: Tensor, rows: Tensor, keep: int) -> tuple[Sequence[Tensor], AttentionKV]:
        batch = len(input_ids)

        def state(system: System, run: BackboneRun, final: Tensor) -> Tensor:
            if system.side is None:
                return final
            memory = memories.get(system.name)
            chunks = system.side.config.num_chunks
            retrieve = None if memory is None else lambda queries: memory.search(queries, chunks, rows)
            hidden: Tensor = system.side.sidenet(backbone, run, final, retrieve, SideRun())
            return hidden.to(final.dtype)

        def hand_over(run: BackboneRun, final: Tensor) -> Tensor:
            return torch.cat([state(system, run, final) for system in systems])

        def norm(hidden: Tensor) -> Tensor:
            parts = zip(systems, torch.split(hidden, batch), strict=True)
            return torch.cat([_norm(backbone.normed, system, part) for system, part in parts])

        with backbone.splice(hand_over, None if backbone.family.final_norm is None else norm) as run:
            logits = _logits(main.backbone.model, input_ids, keep)
        return torch.split(logits, batch), run.kv(None)

    return forward


def _norm(normed: Callable[[Tensor], Tensor], system: System, hidden: Tensor) -> Tensor:
    """A SideNet has a final norm of its own."""
    if system.side is None or system.side.sidenet.final_norm is None:
        return normed(hidden)
    mine: Tensor = system.side.sidenet.final_norm(hidden.to(system.side.sidenet.memory_gate.dtype))
    return mine.to(hidden.dtype)


def _logits(model: PreTrainedModel, input_ids: Tensor, keep: int) -> Tensor:
    """(B, keep, V); a model that does not know ``logits_to_keep`` ignores it or is asked without."""
    known = "logits_to_keep" in type(model).forward.__annotations__
    some = {"logits_to_keep": keep} if known else {}
    logits: Tensor = model(input_ids=input_ids, use_cache=False, **some).logits
    return logits[:, -keep:]


def _identity(model: LongMem) -> dict[str, Any]:
    """A LongMem's weights, and the settings that its outputs depend on besides them."""
    names = ("memory_layer", "stride", "chunk_size", "num_retrieved", "final_state", "fusion")
    side = digest(zip(model.trainable_parameter_names(), model.trainable_parameters(), strict=True))
    return {"backbone": model.fingerprint, "side": side, **{name: getattr(model.config, name) for name in names}}


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of named tensors, bit for bit."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
