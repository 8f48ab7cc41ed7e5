"""The pictures of results, from the JSON as it is in the files: for ``--out`` folders, for pages and for the docs.

Hues are Okabe and Ito's, told apart by every kind of colour vision and read on light and on dark paper; markers and
dashes say the same without colour.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from longmem.evaluation.results import Json
from longmem.evaluation.systems import BACKBONE, CONTROL, LONGMEM, MEMORY_OFF, MEMTRM, MEMTRM_OFF, largest, sized
from longmem.evaluation.tables import farthest, kind_of, protocol_title, recommended

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#848b93"
LOOKS = {
    BACKBONE: (INK, "o", "-"),
    MEMORY_OFF: ("#d98b00", "s", "--"),
    CONTROL: ("#14a077", "^", "-."),
    LONGMEM: ("#2f8bd0", "D", "-"),
    MEMTRM: ("#e0602a", "<", "-"),
    MEMTRM_OFF: ("#e0602a", "s", ":"),
    "training_free": ("#c272a4", ">", "-."),
}
"""Colour, marker and dashes of a system or a kind of memory."""
FEWEST_TOKENS = 1000  # a position bin with fewer is noise and is not drawn
NEEDLE = re.compile(r"(.+), ([\d,]+) tokens, depth ([\d.]+) %")


class Picture(NamedTuple):
    """Drawn in colours that can be read on light and on dark paper; ``name`` is its file's, without a suffix."""

    name: str
    alt: str
    figure: Figure

    def svg(self) -> str:
        """On transparent paper."""
        import matplotlib

        written = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            self.figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
        return written.getvalue()


def pictures_of(result: Json, name: str = "") -> Iterator[Picture]:
    """All pictures of a result; ``name`` begins the names of their files."""
    kind = kind_of(result)
    if kind == "perplexity":
        alt = "perplexity by position in the document"
        yield Picture(f"{name}perplexity-by-position", alt, position_figure(result))
        if any(map(sized, result["systems"])):
            yield Picture(f"{name}perplexity-by-memory-size", "perplexity by memory size", memory_figure(result))
    elif kind == "layers":
        yield Picture(f"{name}layers", "what the heads of each layer find", layers_figure(result))
    elif kind == "task" and result["header"]["task"] == "needle":
        for metric in result["metrics"]:
            alt = f"{metric['label']} by depth and length"
            yield Picture(f"{name}needle-{metric['name']}", alt, needle_figure(result, metric))


def plot_all(result: Json, folder: Path) -> list[Path]:
    """Write every picture of a result as PNG, on white; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for picture in pictures_of(result):
        written.append(folder / f"{picture.name}.png")
        picture.figure.savefig(written[-1], dpi=150)
    return written


def position_figure(result: Json) -> Figure:
    """Above: perplexity by position in the document. Below: the same in % of the backbone's, where small gains show."""
    protocols, systems = result["protocols"].values(), result["systems"]
    figure, axes = panels(len(protocols), rows=2)
    for column, scores in enumerate(protocols):
        every = scores["all"]["by_position"]
        bins = [one for one in every if one["tokens"] >= FEWEST_TOKENS] or every
        middles = [max((one["low"] * one["high"]) ** 0.5, one["high"] / 2) for one in bins]
        for row, number in enumerate(("perplexity", "percent")):
            for name in largest(systems):
                axes[row][column].plot(middles, [one[number][name] for one in bins], label=systems[name], **look(name))
            tokens_axis(axes[row][column], "position in the document (tokens)", [one["high"] for one in bins])
        axes[0][column].set_title(protocol_title(scores))
    axes[0][0].set_ylabel("perplexity per token")
    axes[1][0].set_ylabel("% against the backbone")
    return legend(figure)


def memory_figure(result: Json) -> Figure:
    """% against the backbone by memory size, with intervals; the systems without memory as lines."""
    kinds: dict[str, list[int]] = {}
    for kind, size in filter(None, map(sized, result["systems"])):
        kinds.setdefault(kind, []).append(size)
    figure, (axes,) = panels(len(result["protocols"]))
    for axis, scores in zip(axes, result["protocols"].values(), strict=True):
        gaps = {d["system"]: d for d in scores["all"]["differences"] if d["against"] == BACKBONE}
        for kind, sizes in kinds.items():
            found = [gaps[f"{kind}_{size}"] for size in sizes]
            label = result["systems"][f"{kind}_{sizes[0]}"].split(",")[0]
            axis.plot(sizes, [gap["percent"] for gap in found], label=label, **look(kind))
            for size, gap in zip(sizes, found, strict=True):
                if edges := gap["documents"] or gap["blocks"]:
                    axis.vlines(size, edges["low"], edges["high"], color=look(kind)["color"], linewidth=1)
        for name, label in result["systems"].items():
            if sized(name) is None:
                level = gaps[name]["percent"] if name in gaps else 0.0
                axis.axhline(level, label=label, linewidth=1.4, **{k: look(name)[k] for k in ("color", "linestyle")})
        axis.set_title(protocol_title(scores))
        tokens_axis(axis, "memory (tokens)", [size for sizes in kinds.values() for size in sizes])
    axes[0].set_ylabel("% against the backbone")
    return legend(figure)


def needle_figure(result: Json, metric: Json) -> Figure:
    """Depth against length, a map for each system and kind of needle, all in one scale."""
    cells: dict[tuple[str, str], dict[tuple[int, float], float]] = {}
    for group in result["groups"]:
        if where := NEEDLE.fullmatch(group["group"]):
            place = (int(where[2].replace(",", "")), float(where[3]))
            for score in group["scores"]:
                if score["metric"] == metric["name"]:
                    cells.setdefault((where[1], score["system"]), {})[place] = score["value"]
    columns = min(3, len(cells))
    figure, axes = panels(columns, rows=-(-len(cells) // columns))
    flat = [axis for row in axes for axis in row]
    for axis, ((kind, system), values) in zip(flat, cells.items(), strict=False):
        lengths, depths = sorted({length for length, _ in values}), sorted({depth for _, depth in values})
        grid = [[values[length, depth] for length in lengths] for depth in depths]
        heat_map(axis, grid, [short(length) for length in lengths], [f"{depth:g} %" for depth in depths])
        axis.set_title(f"{result['systems'][system]}\n{kind}", fontsize=9)
    for axis in flat[len(cells) :]:
        axis.set_visible(False)
    figure.suptitle(metric["label"] + " (%), depth by length", fontsize=10, color=INK)
    return figure


def layers_figure(result: Json) -> Figure:
    """Recall of every head, layers from bottom to top, at the greatest distance of each source."""
    layers, far = sorted(result["scores"], key=int), farthest(result)
    figure, (axes,) = panels(len(far), height=max(3.0, 0.22 * len(layers) + 1.2))
    for axis, ranks in zip(axes, far.values(), strict=True):
        widest = max(len(row) for row in ranks["recall"].values())
        rows = [[100 * value for value in ranks["recall"][layer]] for layer in layers]
        rows = [row + [float("nan")] * (widest - len(row)) for row in rows]
        names = [f"▸ {layer}" if int(layer) in recommended(result) else str(layer) for layer in layers]
        heat_map(axis, rows, [str(head) for head in range(widest)], names)
        axis.invert_yaxis()
        axis.set_title(f"{ranks['source']}, {ranks['distance']} tokens apart: right chunk found (%)", fontsize=9)
        axis.set_xlabel("head")
    axes[0].set_ylabel("layer")
    return figure


def heat_map(axis: Axes, grid: Sequence[Sequence[float]], columns: Sequence[str], rows: Sequence[str]) -> None:
    """0 to 100 in viridis, every cell with its number."""
    axis.imshow(grid, cmap="viridis", vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    axis.grid(False)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    for i, line in enumerate(grid):
        for j, value in enumerate(line):
            if value == value:  # not NaN
                colour = "#1d1f21" if value > 60 else "#f4f4f4"
                axis.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=7)


def panels(columns: int, *, rows: int = 1, height: float = 3.3) -> tuple[Figure, list[list[Axes]]]:
    """A figure of axes with a quiet grid, rows in one scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5.6, 4.6 * columns), height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes: list[list[Axes]] = figure.subplots(rows, columns, squeeze=False, sharey="row").tolist()
    for axis in (axis for row in axes for axis in row):
        axis.patch.set_alpha(0)
        axis.grid(True, linewidth=0.7, alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["bottom", "left"]].set_color(INK)
        axis.tick_params(colors=INK, labelsize=9)
        for label in (axis.title, axis.xaxis.label, axis.yaxis.label):
            label.set(color=INK, fontsize=10)
    return figure, axes


def look(name: str) -> dict[str, Any]:
    """Arguments of ``Axes.plot`` for a system or a kind of memory."""
    kind = "training_free" if name.startswith("training_free") else (sized(name) or (name,))[0]
    colour, marker, dashes = LOOKS[kind]
    return {"color": colour, "marker": marker, "linestyle": dashes, "markersize": 5, "linewidth": 1.6}


def legend(figure: Figure) -> Figure:
    """One legend below for all axes, each label once."""
    found: dict[str, Any] = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= {label: one for label, one in zip(labels, handles, strict=True) if label not in found}
    figure.legend(found.values(), found, loc="outside lower center", ncols=3, frameon=False, labelcolor=INK)
    return figure


def tokens_axis(axis: Axes, label: str, at: Sequence[float]) -> None:
    """Powers of two along the bottom, with a tick at every value measured, or at some of many."""
    shown = sorted(set(at))
    shown = shown[:: -(-len(shown) // 9) or 1]
    axis.set_xscale("log", base=2)
    axis.set_xlabel(label)
    axis.set_xticks(shown, [short(tokens) for tokens in shown])
    axis.xaxis.minorticks_off()


def short(tokens: float) -> str:
    """65,536 is 64k."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:g}"
