"""How pictures look: on light and on dark paper, in colours that every kind of colour vision tells apart.

The hues are Okabe and Ito's, darker on light paper and lighter on dark; markers and dashes say the same without colour.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longmem.evaluation.systems import BACKBONE, CONTROL, LONGMEM, MEMORY_OFF, MEMTRM, MEMTRM_OFF, sized

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
SHADES = 256  # colours of a saved picture: enough for a heat map, and the file is a half


@dataclass(frozen=True)
class Theme:
    """Colours of paper, letters, quieter letters and lines; which of a hue's two shades is taken."""

    name: str
    paper: str
    ink: str
    quiet: str
    line: str
    shade: int


LIGHT = Theme("light", "#fcfcfb", "#1d1f21", "#5c6167", "#d9dbdd", 0)
DARK = Theme("dark", "#16181a", "#e7e8e9", "#a9afb4", "#3a3e42", 1)
THEMES = (LIGHT, DARK)

BLUE, ORANGE, GREEN = ("#0072b2", "#56b4e9"), ("#b87400", "#e69f00"), ("#00815c", "#40be91")
RED, PINK, GREY = ("#d55e00", "#ff8a3d"), ("#a8527f", "#e09cc4"), ("#6b7075", "#9aa0a5")
INK = ("#1d1f21", "#e7e8e9")

Look = tuple[tuple[str, str], str, str]
"""Two shades of a hue, marker, dashes."""

LOOKS: dict[str, Look] = {
    BACKBONE: (INK, "o", "-"),
    MEMORY_OFF: (ORANGE, "s", "--"),
    CONTROL: (GREEN, "^", "-."),
    LONGMEM: (BLUE, "D", "-"),
    MEMTRM: (RED, "<", "-"),
    MEMTRM_OFF: (RED, "s", ":"),
    "memory_once": (PINK, "v", "-."),
    "training_free": (PINK, ">", "-."),
    "full": (GREY, "P", ":"),
}
SERIES: tuple[Look, ...] = tuple(
    LOOKS[name] for name in (LONGMEM, MEMTRM, CONTROL, MEMORY_OFF, "training_free", "full")
)

Draw = Callable[[Theme], "Figure"]
"""Makes the same picture on either paper."""


def look(name: str, number: int = 0) -> Look:
    """Of a system by its name; ``number`` for a name that says nothing."""
    kind = name if (memory := sized(name)) is None else memory[0]
    if kind.startswith("training_free"):
        kind = "training_free"
    return LOOKS.get(kind) or SERIES[number % len(SERIES)]


def line_style(theme: Theme, given: Look) -> dict[str, Any]:
    """Arguments of ``Axes.plot``."""
    hue, marker, dashes = given
    return {"color": hue[theme.shade], "marker": marker, "linestyle": dashes, "markersize": 5, "linewidth": 1.6}


@contextmanager
def styled(theme: Theme) -> Iterator[None]:
    """While open, new figures have the theme's colours."""
    import matplotlib

    settings: Any = {
        "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "axes.edgecolor": theme.quiet,
        "xtick.color": theme.quiet,
        "ytick.color": theme.quiet,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "grid.color": theme.line,
        "axes.titlesize": 10.5,
        "font.size": 9.5,
    }
    with matplotlib.rc_context(settings):
        yield


def panels(
    columns: int, *, rows: int = 1, width: float = 4.2, height: float = 3.2, share: bool = False
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of axes with a quiet grid, with ``share`` in one scale; call it within ``styled``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5.6, width * columns), height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes: list[list[Axes]] = figure.subplots(rows, columns, squeeze=False, sharey="row" if share else False).tolist()
    for axis in (axis for row in axes for axis in row):
        axis.grid(True, linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def legend(figure: Figure, axes: Sequence[Axes], columns: int = 3) -> None:
    """One legend below for all axes, each label once."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        figure.legend(
            list(found.values()), list(found), loc="outside lower center", ncols=min(columns, len(found)), frameon=False
        )


def tokens_axis(axis: Axes, label: str, at: Sequence[float]) -> None:
    """Powers of two along the bottom, with a tick at every value measured, or at some of many."""
    axis.set_xscale("log", base=2)
    axis.set_xlabel(label)
    shown = sorted(set(at))
    shown = shown[:: -(-len(shown) // 9)] if len(shown) > 9 else shown
    if shown:
        axis.set_xticks(shown, [short(value) for value in shown])
        axis.xaxis.minorticks_off()


def log_heights(axis: Axes) -> None:
    """A logarithmic scale upwards, ticks at 1, 2, 5, 10, ... written out; more of them where it is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    # two labels alone would be read as a linear scale
    subs = (1, 2, 5) if high / low > 10 else (1, 1.5, 2, 3, 4, 5, 7)
    axis.yaxis.set_major_locator(LogLocator(base=10, subs=subs))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def short(tokens: float) -> str:
    """65,536 is 64k."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:g}"


def picture(draw: Draw, theme: Theme) -> bytes:
    """PNG of a figure on this paper."""
    from PIL import Image

    raw, small = io.BytesIO(), io.BytesIO()
    with styled(theme):
        draw(theme).savefig(raw, format="png", dpi=DPI)
    raw.seek(0)
    with Image.open(raw) as image:
        image.convert("RGB").quantize(SHADES, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            small, format="PNG", optimize=True
        )
    return small.getvalue()


def save(draw: Draw, path: Path) -> list[Path]:
    """``name.png`` on light paper and ``name-dark.png`` on dark; returns both."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path, path.with_stem(f"{path.stem}-dark")]
    for file, theme in zip(files, THEMES, strict=True):
        file.write_bytes(picture(draw, theme))
    return files
