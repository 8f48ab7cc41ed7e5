"""A passage as a picture: its tokens shaded by the share given to memory, and what three of them found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longmem.demo.reading import Passage, TokenReading

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 84
"""Characters per line."""
EXAMPLES = 3
COLOUR = "#56B4E9"
INK, QUIET = "#1d1f21", "#5c6167"


def save_picture(passage: Passage, path: Path) -> None:
    """Write a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = list(_lines(passage))
    examples = _examples(passage)
    rows = len(lines) + 4 + sum(2 + len(_snippets(passage, token)) for _, token in examples)
    figure = Figure(figsize=(9, 0.21 * rows + 0.3), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.96))
    axes.set(xlim=(0, WIDTH + 22), ylim=(rows, -0.5))
    axes.axis("off")
    _write(
        axes, 0, 0, "What each token found in memory: darker = larger share given to memory", weight="bold", mono=False
    )
    where = f"{passage.file}; {passage.memory_tokens:,} tokens of the same text before it in memory"
    _write(axes, 0, 1, where, colour=QUIET, mono=False)
    shares = [token.share for token in passage.tokens]
    low, spread = min(shares), (max(shares) - min(shares)) or 1.0
    for row, line in enumerate(lines, 3):
        for column, text, share in line:
            _shade(axes, column, row, len(text), 0.05 + 0.9 * (share - low) / spread)
        _write(axes, 0, row, "".join(text for _, text, _ in line))
    at = len(lines) + 4
    for number, token in examples:
        following = passage.tokens[number + 1].text
        head = (
            f"after {_visible(token.text)} (share {token.share:.0%}); next: {_visible(following)}, "
            f"{token.next_with:.0%} with memory, {token.next_without:.0%} without. Found:"
        )
        _write(axes, 0, at, head, mono=False)
        for part, before, text, after in _snippets(passage, token):
            at += 1
            _write(axes, 2, at, f"{part:5.1%}", colour=QUIET)
            _shade(axes, 10 + len(before), at, len(text), 0.6)
            _write(axes, 10, at, before + text + after)
        at += 2
    figure.savefig(path)


def _lines(passage: Passage) -> Iterator[list[tuple[int, str, float]]]:
    """The passage cut into lines of (column, text, share)."""
    line: list[tuple[int, str, float]] = []
    column = 0
    for token in passage.tokens:
        for number, piece in enumerate(token.text.expandtabs(4).split("\n")):
            if number:
                yield line
                line, column = [], 0
            while column + len(piece) > WIDTH:
                room = WIDTH - column
                line.append((column, piece[:room], token.share))
                yield line
                piece, line, column = piece[room:], [], 0
            if piece:
                line.append((column, piece, token.share))
                column += len(piece)
    if line:
        yield line


def _examples(passage: Passage) -> list[tuple[int, TokenReading]]:
    """The tokens whose next one memory made most likely, in reading order."""
    tokens = list(enumerate(passage.tokens[:-1]))
    helped = sorted(tokens, key=lambda pair: pair[1].next_without - pair[1].next_with)
    return sorted(helped[:EXAMPLES])


def _snippets(passage: Passage, token: TokenReading) -> list[tuple[float, str, str, str]]:
    """Part of the share, and one line of text around each of the first chunks."""
    shown = []
    for number, part in token.found[:3]:
        chunk = passage.chunks[number]
        before, text, after = _flat(chunk.before)[-28:], _flat(chunk.text), _flat(chunk.after)
        shown.append((part, before, text, after[: max(0, WIDTH + 10 - len(before) - len(text))]))
    return shown


def _shade(axes: Axes, column: int, row: int, length: int, alpha: float) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((column, row - 0.5), length, 1, facecolor=COLOUR, alpha=alpha, linewidth=0))


def _write(
    axes: Axes, column: float, row: float, text: str, *, colour: str = INK, weight: str = "normal", mono: bool = True
) -> None:
    """Monospaced text is set sign by sign, so that it stays in its cells whatever the font."""
    style: dict[str, Any] = {"color": colour, "fontsize": 8.5, "va": "center", "weight": weight, "parse_math": False}
    if not mono:
        axes.text(column, row, text, **style)
        return
    for offset, sign in enumerate(text):
        if not sign.isspace():
            axes.text(column + offset + 0.5, row, sign, ha="center", family="monospace", **style)


def _visible(text: str) -> str:
    return "“" + text.replace("\n", "↵").replace(" ", "␣") + "”"


def _flat(text: str) -> str:
    return " ".join(text.split("\n")).replace("\t", " ")
