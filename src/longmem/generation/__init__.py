"""Text longer than the local window: what leaves it moves to memory, and generation goes on."""

from longmem.generation.window import THIS_TEXT, LocalWindow, read, remember

__all__ = ["THIS_TEXT", "LocalWindow", "read", "remember"]
