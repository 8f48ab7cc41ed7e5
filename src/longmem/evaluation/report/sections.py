"""A result file as a part of the page: its tables, pictures, what the paper says, and how it was made."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from longmem.evaluation import paper_numbers as paper
from longmem.evaluation.ablation_plots import axis_figure
from longmem.evaluation.efficiency_plots import efficiency_figure
from longmem.evaluation.report.blocks import Block, Heading, Picture, Table, Text
from longmem.evaluation.report.compare import differs, perplexity_beside, task_beside
from longmem.evaluation.report.files import ResultFile
from longmem.evaluation.report.pictures import (
    groups_figure,
    is_needle,
    largest,
    memory_figure,
    needle_figure,
    position_figure,
    protocol_title,
)
from longmem.evaluation.systems import BACKBONE, sized

MOST_ROWS = 48  # of a table of numbers of a bench, or of groups; the file has the rest
MOST_PARTS = 8  # of a perplexity: more are told in a sentence
MIB = 1 << 20


def section(file: ResultFile) -> list[Block]:
    """Everything about one file; a file that lacks what its kind has raises a plain Python error."""
    return [Heading(3, file.name), *SECTIONS[file.kind](file), *origin(file)]


def origin(file: ResultFile) -> Iterator[Block]:
    """Command, seeds, cost and machine."""
    header = file.header
    if not header:
        around = file.data.get("surroundings", {})
        seed = f"seed {file.data['seed']}; " if "seed" in file.data else ""
        load = around.get("load_average")
        busy = f", load {load[0]}" if load else ""
        where = f"{around.get('machine', '?')}, {around.get('threads', '?')} thread(s){busy}, {around.get('date', '')}"
        where = where if around else "where and when is in the file"
        yield Text(f"`{file.path}`, made by `{file.data['command']}`; {seed}{where}.", quiet=True)
        return
    machine = header.get("machine", {})
    seeds = ", ".join(map(str, header.get("seeds", []))) or "none"
    place = machine.get("gpu") or f"{machine.get('torch_threads', '?')} CPU thread(s)"
    seconds = header.get("seconds", 0) or 0
    cost = f"{seconds:,.0f} s on {place}" if seconds else f"on {place}"
    made = f"`{header['command']}`" if header.get("command") else "a call from Python"
    versions = header.get("versions", {})
    said = f"longmem {versions.get('longmem', '?')}, torch {versions.get('torch', '?')}"
    yield Text(
        f"`{file.path}`, made by {made}; seeds {seeds}; {cost}; {said}; {str(header.get('created', ''))[:10]}.",
        quiet=True,
    )


def _perplexity(file: ResultFile) -> Iterator[Block]:
    result, protocols = file.data, file.data["protocols"]
    counted = result["header"]["samples"]
    heads = [protocol_title(name, scores) for name, scores in protocols.items()]
    rows = []
    for system, label in result["systems"].items():
        cells = []
        for scores in protocols.values():
            value = next(one["perplexity"] for one in scores["all"]["systems"] if one["system"] == system)
            cells.append(f"{value:.3f}" + _against(scores["all"], system, BACKBONE, brackets=True))
        rows.append([label, *cells])
    caption = (
        f"Perplexity per token, {counted['documents']} documents, {counted['tokens']:,} tokens; in brackets % against "
        "the backbone with its 95 % interval over documents, below 0 is better."
    )
    yield Table(["", *heads], rows, caption)
    yield from _pairs(result)
    yield from _parts(result, "groups", "group of documents")
    yield from _parts(result, "by_length", "length of the document (tokens)")
    if any(scores["all"]["by_position"] for scores in protocols.values()):
        yield _picture(file, "by-position", "perplexity by position in the document", position_figure)
    if any(sized(name) for name in result["systems"]):
        yield _picture(file, "by-memory-size", "perplexity by memory size", memory_figure)
    yield from perplexity_beside(file)
    yield from filter(None, [differs(file)])


def _pairs(result: dict[str, Any]) -> Iterator[Block]:
    """The other differences, of each kind of memory at its largest."""
    wanted, chosen = dict[tuple[str, str], None](), largest(result["systems"])
    for scores in result["protocols"].values():
        for one in scores["all"]["differences"]:
            if one["against"] != BACKBONE and one["system"] in chosen:
                wanted[one["system"], one["against"]] = None
    rows = [
        [
            f"{result['systems'][system]}, against {result['systems'][against]}",
            *(_against(scores["all"], system, against) or "-" for scores in result["protocols"].values()),
        ]
        for system, against in wanted
    ]
    if rows:
        heads = [protocol_title(name, scores) for name, scores in result["protocols"].items()]
        yield Table(["% of perplexity", *heads], rows)


def _parts(result: dict[str, Any], field: str, label: str) -> Iterator[Block]:
    """% against the backbone in each group or bucket, under the last protocol, which is the stricter one."""
    name, scores = list(result["protocols"].items())[-1]
    if len(scores[field]) < 2:
        return
    systems = [system for system in largest(result["systems"]) if system != BACKBONE]
    if len(scores[field]) > MOST_PARTS:
        yield Text(_range(result, scores[field], systems, f"{label}, {protocol_title(name, scores)}"))
        return
    rows = [
        [
            f"{part['name']} ({part['documents']})",
            f"{next(one['perplexity'] for one in part['systems'] if one['system'] == BACKBONE):.2f}",
            *(_against(part, system, BACKBONE) or "-" for system in systems),
        ]
        for part in scores[field]
    ]
    heads = ["backbone", *(f"{result['systems'][system]}, %" for system in systems)]
    yield Table([label, *heads], rows, f"By {label.split(' (')[0]}: {protocol_title(name, scores)}.")


def _range(result: dict[str, Any], parts: list[dict[str, Any]], systems: list[str], where: str) -> str:
    """Many parts in a sentence: in how many of them each system lies below the backbone, and how far."""
    said = []
    for system in systems:
        found = [
            d["percent"]
            for part in parts
            for d in part["differences"]
            if (d["system"], d["against"]) == (system, BACKBONE)
        ]
        below = sum(percent < 0 for percent in found)
        said.append(f"{result['systems'][system]} in {below}, by {min(found):+.1f} to {max(found):+.1f} %")
    return f"By {where}: of {len(parts)}, below the backbone are {'; '.join(said)}."


def _against(scores: dict[str, Any], system: str, against: str, *, brackets: bool = False) -> str:
    for one in scores["differences"]:
        if (one["system"], one["against"]) == (system, against):
            said = _signed(one["percent"], one["documents"] or one["blocks"])
            return f" ({said})" if brackets else said
    return ""


def _signed(value: float, edges: dict[str, Any] | None) -> str:
    return f"{value:+.2f}" + ("" if edges is None else f" [{edges['low']:+.2f}, {edges['high']:+.2f}]")


def _task(file: ResultFile) -> Iterator[Block]:
    result = file.data
    for metric in result["metrics"]:
        yield _metric_table(result, metric)
    if result.get("skipped"):
        yield Text("Not asked: " + "; ".join(f"{name} ({why})" for name, why in result["skipped"].items()) + ".")
    first = result["metrics"][0]
    if is_needle(result):
        yield _picture(file, "map", f"{first['label']} by depth and length", partial(_swap, needle_figure, first))
    else:
        yield _picture(file, "groups", f"{first['label']} of every system", partial(_swap, groups_figure, first))
    yield from _differences(result, first)
    yield from task_beside(file)
    yield from filter(None, [differs(file)])


def _metric_table(result: dict[str, Any], metric: dict[str, Any]) -> Table:
    groups = result["groups"][:MOST_ROWS]
    left = len(result["groups"]) - len(groups)
    chance = "" if metric["chance"] is None else f", chance {metric['chance']:.3g}"
    unit = f" in {metric['unit']}" if metric["unit"] else ""
    more = f" {left} more groups are in the file." if left else ""
    caption = f"**{metric['label']}**{unit}, {metric['better']} is better{chance}; 95 % intervals.{more}"
    rows = [
        [
            f"{group['group']} ({group['examples']:,})",
            *(_mean(group, name, metric["name"]) for name in result["systems"]),
        ]
        for group in groups
    ]
    return Table(["group (examples)", *result["systems"].values()], rows, caption)


def _mean(group: dict[str, Any], system: str, metric: str) -> str:
    for one in group["scores"]:
        if (one["system"], one["metric"]) == (system, metric) and one["value"] is not None:
            edges = one["interval"]
            return f"{one['value']:.4g}" + ("" if not edges else f" [{edges['low']:.4g}, {edges['high']:.4g}]")
    return "-"


def _differences(result: dict[str, Any], metric: dict[str, Any]) -> Iterator[Block]:
    """Paired differences over all examples, of the first metric."""
    chosen = largest(result["systems"])
    rows = [
        [
            f"{result['systems'][one['system']]}, against {result['systems'][one['against']]}",
            _signed(one["value"], one["interval"]),
        ]
        for one in result["groups"][0]["differences"]
        if one["metric"] == metric["name"] and one["system"] in chosen and one["value"] is not None
    ]
    if rows:
        yield Table([f"difference, {result['groups'][0]['group']}", metric["label"]], rows)


def _harness(file: ResultFile) -> Iterator[Block]:
    systems = file.data["systems"]
    rows = []
    for task, metrics in file.data["tasks"].items():
        for metric, scores in metrics.items():
            cells = []
            for name in systems:
                score = scores.get(name)
                error = "" if score is None or score["stderr"] is None else f" ± {score['stderr']:.4f}"
                cells.append("-" if score is None else f"{score['value']:.4f}{error}")
            rows.append([f"{task}: {metric}", *cells])
    window = file.config.get("window")
    yield Table(
        ["task: metric", *systems.values()],
        rows,
        f"lm-evaluation-harness, window of {window} tokens, ± standard error.",
    )


def _ablate(file: ResultFile) -> Iterator[Block]:
    result = file.data
    protocols = list(result["protocols"])
    settings = ", ".join(f"{k} {v}" for k, v in result["default"].items() if isinstance(v, int | str))
    counted = result["header"]["samples"]
    yield Text(
        f"Default: {settings}. {counted['documents']} documents, {counted['tokens']:,} tokens; one setting changed "
        "at a time."
    )
    for axis in result["axes"]:
        rows = []
        for value in axis["values"]:
            name = value["value"] + (", default" if value["default"] and value["value"] != "default" else "")
            cells = []
            for protocol in protocols:
                score = value["scores"][protocol]
                span = (
                    "" if value["default"] else f" ({_signed(score['percent'], score['documents'] or score['blocks'])})"
                )
                cells.append(f"{score['perplexity']:.3f}{span}")
            rows.append([name + (f" ({value['differs']})" if value["differs"] else ""), *cells])
        heads = [protocol_title(name, scores) for name, scores in result["protocols"].items()]
        kind = "; each value was trained" if axis["trained"] else ""
        yield Table(
            [axis["label"], *heads],
            rows,
            f"**{axis['label']}**{kind}: perplexity (% against the default, 95 % interval).",
        )
        yield _picture(file, axis["name"], f"perplexity by {axis['label']}", partial(_axis, axis))
        if axis["name"] in paper.ABLATIONS:
            yield Text(paper.ABLATIONS[axis["name"]])
    without = [
        f"{name.replace('_', ' ')} "
        + ", ".join(f"{p} {_signed(s['percent'], s['documents'] or s['blocks'])}" for p, s in scores.items())
        for name, scores in result["without"].items()
    ]
    yield Text("Against the default, in %: " + "; ".join(without) + ".")
    if result["left_out"]:
        yield Text("Left out: " + "; ".join(f"{name} ({why})" for name, why in result["left_out"].items()) + ".")


def _efficiency(file: ResultFile) -> Iterator[Block]:
    result = file.data
    backbone = result["header"]["models"].get("backbone", {})
    size = backbone.get("parameters", 0) / 1e6
    shape = f"{backbone.get('class', 'backbone')}, {size:,.1f}M parameters, {backbone.get('dtype', '')}"
    yield Text(
        f"{shape}; window {result['window']:,} tokens, of which {result['move']:,} move to memory when it is full; "
        f"memory up to {result['memory_size']:,} tokens; attention {result['attention']}. Medians (least to most)."
    )
    rows = [
        [
            f"{point['context']:,}: {result['systems'][point['system']]}",
            _between(point["first_token"], 1, "s"),
            f"{point['read']['median']:,.0f}",
            _between(point["per_token"], 1e3, "ms"),
            f"{point['generated']['median']:,.1f}",
            "-" if not point["peak"] else f"{point['peak']['beyond'] / MIB:,.0f} ({point['peak']['total'] / MIB:,.0f})",
        ]
        for point in result["points"]
    ]
    heads = [
        "context: system",
        "first token",
        "read, tokens/s",
        "per new token",
        "generated, tokens/s",
        "peak MiB beyond weights (in all)",
    ]
    yield Table(heads, rows)
    ratios = [
        [
            f"{one['context']:,}: {result['systems'][one['system']]}",
            _between(one["first_token"], 1, ""),
            _between(one["per_token"], 1, ""),
            "-" if one["peak"] is None else f"{one['peak']:.2f}",
        ]
        for one in result["ratios"]
    ]
    if ratios:
        yield Table(["over LongMem, times", "first token", "per new token", "peak beyond weights"], ratios)
    yield _picture(file, "curves", "time and memory against the context", efficiency_figure)
    if result["left_out"]:
        absent = [f"{one['system']} at {one['context']:,} ({one['reason']})" for one in result["left_out"]]
        yield Text("Left out: " + "; ".join(absent) + ".")
    yield Text(paper.EFFICIENCY)


def _between(spread: dict[str, float], scale: float, unit: str) -> str:
    low, middle, high = (f"{spread[name] * scale:.3g}" for name in ("low", "median", "high"))
    return f"{middle} {unit}".strip() + (f" ({low} to {high})" if spread["rounds"] > 1 else "")


def _layers(file: ResultFile) -> Iterator[Block]:
    result = file.data
    rows = [[layer, f"{score:.3f}", _marks(int(layer), result)] for layer, score in result["scores"].items()]
    yield Table(
        ["layer", "copying score", ""], rows, "How well each layer's keys find what followed an earlier occurrence."
    )


def _marks(layer: int, result: dict[str, Any]) -> str:
    said = [name for name in ("recommended", "default") if result[name] == layer]
    return ", ".join(said)


def _bench(file: ResultFile) -> Iterator[Block]:
    about = ("command", "surroundings", "seed", "rounds")
    lines = [
        line for name, value in file.data.items() if name not in (*about, "shape") for line in _leaves(name, value)
    ]
    more = f"; {len(lines) - MOST_ROWS} more numbers are in the file" if len(lines) > MOST_ROWS else ""
    yield Table(["", "value"], lines[:MOST_ROWS], f"Medians (least to most) where there are rounds{more}.")


def _leaves(name: str, value: Any) -> Iterator[list[str]]:
    """Every number with the path to it; median, least and most are one."""
    if isinstance(value, dict):
        if {"median", "min", "max"} <= value.keys():
            yield [name, f"{_number(value['median'])} ({_number(value['min'])} to {_number(value['max'])})"]
            return
        for key, inner in ((key, inner) for key, inner in value.items() if key not in ("shape", "surroundings")):
            yield from _leaves(f"{name} · {key}", inner)
    elif isinstance(value, list):
        if value and all(isinstance(one, int | float) for one in value) and len(value) <= 4:
            yield [name, f"[{', '.join(_number(one) for one in value)}]"]
        elif value and all(isinstance(one, dict) for one in value):
            for number, one in enumerate(value):
                yield from _leaves(f"{name} · {number}", one)
    elif isinstance(value, int | float | str) and not isinstance(value, bool):
        yield [name, _number(value) if not isinstance(value, str) else value]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"


def _picture(file: ResultFile, what: str, alt: str, draw: Callable[..., Any]) -> Picture:
    name = re.sub(r"[^\w.-]+", "-", f"{file.name}-{file.task}-{what}".replace("/", "-"))
    return Picture(name, f"{file.name}: {alt}", partial(draw, file.data))


def _swap(draw: Callable[..., Any], metric: dict[str, Any], result: dict[str, Any], theme: Any) -> Any:
    return draw(result, metric, theme)


def _axis(axis: dict[str, Any], result: dict[str, Any], theme: Any) -> Any:
    return axis_figure(axis, theme)


SECTIONS: dict[str, Callable[[ResultFile], Iterator[Block]]] = {
    "perplexity": _perplexity,
    "task": _task,
    "harness": _harness,
    "ablate": _ablate,
    "efficiency": _efficiency,
    "layers": _layers,
    "bench": _bench,
}
