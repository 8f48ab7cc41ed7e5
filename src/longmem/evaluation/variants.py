"""One trained LongMem under other settings: whatever can change without training it again.

A variant shares every weight with the model it comes from; only its config, its gate or its memory differ.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from longmem.evaluation.systems import MakeMemory
from longmem.memory import MemoryBank
from longmem.memory.index import make_index
from longmem.memory.slots import Slots
from longmem.modeling.longmem import LongMem
from longmem.store.precision import quantise

MEMORY_DTYPES = ("float32", "float16", "bfloat16", "int8")


def varied(model: LongMem, gate_share: float | None = None, **config: int) -> LongMem:
    """The same model with other settings.

    Args:
        model: stays as it is.
        gate_share: share from 0 to 1 that every head that finds something gives to memory; None is as trained.
        **config: fields of ``LongMemConfig`` that are read when memory is made and searched.
    """
    other = copy.copy(model)
    other.config = copy.deepcopy(model.config)
    for name, value in config.items():
        setattr(other.config, name, value)
    if gate_share is not None:
        side = copy.copy(model.sidenet)
        # tables of a module's own: setting the copy's gate must not set the model's
        object.__setattr__(side, "_parameters", dict(model.sidenet._parameters))
        object.__setattr__(other, "_modules", dict(model._modules))
        logit = (
            math.inf if gate_share == 1 else -math.inf if gate_share == 0 else math.log(gate_share / (1 - gate_share))
        )
        gate = model.sidenet.memory_gate
        side.memory_gate = nn.Parameter(torch.full_like(gate, logit), requires_grad=gate.requires_grad)
        other.sidenet = side
    return other


class Int8Slots(Slots):
    """Keys and values as a store in int8 gives them back: a scale for each chunk, head, and key or value."""

    def put(self, rows: Tensor, slots: Tensor, chunks: Tensor, lengths: Tensor) -> None:
        """Mean keys are those of the unrounded keys, as a store keeps them."""
        super().put(rows, slots, chunks, lengths)
        integers, scales = quantise(chunks.float())
        place = self.storage.device
        self.storage[rows.to(place), slots.to(place)] = (integers * scales[..., None, None]).to(self.storage)


class Int8Bank(MemoryBank):
    """A bank whose keys and values are rounded to int8; they stay floating point, so it saves no memory itself."""

    def __init__(
        self, rows: int, capacity_tokens: int, heads_kv: int, head_dim: int, chunk_size: int = 4, **settings: Any
    ) -> None:
        super().__init__(rows, capacity_tokens, heads_kv, head_dim, chunk_size, **settings)
        kept = self._slots
        number, shape = 1 if self.shared else rows, (heads_kv, head_dim, chunk_size)
        index = make_index(settings.get("index", "exact"))
        self._slots = Int8Slots(
            number, capacity_tokens // chunk_size, *shape, kept.storage.dtype, kept.keys.dtype, self.device, index
        )


class SharedBank(MemoryBank):
    """One memory for all rows, never emptied between documents: rows find each other's text, and that read before.

    It is what the released code has by mistake; here to see what the mistake costs.
    """

    def reset(self, rows: Tensor | None = None) -> None:
        """A row that turns to its next document only ends the one before."""
        if rows is None:
            super().reset()
        else:
            self.end_document(rows)


def memory_maker(dtypes: Mapping[int, str], shared: Mapping[int, int]) -> MakeMemory:
    """Makes the bank that a variant asks for.

    Args:
        dtypes: by ``id`` of the variant's model, one of ``MEMORY_DTYPES``; others have the model's dtype.
        shared: by ``id`` of the variant's model, tokens of the one memory for all rows.
    """

    def make(model: Any, rows: int, capacity_tokens: int) -> MemoryBank:
        dtype = dtypes.get(id(model))
        if id(model) in shared:
            return SharedBank.for_model(model, rows, shared[id(model)], shared=True)
        if dtype == "int8":
            return Int8Bank.for_model(model, rows, capacity_tokens)
        settings = {} if dtype is None else {"dtype": getattr(torch, dtype)}
        return MemoryBank.for_model(model, rows, capacity_tokens, **settings)

    return make
