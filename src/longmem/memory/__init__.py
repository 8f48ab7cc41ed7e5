"""Memory in RAM or on the device: chunking, search, the bank, sessions. Tensors only, no files, no models."""

from longmem.memory.bank import MemoryBank
from longmem.memory.index import ExactIndex, Index
from longmem.types import ChunkOrigin

__all__ = ["ChunkOrigin", "ExactIndex", "Index", "MemoryBank"]
