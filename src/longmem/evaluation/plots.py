"""Curves of a perplexity result as PNG: against the position in the document, and against memory size.

Colours are Okabe and Ito's, told apart by every kind of colour vision; markers and dashes say the same without colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longmem.evaluation.perplexity import PerplexityResult
from longmem.evaluation.scores import ProtocolScores
from longmem.evaluation.systems import BACKBONE, CONTROL, LONGMEM, MEMORY_OFF, MEMTRM, MEMTRM_OFF, sized

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIXED = {
    BACKBONE: ("#000000", "o", "-"),
    MEMORY_OFF: ("#E69F00", "s", "--"),
    CONTROL: ("#009E73", "^", "-."),
    MEMTRM_OFF: ("#777777", "s", ":"),
}
MEMORY_COLOURS = ("#56B4E9", "#0072B2", "#CC79A7", "#D55E00", "#F0E442")
MEMORY_MARKERS = ("v", "D", "P", "X", "*")
FEWEST_TOKENS = 1000  # a position bin with fewer is noise and is not drawn


def plot_all(result: PerplexityResult, folder: Path) -> list[Path]:
    """Write every curve the result has; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [_save(position_figure(result), folder / "perplexity-by-position.png")]
    if memory_sizes(result):
        written.append(_save(memory_figure(result), folder / "perplexity-by-memory-size.png"))
    return written


def memory_sizes(result: PerplexityResult) -> list[int]:
    """Of all systems with memory."""
    return sorted({memory[1] for name in result.systems if (memory := sized(name)) is not None})


def memory_kinds(result: PerplexityResult) -> list[str]:
    """``memory`` for LongMem, ``memtrm``, ``training_free_0.1``: the kinds of memory that are there."""
    return list(dict.fromkeys(memory[0] for name in result.systems if (memory := sized(name)) is not None))


def position_figure(result: PerplexityResult) -> Figure:
    """Above: perplexity by tokens read so far. Below: the same in % of the backbone's, where small gains show."""
    figure, axes = _grid(rows=2, columns=len(result.protocols), height=6.4)
    for column, scores in enumerate(result.protocols.values()):
        bins = [b for b in scores.all.by_position if b.tokens >= FEWEST_TOKENS] or scores.all.by_position
        middles = [max((b.low * b.high) ** 0.5, b.high / 2) for b in bins]
        for name, label in result.systems.items():
            style = _style(name, result)
            axes[0][column].plot(middles, [b.perplexity[name] for b in bins], label=label, **style)
            axes[1][column].plot(middles, [b.percent[name] for b in bins], label=label, **style)
        axes[0][column].set_title(_title(scores))
        axes[1][column].set_xlabel("position in the document (tokens)")
        for row in (0, 1):
            axes[row][column].set_xscale("log", base=2)
            axes[row][column].xaxis.set_major_formatter(lambda value, _: _short(value))
    axes[0][0].set_ylabel("perplexity per token")
    axes[1][0].set_ylabel("% against the backbone")
    return _finish(figure, axes[0][0])


def memory_figure(result: PerplexityResult) -> Figure:
    """% against the backbone by memory size, intervals over documents; the systems without memory as lines."""
    figure, axes = _grid(rows=1, columns=len(result.protocols), height=4.0)
    for column, scores in enumerate(result.protocols.values()):
        axis = axes[0][column]
        for kind in memory_kinds(result):
            _draw_kind(axis, kind, result, scores)
        for name, label in result.systems.items():
            if name in FIXED:
                other = scores.all.difference(name, BACKBONE)
                colour, _, dashes = FIXED[name]
                axis.axhline(other.percent if other else 0.0, color=colour, linestyle=dashes, label=label)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: _short(value))
        axis.set_xlabel("memory (tokens)")
        axis.set_title(_title(scores))
    axes[0][0].set_ylabel("perplexity, % against the backbone")
    return _finish(figure, axes[0][0])


def _draw_kind(axis: Axes, kind: str, result: PerplexityResult, scores: ProtocolScores) -> None:
    """One kind of memory: its sizes, and intervals where every size has one."""
    sizes = [size for size in memory_sizes(result) if f"{kind}_{size}" in result.systems]
    found = [scores.all.difference(f"{kind}_{size}", BACKBONE) for size in sizes]
    differences = [difference for difference in found if difference is not None]
    middle = [difference.percent for difference in differences]
    intervals = [difference.documents or difference.blocks for difference in differences]
    colour, marker, dashes = _kind_style(kind, result)
    label = "LongMem" if kind == LONGMEM else result.systems[f"{kind}_{sizes[0]}"].split(",")[0]
    axis.plot(sizes, middle, color=colour, marker=marker, linestyle=dashes, label=label)
    if all(interval is not None for interval in intervals):
        low, high = ([getattr(interval, side) for interval in intervals] for side in ("low", "high"))
        axis.errorbar(sizes, middle, yerr=_bars(middle, low, high), color=colour, capsize=3, linestyle="none")


def _kind_style(kind: str, result: PerplexityResult) -> tuple[str, str, str]:
    others = [other for other in memory_kinds(result) if other not in (LONGMEM, MEMTRM)]
    if kind == LONGMEM:
        return MEMORY_COLOURS[1], "D", "-"
    if kind == MEMTRM:
        return MEMORY_COLOURS[3], "<", ":"
    i = others.index(kind)
    return MEMORY_COLOURS[(2, 0, 4)[i % 3]], ">", "-."


def _bars(middle: Sequence[float], low: Sequence[float], high: Sequence[float]) -> list[list[float]]:
    """Lengths below and above; a percentile interval need not contain its estimate."""
    below = [max(0.0, m - edge) for m, edge in zip(middle, low, strict=True)]
    return [below, [max(0.0, edge - m) for m, edge in zip(middle, high, strict=True)]]


def _grid(rows: int, columns: int, height: float) -> tuple[Figure, list[list[Axes]]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes: list[list[Axes]] = figure.subplots(rows, columns, squeeze=False, sharex="col", sharey="row").tolist()
    for axis in (axis for row in axes for axis in row):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finish(figure: Figure, labelled: Axes) -> Figure:
    handles, labels = labelled.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False)
    return figure


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path


def _style(name: str, result: PerplexityResult) -> dict[str, Any]:
    memory = sized(name)
    if memory is None:
        colour, marker, dashes = FIXED[name]
    else:
        # a colour for each size; another kind of memory than LongMem's has its own dashes and marker
        kind, size = memory
        i = memory_sizes(result).index(size) % len(MEMORY_COLOURS)
        _, marker, dashes = _kind_style(kind, result)
        colour, marker = MEMORY_COLOURS[i], MEMORY_MARKERS[i] if kind == LONGMEM else marker
    return {"color": colour, "marker": marker, "linestyle": dashes, "markersize": 4}


def _title(scores: ProtocolScores) -> str:
    how = "segments" if scores.protocol == "segments" else f"sliding window, stride {scores.stride}"
    return f"{how} (window {scores.window})"


def _short(tokens: float) -> str:
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if tokens >= size:
            return f"{tokens / size:g}{unit}"
    return f"{tokens:g}"
