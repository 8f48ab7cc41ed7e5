"""Text longer than the local window: what leaves it moves to memory, and generation goes on."""

from longmem.generation.reading import THIS_TEXT, read, remember
from longmem.generation.window import LocalWindow, WindowPolicy

__all__ = ["THIS_TEXT", "LocalWindow", "WindowPolicy", "read", "remember"]
