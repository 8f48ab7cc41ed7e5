"""Curves of perplexity and bars of tasks, from the JSON as it is in the file."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from longmem.evaluation.systems import BACKBONE, sized
from longmem.evaluation.themes import Theme, legend, line_style, look, panels, short, tokens_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEWEST_TOKENS = 1000  # a position bin with fewer is noise and is not drawn
MOST_GROUPS = 8  # more panels than this are not read
NEEDLE = re.compile(r"(.+), ([\d,]+) tokens, depth ([\d.]+) %")


def largest(systems: dict[str, str]) -> list[str]:
    """Systems without those memories of which there is a larger one."""
    most: dict[str, int] = {}
    for name in systems:
        if (memory := sized(name)) is not None:
            most[memory[0]] = max(most.get(memory[0], 0), memory[1])
    return [name for name in systems if (memory := sized(name)) is None or most[memory[0]] == memory[1]]


def position_figure(result: dict[str, Any], theme: Theme) -> Figure:
    """% of perplexity against the backbone by position in the document; of each kind of memory the largest."""
    figure, (axes,) = panels(len(result["protocols"]), width=4.6, height=3.5, share=True)
    for axis, (protocol, scores) in zip(axes, result["protocols"].items(), strict=True):
        every = scores["all"]["by_position"]
        bins = [one for one in every if one["tokens"] >= FEWEST_TOKENS] or every
        where = [max((one["low"] * one["high"]) ** 0.5, one["high"] / 2) for one in bins]
        for number, name in enumerate(largest(result["systems"])):
            axis.plot(
                where,
                [one["percent"][name] for one in bins],
                label=result["systems"][name],
                **line_style(theme, look(name, number)),
            )
        axis.set_title(protocol_title(protocol, scores))
        tokens_axis(axis, "position in the document (tokens)", [one["high"] for one in bins])
    axes[0].set_ylabel("perplexity, % against the backbone")
    legend(figure, axes)
    return figure


def memory_figure(result: dict[str, Any], theme: Theme) -> Figure:
    """% of perplexity against the backbone by memory size, 95 % intervals over documents; the others as lines."""
    figure, (axes,) = panels(len(result["protocols"]), width=4.6, height=3.5, share=True)
    kinds: dict[str, list[tuple[int, str]]] = {}
    for name in result["systems"]:
        if (memory := sized(name)) is not None:
            kinds.setdefault(memory[0], []).append((memory[1], name))
    sizes = sorted({size for some in kinds.values() for size, _ in some})
    for axis, (protocol, scores) in zip(axes, result["protocols"].items(), strict=True):
        against = {d["system"]: d for d in scores["all"]["differences"] if d["against"] == BACKBONE}
        for number, (kind, some) in enumerate(kinds.items()):
            here = [(size, against[name]) for size, name in sorted(some) if name in against]
            style = line_style(theme, look(kind, number))
            label = re.sub(r", [\d,]+ tokens.*$", "", result["systems"][some[0][1]])
            middle = [one["percent"] for _, one in here]
            axis.plot([size for size, _ in here], middle, label=label, **style)
            spans = [one["documents"] or one["blocks"] for _, one in here]
            if here and all(spans):
                bars = [
                    [max(0.0, m - span["low"]) for m, span in zip(middle, spans, strict=True)],
                    [max(0.0, span["high"] - m) for m, span in zip(middle, spans, strict=True)],
                ]
                axis.errorbar(
                    [size for size, _ in here], middle, yerr=bars, color=style["color"], capsize=3, linestyle="none"
                )
        for number, (name, label) in enumerate(result["systems"].items()):
            if sized(name) is None:
                style = line_style(theme, look(name, number))
                level = 0.0 if name == BACKBONE else against[name]["percent"]
                axis.axhline(level, color=style["color"], linestyle=style["linestyle"], linewidth=1.4, label=label)
        axis.set_title(protocol_title(protocol, scores))
        tokens_axis(axis, "memory (tokens)", sizes)
    axes[0].set_ylabel("perplexity, % against the backbone")
    legend(figure, axes)
    return figure


def protocol_title(protocol: str, scores: dict[str, Any]) -> str:
    """``sliding window of 256, moved by 128``."""
    if protocol == "segments":
        return f"segments of {scores['window']:,}"
    return f"sliding window of {scores['window']:,}, moved by {scores['stride']:,}"


def groups_figure(result: dict[str, Any], metric: dict[str, Any], theme: Theme) -> Figure:
    """Every system in every group, or in the averages over several where a task has them: mean and interval."""
    averages = [group for group in result["groups"] if group["group"].startswith("average")]
    groups = (averages or result["groups"])[:MOST_GROUPS]
    names = list(result["systems"])
    figure, ((axis,),) = panels(1, width=max(5.6, 0.32 * len(names) * len(groups) + 2.4), height=3.4)
    for number, name in enumerate(names):
        scores = [_score(group, name, metric["name"]) for group in groups]
        shift = (number - (len(names) - 1) / 2) * 0.8 / len(names)
        here = [(at + shift, one) for at, one in enumerate(scores) if one is not None and one["value"] is not None]
        style = line_style(theme, look(name, number)) | {"linestyle": "none"}
        axis.plot([x for x, _ in here], [one["value"] for _, one in here], label=result["systems"][name], **style)
        for x, one in here:
            if one["interval"]:
                axis.vlines(x, one["interval"]["low"], one["interval"]["high"], color=style["color"], linewidth=1.3)
    if metric["chance"] is not None:
        axis.axhline(metric["chance"], color=theme.quiet, linewidth=1, linestyle=":", label="chance")
    axis.set_xticks(range(len(groups)), [group["group"].replace(", ", "\n", 1) for group in groups])
    axis.set_xlim(-0.6, len(groups) - 0.4)
    axis.grid(False, axis="x")
    axis.set_ylabel(metric["label"] + (f" ({metric['unit']})" if metric["unit"] else ""), fontsize=8.5)
    legend(figure, [axis])
    return figure


def _score(group: dict[str, Any], system: str, metric: str) -> dict[str, Any] | None:
    return next((one for one in group["scores"] if (one["system"], one["metric"]) == (system, metric)), None)


def is_needle(result: dict[str, Any]) -> bool:
    """Whether groups are depths and lengths."""
    return sum(bool(NEEDLE.fullmatch(group["group"])) for group in result["groups"]) > 1


def needle_figure(result: dict[str, Any], metric: dict[str, Any], theme: Theme) -> Figure:
    """Depth against length, a map for each system and kind of needle, all in one scale."""
    cells: dict[tuple[str, str], dict[tuple[int, float], float]] = {}
    for group in result["groups"]:
        if (where := NEEDLE.fullmatch(group["group"])) is None:
            continue
        place = (int(where[2].replace(",", "")), float(where[3]))
        for score in group["scores"]:
            if score["metric"] == metric["name"] and score["value"] is not None:
                cells.setdefault((where[1], score["system"]), {})[place] = score["value"]
    columns = min(3, len(cells))
    rows = -(-len(cells) // columns)
    figure, axes = panels(columns, rows=rows, width=3.3, height=2.9)
    flat = [axis for row in axes for axis in row]
    image = None
    for axis, ((kind, system), values) in zip(flat, cells.items(), strict=False):
        lengths, depths = sorted({length for length, _ in values}), sorted({depth for _, depth in values})
        grid = [[values.get((length, depth), float("nan")) for length in lengths] for depth in depths]
        image = axis.imshow(grid, cmap="viridis", vmin=0, vmax=100, aspect="auto", interpolation="nearest")
        axis.grid(False)
        axis.set_xticks(range(len(lengths)), [short(length) for length in lengths])
        axis.set_yticks(range(len(depths)), [f"{depth:g} %" for depth in depths])
        axis.set_title(f"{result['systems'].get(system, system)}\n{kind}", fontsize=9)
        for i, line in enumerate(grid):
            for j, value in enumerate(line):
                if value == value:  # not NaN
                    shade = "#1d1f21" if value > 60 else "#f4f4f4"
                    axis.text(j, i, f"{value:.0f}", ha="center", va="center", color=shade, fontsize=8)
    for axis in flat[len(cells) :]:
        axis.set_visible(False)
    if image is not None:
        figure.colorbar(image, ax=flat, label=metric["label"] + " (%)", shrink=0.8)
    return figure
