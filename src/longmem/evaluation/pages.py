"""What a report is made of, written as Markdown, as HTML or as text for a terminal.

Text is plain but for `code` in backticks and **bold**; text from a result file is never markup.
"""

from __future__ import annotations

import base64
import html
import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Heading(NamedTuple):
    """Level 1 is the page's title."""

    level: int
    text: str


class Text(NamedTuple):
    """A paragraph."""

    text: str


class Table(NamedTuple):
    """Cells as text; the first column names the rows, numbers in the others are aligned to the right."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """Drawn in colours that can be read on light and on dark paper; ``name`` is its file's, without a suffix."""

    name: str
    alt: str
    draw: Callable[[], Figure] = field(compare=False)

    @cached_property
    def svg(self) -> str:
        """On transparent paper."""
        import matplotlib

        written = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            self.draw().savefig(written, format="svg", transparent=True, metadata={"Date": None})
        return written.getvalue()


Block = Heading | Text | Table | Picture


def markdown(blocks: Sequence[Block], pictures: str) -> str:
    """The page as Markdown; ``pictures`` is the folder of its pictures, as seen from the page."""
    return "\n\n".join(_markdown(block, pictures) for block in blocks) + "\n"


def _markdown(block: Block, pictures: str) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_escaped(text)}"
        case Text(text):
            return _escaped(text)
        case Table(heads, rows, caption):
            lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
            table = "\n".join(f"| {' | '.join(_escaped(cell, in_table=True) for cell in line)} |" for line in lines)
            return f"{_escaped(caption)}\n\n{table}" if caption else table
        case Picture(name, alt):
            return f"![{_escaped(alt)}]({pictures}/{name}.svg)"


def _escaped(text: str, in_table: bool = False) -> str:
    """Text of a result file is never markup or a link: nothing of a page is fetched."""
    parts = re.split(r"(`[^`]*`)", text)
    text = "".join(p if p.startswith("`") else p.replace("<", "&lt;").replace("](", "]\\(") for p in parts)
    return text.replace("|", "\\|").replace("\n", " ") if in_table else text


def page(title: str, blocks: Sequence[Block]) -> str:
    """The page as one HTML file: pictures within, no scripts, nothing fetched; light or dark as the reader's system."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown(blocks, "pictures"))
    for block in blocks:
        if isinstance(block, Picture):
            data = base64.b64encode(block.svg.encode()).decode("ascii")
            body = body.replace(f'src="pictures/{block.name}.svg"', f'src="data:image/svg+xml;base64,{data}"')
    return _PAGE.replace("{title}", html.escape(title)).replace("{body}", body)


def plain(table: Table, width: int) -> str:
    """The table as text; one that is wider than ``width`` is written row by row, a line for each cell.

    Nothing is ever cut.
    """
    caption = textwrap.fill(re.sub(r"[`*]{1,2}", "", table.caption), width)
    lines = [caption] if caption else []
    widths = [max(map(len, column)) for column in zip(table.heads, *table.rows, strict=True)]
    if sum(widths) + 2 * (len(widths) - 1) <= width:
        for first, *more in (table.heads, ["-" * size for size in widths], *table.rows):
            aligned = (cell.rjust(size) for cell, size in zip(more, widths[1:], strict=True))
            lines.append("  ".join([first.ljust(widths[0]), *aligned]).rstrip())
        return "\n".join(lines)
    lines = lines or [f"{table.heads[0]}:"]
    for first, *cells in table.rows:
        named = [(head, cell) for head, cell in zip(table.heads[1:], cells, strict=True) if cell]
        longest = max((len(head) for head, _ in named), default=0)
        lines += [first, *(f"  {head.ljust(longest)}  {cell}" for head, cell in named)]
    return "\n".join(lines)


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --line: #8884; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; font: 16px/1.55 system-ui, sans-serif; }
h2 { margin-top: 2.6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
p { max-width: 62rem; overflow-wrap: anywhere; }
table { display: block; overflow-x: auto; border-collapse: collapse; margin: .7rem 0 1rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .28rem .8rem .28rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
img { display: block; max-width: 100%; height: auto; margin: .8rem 0 1.2rem; }
</style>
</head>
<body>
{body}
</body>
</html>
"""
