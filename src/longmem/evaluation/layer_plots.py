"""Heat map of ``longmem layers``: what every head of every layer finds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from longmem.evaluation.layers import LayerReport, Ranks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_layers(report: LayerReport, path: Path) -> Path:
    """Write the heat map as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    heat_map(report).savefig(path, dpi=150)
    return path


def heat_map(report: LayerReport) -> Figure:
    """Recall above and rank below, layers from bottom to top, at the greatest distance of each source."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    sources = report.farthest()
    layers = sorted(report.scores)
    height = max(3.0, 0.22 * len(layers) + 1.2)
    figure = Figure(figsize=(5.6 * len(sources), 2 * height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(sources), squeeze=False, sharey=True)
    for column, ranks in enumerate(sources):
        recall = axes[0][column].imshow(_grid(ranks.recall, layers), cmap="viridis", vmin=0, vmax=1, **_SHAPE)
        rank = axes[1][column].imshow(
            _grid(ranks.rank, layers), cmap="viridis_r", norm=LogNorm(1, max(2, ranks.distance / 2)), **_SHAPE
        )
        axes[0][column].set_title(_title(ranks))
        figure.colorbar(recall, ax=axes[0][column], label=f"right chunk found (chance {ranks.chance:.2f})")
        figure.colorbar(rank, ax=axes[1][column], label=f"median rank of {ranks.distance} keys")
        axes[1][column].set_xlabel("head")
    for axis in (row[0] for row in axes):
        axis.set_ylabel("layer")
        axis.set_yticks(range(len(layers)), [_label(report, layer) for layer in layers], fontsize=7)
    return figure


_SHAPE = {"aspect": "auto", "origin": "lower", "interpolation": "nearest"}


def _grid(values: dict[int, list[float]], layers: list[int]) -> list[list[float]]:
    """Layers by heads; layers with fewer heads are filled with NaN."""
    widest = max(len(row) for row in values.values())
    return [values[layer] + [float("nan")] * (widest - len(values[layer])) for layer in layers]


def _label(report: LayerReport, layer: int) -> str:
    return f"▸ {layer}" if layer == report.recommended else str(layer)


def _title(ranks: Ranks) -> str:
    what = "text" if ranks.source == "text" else "random tokens"
    return f"{what} repeated after {ranks.distance} tokens"
