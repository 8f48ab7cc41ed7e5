"""Which tokens each forward pass sees, and which of them it scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

PROTOCOLS = ("segments", "sliding")


@dataclass(frozen=True)
class Window:
    """Input positions ``[start, end)`` of a document; those from ``scored_from`` are scored, by the token after each.

    Everything before ``start`` has left the window: it is what memory may hold.
    """

    start: int
    scored_from: int
    end: int


def windows(length: int, window: int, stride: int) -> Iterator[Window]:
    """Cover ``length`` input positions so that each is scored exactly once.

    The first window scores all it sees. Each later one starts ``stride`` further on and scores its last ``stride``
    positions, which therefore see ``window - stride`` to ``window`` tokens. ``stride == window`` gives the paper's
    non-overlapping segments.
    """
    start, scored = 0, 0
    while scored < length:
        end = min(start + window, length)
        yield Window(start, scored, end)
        start, scored = start + stride, end
