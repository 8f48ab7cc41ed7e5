"""What ``generate(memory=...)`` takes, as one memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

from longmem.memory.rows import BankRows
from longmem.memory.session import SessionMemory
from longmem.types import Memory


def as_memory(memory: Memory | Sequence[Memory | None] | None) -> Memory | None:
    """A list of banks, one for every prompt, becomes one memory of as many rows."""
    return BankRows(memory) if isinstance(memory, Sequence) else memory


def is_session(memory: Memory | None) -> TypeGuard[SessionMemory | BankRows]:
    """Whether text may be written to it: a session, or a list of nothing but sessions."""
    return isinstance(memory, SessionMemory) or (isinstance(memory, BankRows) and memory.writable)
