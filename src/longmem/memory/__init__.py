"""Memory in RAM or on the device: chunking, search, the bank, sessions. Tensors only, no files, no models."""

from longmem.memory.bank import MemoryBank
from longmem.memory.index import INDEXES, ExactIndex, Index, make_index
from longmem.types import ChunkOrigin

__all__ = ["INDEXES", "ChunkOrigin", "ExactIndex", "Index", "MemoryBank", "make_index"]
