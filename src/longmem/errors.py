"""Every exception LongMem raises on purpose.

    LongMemError
    ├── ConfigError        a setting contradicts another, or the rules of its field (also a ValueError)
    ├── BackboneError      the backbone, or the layer asked for, cannot be used
    ├── MemoryBankError    keys, values or queries that do not fit the bank
    ├── DataError          text that is missing, empty or unreadable
    ├── CheckpointError    a checkpoint that is incomplete, foreign or damaged
    └── StoreError         a memory store that cannot do what was asked
        ├── StoreLocked    another process is writing to it
        ├── StoreDamaged   its files are not what was written
        └── StoreFull      it cannot be written: no room, a quota, a limit, or read-only

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


class StoreError(LongMemError):
    """A memory store cannot do what was asked; names the store and the way out."""


class StoreLocked(StoreError):
    """Another process writes to the store; names its process id, host, command and since when."""


class StoreDamaged(StoreError):
    """A file of the store is not what was written; names the file and the place in it."""


class StoreFull(StoreError):
    """The store cannot be written: no space, a quota, a size limit, or a read-only folder. It is as it was before."""


def first_line(problem: BaseException) -> str:
    """What a message of ours quotes of another library's error."""
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0]


def not_a_multiple(name: str, value: int, of: str, size: int) -> list[str]:
    """The broken rule, if the value of ``name`` is no multiple of that of ``of``, which is ``size``."""
    below = value - value % size
    tries = f"{below} or {below + size}" if below else f"{size}"
    return [f"{name} ({value}) must be a multiple of {of} ({size}); try {tries}"] if below < value else []
