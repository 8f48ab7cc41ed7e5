"""Pictures of an efficiency result, from the JSON as it is in the file: time and memory against the context."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longmem.evaluation.efficiency_names import FULL, LONGMEM, SHORT, WINDOWED
from longmem.evaluation.themes import BLUE, GREY, INK, Look, Theme, legend, line_style, log_heights, panels, tokens_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOOKS: dict[str, Look] = {LONGMEM: (BLUE, "D", "-"), FULL: (INK, "o", "--"), WINDOWED: (GREY, "s", ":")}
MIB = 1 << 20


def efficiency_figure(result: dict[str, Any], theme: Theme) -> Figure:
    """Three panels: until the first token, for each further token, peak memory beyond the weights; least to most."""
    wanted = [("time to first token (s)", "first_token", 1.0), ("time per new token (ms)", "per_token", 1e3)]
    if any(point["peak"] for point in result["points"]):
        wanted.append(("peak memory beyond weights (MiB)", "peak", 1.0))
    figure, (axes,) = panels(len(wanted), width=3.7, height=3.5)
    contexts = sorted({point["context"] for point in result["points"]})
    for axis, (title, field, scale) in zip(axes, wanted, strict=True):
        for system in result["systems"]:
            points = [point for point in result["points"] if point["system"] == system and point[field]]
            if not points:
                continue
            style = line_style(theme, LOOKS.get(system, LOOKS[WINDOWED]))
            where = [point["context"] for point in points]
            middle = [_middle(point, field) * scale for point in points]
            axis.plot(where, middle, label=SHORT.get(system, system), **style)
            if field != "peak":
                low, high = ([point[field][side] * scale for point in points] for side in ("low", "high"))
                axis.fill_between(where, low, high, color=style["color"], alpha=0.18, linewidth=0)
        log_heights(axis)
        axis.set_title(title)
        tokens_axis(axis, "context (tokens)", contexts)
    legend(figure, axes)
    return figure


def _middle(point: dict[str, Any], field: str) -> float:
    if field == "peak":
        return max(float(point["peak"]["beyond"]), 1.0) / MIB
    return float(point[field]["median"])
