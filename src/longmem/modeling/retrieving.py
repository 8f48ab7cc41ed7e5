"""From a memory to what a layer asks, refused where memory and model do not belong together."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from longmem.errors import MemoryBankError
from longmem.types import Memory, RetrievedMemory, Retriever


class _Reads(Protocol):
    """A model that reads memory."""

    config: Any

    @property
    def fingerprint(self) -> str: ...

    @property
    def memory_layer(self) -> int: ...

    backbone: Any


def retriever(model: _Reads, memory: Memory | None, rows: Tensor | None) -> Retriever | None:
    """How a layer of ``model`` searches ``memory``; None where there is none.

    Args:
        model: its ``config`` says how many tokens are retrieved.
        memory: what is searched.
        rows: (B,) the memory's row of every batch row; None is row b for batch row b.

    Raises:
        MemoryBankError: if the memory was written by another backbone or layer, or its chunks are too long.
    """
    if memory is None:
        return None
    theirs = getattr(memory, "fingerprint", None)
    if theirs is not None and theirs != model.fingerprint:
        raise MemoryBankError(
            f"this memory was written by backbone {theirs}, this model's backbone is {model.fingerprint}; "
            "keys of one model mean nothing to another: write the text again with this model"
        )
    layer = getattr(memory, "memory_layer", None)
    if layer is not None and layer != model.memory_layer:
        raise MemoryBankError(
            f"this memory holds keys of layer {layer}, this model remembers layer {model.memory_layer}; "
            "keys of one layer mean nothing to another: write the text again with this model"
        )
    retrieved = model.config.num_retrieved
    if memory.chunk_size > retrieved:
        raise MemoryBankError(
            f"the memory's chunk_size ({memory.chunk_size}) must not exceed num_retrieved "
            f"({retrieved}); make the bank with chunk_size {model.config.chunk_size}"
        )
    num_chunks = retrieved // memory.chunk_size

    def search(queries: Tensor) -> RetrievedMemory:
        if getattr(memory, "wants_kv", False):  # a LookaheadBank: later segments of the batch read earlier ones
            memory.offer(model.backbone.running_kv())  # type: ignore[attr-defined]
        return memory.search(queries, num_chunks, rows)

    return search
