"""What a page is made of, and how it reads as Markdown and as HTML.

Text is plain but for `code` in backticks and **bold**; what stands in a result file is shown as text, never as markup.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from longmem.evaluation.themes import DARK, LIGHT, Draw, picture


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
    """A paragraph; ``quiet`` ones are small print."""

    text: str
    quiet: bool = False


@dataclass(frozen=True)
class Table:
    """Cells as text; all columns but the first are to the right, where they are ``numbers``."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    numbers: bool = True


@dataclass(frozen=True)
class Picture:
    """Drawn on light and on dark paper; ``name`` is its file's, without a suffix."""

    name: str
    alt: str
    draw: Draw = field(compare=False)

    @cached_property
    def papers(self) -> tuple[bytes, bytes]:
        """PNG on light and on dark paper."""
        return picture(self.draw, LIGHT), picture(self.draw, DARK)


Block = Heading | Text | Table | Picture


def markdown(blocks: Sequence[Block], pictures: str) -> str:
    """The page as Markdown; ``pictures`` is the folder of its pictures, as seen from the page."""
    return "\n\n".join(_markdown(block, pictures) for block in blocks) + "\n"


def _markdown(block: Block, pictures: str) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_plain(text)}"
        case Text(text):
            return _plain(text)
        case Table(heads, rows, caption, numbers):
            lines = [heads, ["---", *["---:" if numbers else "---"] * (len(heads) - 1)], *rows]
            table = "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)
            return f"{_plain(caption)}\n\n{table}" if caption else table
        case Picture(name, alt):
            where, said = f"{pictures}/{name}", html.escape(alt, quote=True)
            dark = f'<source media="(prefers-color-scheme: dark)" srcset="{where}-dark.png">'
            return f'<picture>{dark}<img src="{where}.png" alt="{said}"></picture>'


def _plain(text: str) -> str:
    """Angle brackets outside of code would be markup."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|").replace("\n", "<br>")


def page(title: str, blocks: Sequence[Block]) -> str:
    """The page as one HTML file: pictures within, no scripts, nothing fetched."""
    heads = [block for block in blocks if isinstance(block, Heading) and block.level == 2]
    links = "".join(f'<a href="#{_anchor(head)}">{html.escape(head.text)}</a>' for head in heads)
    body = "\n".join(_html(block) for block in blocks)
    first, rest = body.split("</h1>", 1) if "</h1>" in body else ("", body)
    top = f"{first}</h1>" if first else ""
    return _PAGE.format(title=html.escape(title), style=_STYLE, body=f"{top}\n<nav>{links}</nav>\n{rest}")


def _html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f'<h{level} id="{_anchor(block)}">{_inline(text)}</h{level}>'
        case Text(text, quiet):
            return f'<p class="quiet">{_inline(text)}</p>' if quiet else f"<p>{_inline(text)}</p>"
        case Table(heads, rows, caption, numbers):
            said = f"<caption>{_inline(caption)}</caption>" if caption else ""
            head = "".join(f'<th scope="col">{_inline(cell)}</th>' for cell in heads)
            body = "".join("<tr>" + _row(row) + "</tr>" for row in rows)
            kind = "" if numbers else ' class="words"'
            top = f"{said}<thead><tr>{head}</tr></thead>"
            return f"<div class='wide'><table{kind}>{top}<tbody>{body}</tbody></table></div>"
        case Picture(_, alt):
            light, dark = map(_data, block.papers)
            source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
            return f'<picture>{source}<img src="{light}" alt="{html.escape(alt, quote=True)}"></picture>'


def _row(row: Sequence[str]) -> str:
    first, *others = row
    return f'<th scope="row">{_inline(first)}</th>' + "".join(f"<td>{_inline(cell)}</td>" for cell in others)


def _anchor(head: Heading) -> str:
    return html.escape(head.anchor, quote=True)


def _inline(text: str) -> str:
    text = html.escape(text, quote=False).replace("\n", "<br>")
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


_STYLE = """
:root { --paper: #fcfcfb; --ink: #1d1f21; --quiet: #5c6167; --line: #d9dbdd; --card: #f1f2f2; --link: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181a; --ink: #e7e8e9; --quiet: #a9afb4; --line: #3a3e42; --card: #202326; --link: #56b4e9; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.6rem 0 .4rem; }
p { margin: .5rem 0; max-width: 62rem; overflow-wrap: anywhere; }
.quiet { color: var(--quiet); font-size: .88rem; }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: .8rem 0 1.2rem; }
code { font: .86em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; background: var(--card);
  border-radius: .2rem; padding: .05rem .25rem; }
.wide { overflow-x: auto; margin: .7rem 0 1rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--quiet); padding-bottom: .3rem; }
th, td { text-align: right; padding: .28rem .8rem; border-bottom: 1px solid var(--line); font-weight: normal;
  vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td { white-space: nowrap; }
.words th, .words td { text-align: left; padding: .28rem 1.2rem .28rem 0; }
thead th { color: var(--quiet); }
picture, img { display: block; max-width: 100%; height: auto; }
picture { margin: .8rem 0 1.2rem; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
