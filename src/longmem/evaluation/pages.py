"""What a report is made of, written as Markdown, as HTML or as text for a terminal.

Text is plain but for `code` in backticks and **bold**; text from a result file is never markup.
"""

from __future__ import annotations

import base64
import html
import io
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Heading:
    """Level 1 is the page's title."""

    level: int
    text: str

    @property
    def anchor(self) -> str:
        return re.sub(r"[^\w\s-]", "", self.text.lower()).strip().replace(" ", "-")


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
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
            table = "\n".join(
                "| " + " | ".join(_escaped(cell, in_table=True) for cell in line) + " |" for line in lines
            )
            return f"{_escaped(caption)}\n\n{table}" if caption else table
        case Picture(name, alt):
            return f"![{_escaped(alt)}]({pictures}/{name}.svg)"


def _escaped(text: str, in_table: bool = False) -> str:
    """Angle brackets outside of code would be markup, and in a table bars and line ends."""
    parts = re.split(r"(`[^`]*`)", text)
    text = "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)
    return text.replace("|", "\\|").replace("\n", "<br>") if in_table else text


def page(title: str, blocks: Sequence[Block]) -> str:
    """The page as one HTML file: pictures within, no scripts, nothing fetched; light or dark as the reader's system."""
    heads = [block for block in blocks if isinstance(block, Heading) and block.level == 2]
    links = "".join(f'<a href="#{html.escape(head.anchor)}">{html.escape(head.text)}</a>' for head in heads)
    body = "\n".join(_html(block) for block in blocks)
    top, end, rest = body.partition("</h1>") if "</h1>" in body else ("", "", body)
    body = f"{top}{end}\n<nav>{links}</nav>\n{rest}"
    return _PAGE.replace("{title}", html.escape(title)).replace("{body}", body)


def _html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f'<h{level} id="{html.escape(block.anchor)}">{_inline(text)}</h{level}>'
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Table(heads, rows, caption):
            head = "".join(f'<th scope="col">{_inline(cell)}</th>' for cell in heads)
            body = "".join(
                f'<tr><th scope="row">{_inline(first)}</th>' + "".join(f"<td>{_inline(cell)}</td>" for cell in more)
                for first, *more in rows
            )
            said = f"<caption>{_inline(caption)}</caption>" if caption else ""
            return f"<table>{said}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        case Picture(_, alt):
            data = base64.b64encode(block.svg.encode()).decode("ascii")
            return f'<img src="data:image/svg+xml;base64,{data}" alt="{html.escape(alt, quote=True)}">'


def _inline(text: str) -> str:
    text = html.escape(text, quote=False).replace("\n", "<br>")
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


def plain(table: Table, width: int) -> str:
    """The table as text; one that is wider than ``width`` is written row by row, a line for each cell.

    Nothing is ever cut.
    """
    caption = textwrap.fill(re.sub(r"[`*]{1,2}", "", table.caption), width)
    columns = list(zip(table.heads, *table.rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    if sum(widths) + 2 * (len(widths) - 1) <= width:
        lines = list(_aligned([table.heads, ["-" * size for size in widths], *table.rows], widths))
    else:
        lines = []
        for first, *cells in table.rows:
            named = [(head, cell) for head, cell in zip(table.heads[1:], cells, strict=True) if cell]
            longest = max((len(head) for head, _ in named), default=0)
            lines += [first, *(f"  {head.ljust(longest)}  {cell}" for head, cell in named)]
    return "\n".join([*([caption] if caption else []), *lines])


def _aligned(lines: Sequence[Sequence[str]], widths: Sequence[int]) -> Iterator[str]:
    for first, *more in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(size) for cell, size in zip(more, widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()


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
p, caption { max-width: 62rem; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; }
table { display: block; overflow-x: auto; border-collapse: collapse; margin: .7rem 0 1rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { text-align: right; padding: .28rem .8rem; border-bottom: 1px solid var(--line); font-weight: normal; }
th:first-child { text-align: left; padding-left: 0; }
td { white-space: nowrap; }
thead th { font-weight: 600; }
img { display: block; max-width: 100%; height: auto; margin: .8rem 0 1.2rem; }
</style>
</head>
<body>
{body}
</body>
</html>
"""
