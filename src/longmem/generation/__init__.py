"""Text longer than the local window: what leaves it moves to memory, and generation goes on."""

from longmem.generation.memories import as_memory, is_session
from longmem.generation.policy import WindowPolicy
from longmem.generation.reading import THIS_TEXT, read, remember
from longmem.generation.window import LocalWindow, open_window

__all__ = [
    "THIS_TEXT",
    "LocalWindow",
    "WindowPolicy",
    "as_memory",
    "is_session",
    "open_window",
    "read",
    "remember",
]
