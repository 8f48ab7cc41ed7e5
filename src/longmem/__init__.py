"""LongMem: a long-term memory for any frozen causal language model.

Importing this package is cheap: torch and transformers come with the first public name that needs them. The first
model class that is imported makes transformers' Auto classes know the checkpoints of all.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from longmem.errors import (
    BackboneError,
    CheckpointError,
    ConfigError,
    DataError,
    LongMemError,
    MemoryBankError,
    StoreDamaged,
    StoreError,
    StoreFull,
    StoreLocked,
)

if TYPE_CHECKING:
    from longmem.chat import Recall
    from longmem.config import LongMemConfig, LongMemGenerationConfig, MemTRMConfig, TrainingFreeConfig
    from longmem.generation.page import Explanation
    from longmem.memory.bank import MemoryBank
    from longmem.memory.session import SessionMemory
    from longmem.modeling.alibi_gpt import AlibiGPTConfig, AlibiGPTForCausalLM
    from longmem.modeling.baselines import MemTRM, TrainingFree
    from longmem.modeling.longmem import LongMem
    from longmem.store.bank import StoreBank
    from longmem.store.store import MemoryStore
    from longmem.types import AttentionKV, RetrievedMemory

__version__ = "0.2.0"

__all__ = [
    "AlibiGPTConfig",
    "AlibiGPTForCausalLM",
    "AttentionKV",
    "BackboneError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Explanation",
    "LongMem",
    "LongMemConfig",
    "LongMemError",
    "LongMemGenerationConfig",
    "MemTRM",
    "MemTRMConfig",
    "MemoryBank",
    "MemoryBankError",
    "MemoryStore",
    "Recall",
    "RetrievedMemory",
    "SessionMemory",
    "StoreBank",
    "StoreDamaged",
    "StoreError",
    "StoreFull",
    "StoreLocked",
    "TrainingFree",
    "TrainingFreeConfig",
    "__version__",
]

_HOMES = {
    "chat": ("Recall",),
    "config": ("LongMemConfig", "LongMemGenerationConfig", "MemTRMConfig", "TrainingFreeConfig"),
    "generation.page": ("Explanation",),
    "memory.bank": ("MemoryBank",),
    "memory.session": ("SessionMemory",),
    "modeling.alibi_gpt": ("AlibiGPTConfig", "AlibiGPTForCausalLM"),
    "modeling.baselines": ("MemTRM", "TrainingFree"),
    "modeling.longmem": ("LongMem",),
    "store.bank": ("StoreBank",),
    "store.store": ("MemoryStore",),
    "types": ("AttentionKV", "RetrievedMemory"),
}
_MODELS = ("modeling.alibi_gpt", "modeling.longmem", "modeling.baselines")


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            # a model brings the others, so that the Auto classes know the checkpoints of all
            for each in _MODELS if home.startswith(("modeling.", "config")) else ():
                import_module(f"longmem.{each}")
            value = globals()[name] = getattr(import_module(f"longmem.{home}"), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
