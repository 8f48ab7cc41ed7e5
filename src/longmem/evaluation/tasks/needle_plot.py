"""Heat maps of a needle result: depth against length, one for each system and kind of fact.

The colours are viridis, which grows evenly brighter for every kind of colour vision; every cell also says its number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longmem.evaluation.runner import TaskResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROUP = re.compile(r"(?P<kind>\w+), (?P<length>[\d,]+) tokens, depth (?P<depth>[\d.]+) %")
COLOURS = "viridis"


@dataclass(frozen=True)
class Cell:
    """One kind at one length and depth, for one system."""

    kind: str
    length: int
    depth: float
    system: str
    value: float


def cells(result: TaskResult, metric: str) -> list[Cell]:
    """Every cell of every system's map."""
    found = []
    for group in result.groups:
        named = GROUP.fullmatch(group.group)
        if named is None:
            continue
        length, depth = int(named["length"].replace(",", "")), float(named["depth"])
        found += [
            Cell(named["kind"], length, depth, system, group.score(system, metric).value) for system in result.systems
        ]
    return found


def plot_needle(result: TaskResult, folder: Path) -> list[Path]:
    """Write a heat map of every metric; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for metric in result.metrics:
        path = folder / f"needle-{metric.name}.png"
        heat_map(result, metric.name).savefig(path, dpi=150)
        written.append(path)
    return written


def heat_map(result: TaskResult, metric: str) -> Figure:
    """Systems side by side, kinds one below the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = cells(result, metric)
    kinds = list(dict.fromkeys(cell.kind for cell in found))
    lengths, depths = sorted({cell.length for cell in found}), sorted({cell.depth for cell in found})
    size = (1.6 + len(result.systems) * max(2.2, 0.62 * len(lengths)), 1.3 + len(kinds) * (0.6 + 0.34 * len(depths)))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes: list[list[Axes]] = figure.subplots(
        len(kinds), len(result.systems), squeeze=False, sharex=True, sharey=True
    ).tolist()
    image = None
    for row, kind in enumerate(kinds):
        for column, (system, label) in enumerate(result.systems.items()):
            axis = axes[row][column]
            value = {(c.depth, c.length): c.value for c in found if (c.kind, c.system) == (kind, system)}
            table = [[value[depth, length] for length in lengths] for depth in depths]
            image = axis.imshow(table, vmin=0, vmax=100, cmap=COLOURS, aspect="auto")
            _numbers(axis, table)
            axis.set_xticks(range(len(lengths)), [short(length) for length in lengths])
            axis.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
            if row == 0:
                axis.set_title(label.replace(", ", "\n", 1), fontsize=9)
            if column == 0:
                axis.set_ylabel(f"{kind}\ndepth (%)")
            if row == len(kinds) - 1:
                axis.set_xlabel("length (tokens)")
    assert image is not None
    label = next(m.label for m in result.metrics if m.name == metric)
    figure.colorbar(image, ax=[axis for row in axes for axis in row], label=f"{label} (%)", shrink=0.9)
    return figure


def _numbers(axis: Axes, table: list[list[float]]) -> None:
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            # viridis is dark below and bright above the middle
            axis.text(
                x, y, f"{value:.0f}", ha="center", va="center", fontsize=8, color="black" if value > 55 else "white"
            )


def short(tokens: int) -> str:
    """``65536`` -> ``64k``."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if tokens >= size:
            return f"{tokens / size:g}{unit}"
    return str(tokens)
