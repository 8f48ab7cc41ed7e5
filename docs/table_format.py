"""How tables of results are written in Markdown, and how a page says where one comes from."""

from __future__ import annotations

from collections.abc import Sequence


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """First column to the left, numbers to the right; no newline at the end."""
    return "\n".join(map(line, [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]))


def line(cells: Sequence[str]) -> str:
    """One line of a table."""
    return "| " + " | ".join(cells) + " |"


def made_by(where: str, command: str) -> str:
    """Name of a result's file, and the command that made it on a line of its own."""
    return f"`{where}`, made by\n`{command}`"
