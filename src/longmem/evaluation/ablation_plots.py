"""One picture for each axis of an ablation, from the JSON as it is in the file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from longmem.evaluation.themes import BLUE, ORANGE, Look, Theme, legend, line_style, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROTOCOLS: dict[str, Look] = {"sliding": (BLUE, "D", "-"), "segments": (ORANGE, "s", "--")}
NAMES = {"sliding": "sliding window", "segments": "segments"}


def axis_figure(axis: Mapping[str, Any], theme: Theme) -> Figure:
    """% of perplexity against the default, with 95 % intervals over documents, by value."""
    figure, ((on,),) = panels(1, width=max(5.6, 0.95 * len(axis["values"]) + 1.5), height=3.2)
    protocols = list(axis["values"][0]["scores"])
    for number, protocol in enumerate(protocols):
        shift = 0.12 * (number - (len(protocols) - 1) / 2)
        scores = [value["scores"][protocol] for value in axis["values"]]
        middle = [score["percent"] for score in scores]
        spans = [
            score["documents"] or score["blocks"] or {"low": m, "high": m}
            for score, m in zip(scores, middle, strict=True)
        ]
        below = [max(0.0, m - span["low"]) for m, span in zip(middle, spans, strict=True)]
        above = [max(0.0, span["high"] - m) for m, span in zip(middle, spans, strict=True)]
        style = line_style(theme, PROTOCOLS.get(protocol, PROTOCOLS["sliding"]))
        if not _ordered(axis):
            style["linestyle"] = "none"
        where = [at + shift for at in range(len(middle))]
        on.plot(where, middle, label=NAMES.get(protocol, protocol), **style)
        on.errorbar(
            where, middle, yerr=[below, above], color=style["color"], capsize=3, linestyle="none", linewidth=1.2
        )
    on.axhline(0, color=theme.quiet, linewidth=1)
    on.set_xticks(range(len(axis["values"])), [_tick(value) for value in axis["values"]])
    on.set_xlim(-0.6, len(axis["values"]) - 0.4)
    on.set_xlabel(axis["label"])
    on.set_ylabel("% against the default")
    legend(figure, [on])
    return figure


def _tick(value: Mapping[str, Any]) -> str:
    return f"{value['value']}\n(default)" if value["default"] and value["value"] != "default" else str(value["value"])


def _ordered(axis: Mapping[str, Any]) -> bool:
    """Whether the values are numbers, between which a line means something."""
    said = [str(value["value"]).replace(",", "") for value in axis["values"]]
    return all(one.replace(".", "", 1).isdecimal() for one in said)
