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
    from longmem.config import LongMemConfig, LongMemGenerationConfig, MemTRMConfig, TrainingFreeConfig
    from longmem.memory.bank import MemoryBank
    from longmem.memory.session import SessionMemory
    from longmem.modeling.alibi_gpt import AlibiGPTConfig, AlibiGPTForCausalLM
    from longmem.modeling.baselines import MemTRM, TrainingFree
    from longmem.modeling.explain import Explanation
    from longmem.modeling.longmem import LongMem
    from longmem.store.bank import SessionBank, StoreBank
    from longmem.store.recall import Recall
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
    "SessionBank",
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
    "AlibiGPTConfig": "longmem.modeling.alibi_gpt",
    "AlibiGPTForCausalLM": "longmem.modeling.alibi_gpt",
    "AttentionKV": "longmem.types",
    "Explanation": "longmem.modeling.explain",
    "LongMem": "longmem.modeling.longmem",
    "LongMemConfig": "longmem.config",
    "LongMemGenerationConfig": "longmem.config",
    "MemTRM": "longmem.modeling.baselines",
    "MemTRMConfig": "longmem.config",
    "MemoryBank": "longmem.memory.bank",
    "MemoryStore": "longmem.store.store",
    "Recall": "longmem.store.recall",
    "RetrievedMemory": "longmem.types",
    "SessionBank": "longmem.store.bank",
    "SessionMemory": "longmem.memory.session",
    "StoreBank": "longmem.store.bank",
    "TrainingFree": "longmem.modeling.baselines",
    "TrainingFreeConfig": "longmem.config",
}
_MODELS = tuple(f"longmem.modeling.{name}" for name in ("alibi_gpt", "longmem", "baselines"))


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if home.startswith(("longmem.modeling.", "longmem.config")):
        for model in _MODELS:
            import_module(model)
    value = globals()[name] = getattr(import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
