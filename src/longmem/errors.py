"""Every exception LongMem raises on purpose.

    LongMemError
    ├── ConfigError        a setting contradicts another, or the rules of its field (also a ValueError)
    ├── BackboneError      the backbone, or the layer asked for, cannot be used
    ├── MemoryBankError    keys, values or queries that do not fit the bank
    ├── DataError          text that is missing, empty or unreadable
    └── CheckpointError    a checkpoint that is incomplete, foreign or damaged

A message is one line: the value, the rule, and the way out.
"""

from __future__ import annotations

from collections.abc import Sequence


class LongMemError(Exception):
    """Base of all LongMem errors; the command line prints its text and exits with status 1."""


class ConfigError(LongMemError, ValueError):
    """One or more settings are wrong; ``problems`` lists all of them."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("; ".join(self.problems))


class BackboneError(LongMemError):
    """The backbone or the memory layer cannot be used; says which would do."""


class MemoryBankError(LongMemError, ValueError):
    """Tensors that do not fit the bank, or a bank made for another model."""


class DataError(LongMemError):
    """Text that is missing, empty or unreadable; names the path."""


class CheckpointError(LongMemError):
    """A checkpoint that is incomplete, foreign or damaged; names the path."""
