"""The tables of results, from the JSON as it is in the files: for the terminal, for pages and for the docs."""

from __future__ import annotations

import json
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import NamedTuple

from longmem.evaluation.results import Json
from longmem.evaluation.systems import BACKBONE, largest

MOST_PARTS = 24  # groups of documents that are shown one by one
FEW_PROJECTS = 5


class Table(NamedTuple):
    """Cells as text; the first column names the rows, numbers in the others are aligned to the right."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


def plain(table: Table, width: int) -> str:
    """The table as text; one that is wider than ``width`` is written row by row, a line for each cell.

    Nothing is ever cut.
    """
    caption = textwrap.fill(re.sub(r"[`*]{1,2}", "", table.caption), width)
    lines = [caption] if caption else []
    widths = [max(map(len, column)) for column in zip(table.heads, *table.rows, strict=True)]
    if sum(widths) + 2 * (len(widths) - 1) <= width:
        for first, *more in (table.heads, ["-" * size for size in widths], *table.rows):
            aligned = (cell.rjust(size) for cell, size in zip(more, widths[1:], strict=True))
            lines.append("  ".join([first.ljust(widths[0]), *aligned]).rstrip())
        return "\n".join(lines)
    lines = lines or [f"{table.heads[0]}:"]
    for first, *cells in table.rows:
        named = [(head, cell) for head, cell in zip(table.heads[1:], cells, strict=True) if cell]
        longest = max((len(head) for head, _ in named), default=0)
        lines += [first, *(f"  {head.ljust(longest)}  {cell}" for head, cell in named)]
    return "\n".join(lines)


def markdown(table: Table) -> str:
    """The table in Markdown."""
    lines = [table.heads, ["---", *["---:"] * (len(table.heads) - 1)], *table.rows]
    cells = "\n".join(f"| {' | '.join(escaped(cell, in_table=True) for cell in line)} |" for line in lines)
    return f"{escaped(table.caption)}\n\n{cells}" if table.caption else cells


def escaped(text: str, in_table: bool = False) -> str:
    """Text of a result file is never markup or a link, but for `code` in backticks: nothing of a page is fetched."""
    parts = re.split(r"(`[^`]*`)", text)
    text = "".join(p if p.startswith("`") else p.replace("<", "&lt;").replace("](", "]\\(") for p in parts)
    return text.replace("|", "\\|").replace("\n", " ") if in_table else text


def kind_of(result: Json) -> str | None:
    """The name of its task; ``bench`` is any measurement of ``benchmarks/``, which has no tables; None is no result."""
    if not isinstance(header := result.get("header"), dict):
        return "bench" if isinstance(result.get("command"), str) else None
    task = header.get("task")
    return str(task) if task in KINDS or "metrics" in result else None


def tables_of(result: Json) -> list[Table]:
    """All tables of a result, the main one first."""
    kind = kind_of(result)
    return list(KINDS.get(kind, task_tables)(result)) if kind not in (None, "bench") else []


# perplexity


def perplexity_tables(result: Json) -> Iterator[Table]:
    """Systems down, protocols across; then the other differences, other units, groups, lengths and positions."""
    systems, protocols = result["systems"], list(result["protocols"].values())
    heads = [protocol_title(scores) for scores in protocols]
    every = [scores["all"] for scores in protocols]
    scored = [{score["system"]: score for score in scores["systems"]} for scores in every]
    rows = [
        [label, *(_with_gap(of[name], difference(all, name, BACKBONE)) for of, all in zip(scored, every, strict=True))]
        for name, label in systems.items()
    ]
    yield Table(["system", *heads], rows, f"Perplexity per token of {_counted(result)}")
    others = [(d["system"], d["against"]) for d in every[0]["differences"] if d["against"] != BACKBONE]
    rows = [
        [f"{systems[name]}, against {systems[other]}", *(gap(difference(all, name, other)) for all in every)]
        for name, other in others
    ]
    if rows:
        yield Table(["% of perplexity", *heads], rows)
    rows = [[label, *(_units(of[name]) for of in scored)] for name, label in systems.items()]
    yield Table(["per word; bits per byte", *heads], rows)
    for field, what in (("groups", "group"), ("by_length", "tokens of the document")):
        for scores in protocols:
            if 1 < len(scores[field]) <= MOST_PARTS:
                yield _parts_table(systems, scores, field, what)
    for scores in protocols:
        parts = scores["all"]["by_position"]
        rows = [[systems[n], *(f"{part['perplexity'][n]:.2f}" for part in parts)] for n in largest(systems)]
        caption = f"Perplexity by position, the number of tokens before: {protocol_title(scores)}."
        yield Table(["system", *(f"{part['low']:,}+" for part in parts)], rows, caption)


def protocol_title(scores: Json) -> str:
    """``sliding window, 256 by 128``: the window, and how far it moves."""
    if scores["stride"] == scores["window"]:
        return f"segments of {scores['window']:,}"
    return f"sliding window, {scores['window']:,} by {scores['stride']:,}"


def _counted(result: Json) -> str:
    """How many documents and projects there are, and what the intervals draw."""
    samples = result["header"]["samples"]
    documents, projects = samples["documents"], samples["projects"]
    of = "" if projects == documents else f" of {projects} project{'s' * (projects != 1)}"
    said = f"{documents} document{'s' * (documents != 1)}{of}, {samples['tokens']:,} tokens"
    if documents == 1:
        blocks = any(d["blocks"] for p in result["protocols"].values() for d in p["all"]["differences"])
        over = ", [95 % interval] over blocks of its tokens" if blocks else ""
        return f"{said}; % against the backbone, below 0 is better{over}."
    return f"{said}; % against the backbone, below 0 is better, [95 % interval]. {caveat(documents, projects)}"


def caveat(documents: int, projects: int) -> str:
    """What an interval over documents of so many projects says, and what not."""
    if projects == documents:
        return "Intervals draw documents, no two of one project."
    if projects == 1:
        return "All documents are of one project: the intervals say nothing about others."
    few = f" {projects} projects say little about another one." if projects < FEW_PROJECTS else ""
    return f"Intervals draw projects, then their documents.{few}"


def _parts_table(systems: Json, scores: Json, field: str, what: str) -> Table:
    """The backbone's perplexity in each group or bucket of lengths, and % against it; without it every perplexity."""
    parts, rows = scores[field], []
    for name, label in systems.items():
        if name == BACKBONE or BACKBONE not in systems:
            found = [each["perplexity"] for part in parts for each in part["systems"] if each["system"] == name]
            rows.append([label, *(f"{perplexity:.3f}" for perplexity in found)])
        else:
            rows.append([f"{label}, %", *(gap(difference(part, name, BACKBONE)) for part in parts)])
    heads = ["system", *(f"{part['name']} ({part['documents']})" for part in parts)]
    return Table(heads, rows, f"By {what} (documents): {protocol_title(scores)}.")


def _units(score: Json) -> str:
    words, bits = score["word_perplexity"], score["bits_per_byte"]
    shown = "-" if words is None else f"{words:,.2f}" if words < 1e6 else f"{words:.3g}"
    return f"{shown}; {'-' if bits is None else format(bits, '.4f')}"


def difference(scores: Json, system: str, against: str) -> Json | None:
    return next((d for d in scores["differences"] if (d["system"], d["against"]) == (system, against)), None)


def gap(difference: Json | None, digits: int = 2) -> str:
    """``-9.50 [-11.23, -7.89]``; of one document the interval is over its blocks."""
    if difference is None:
        return ""
    return _ranged(difference["percent"], difference["documents"] or difference["blocks"], f"+.{digits}f")


def _with_gap(score: Json, difference: Json | None) -> str:
    return f"{score['perplexity']:.3f}" + (f" ({gap(difference)})" if difference else "")


def _ranged(value: float | None, edges: Json | None, form: str) -> str:
    if value is None:  # JSON's infinity
        return "-"
    return format(value, form) + (f" [{edges['low']:{form}}, {edges['high']:{form}}]" if edges else "")


# tasks


def task_tables(result: Json) -> Iterator[Table]:
    """For each metric: groups down, systems across; paired differences of the first metric.

    Where there are averages over groups only those are shown.
    """
    systems, groups = result["systems"], result["groups"]
    groups = [group for group in groups if group["group"].startswith("average")] or groups
    for metric in result["metrics"]:
        form, rows = ".2f" if metric["unit"] == "nats" else ".1f", []
        for group in groups:
            mine = {score["system"]: score for score in group["scores"] if score["metric"] == metric["name"]}
            cells = (_ranged(mine[name]["value"], mine[name]["interval"], form) for name in systems)
            rows.append([f"{group['group']} ({group['examples']:,})", *cells])
        chance = "" if metric["chance"] is None else f", chance {metric['chance']:.3g}"
        unit = f" in {metric['unit']}" if metric["unit"] else ""
        caption = f"**{metric['label']}**{unit}, {metric['better']} is better{chance}; [95 % interval]."
        yield Table([result["header"]["task"], *systems.values()], rows, caption)
    first, everything, shown = result["metrics"][0], result["groups"][0], largest(systems)
    rows = [
        [f"{systems[d['system']]}, against {systems[d['against']]}", _ranged(d["value"], d["interval"], "+.2f")]
        for d in everything["differences"]
        if d["metric"] == first["name"] and d["system"] in shown
    ]
    if rows:
        yield Table([f"difference, {everything['group']}", first["label"]], rows)


def needle_tables(result: Json) -> Iterator[Table]:
    """Right answers by length, all depths together and the worst of them, for each metric."""

    def cell(depths: list[tuple[float, int]]) -> str:
        right, asked = sum(value * count for value, count in depths) / 100, sum(count for _, count in depths)
        return f"{100 * right / asked:.1f} % ({right:.0f} of {asked}; worst depth {min(depths)[0]:.0f} %)"

    for metric in result["metrics"]:
        found: dict[str, dict[str, list[tuple[float, int]]]] = defaultdict(lambda: defaultdict(list))
        for group in result["groups"]:
            what, _, depth = group["group"].partition(", depth ")
            for score in group["scores"] if depth else ():
                if score["metric"] == metric["name"]:
                    found[what][score["system"]].append((score["value"], group["examples"]))
        rows = [[what, *(cell(by_system[name]) for name in result["systems"])] for what, by_system in found.items()]
        yield Table([metric["label"], *result["systems"].values()], rows)


def harness_tables(result: Json) -> Iterator[Table]:
    """lm-evaluation-harness: tasks and metrics down, systems across."""

    def cell(score: Json | None) -> str:
        error = "" if score is None or score["stderr"] is None else f" ± {score['stderr']:.4f}"
        return "-" if score is None else f"{score['value']:.4f}{error}"

    rows = [
        [f"{task}: {metric}", *(cell(scores.get(name)) for name in result["systems"])]
        for task, metrics in result["tasks"].items()
        for metric, scores in metrics.items()
    ]
    caption = f"Window of {result['header']['config'].get('window')} tokens, ± standard error."
    yield Table(["task: metric", *result["systems"].values()], rows, caption)


# what a person measures once


def ablation_tables(result: Json) -> Iterator[Table]:
    """For each setting its values: perplexity, and % against the default."""
    heads = [protocol_title(scores) for scores in result["protocols"].values()]
    for axis in result["axes"]:
        rows = [
            [
                value["value"] + (", default" if value["default"] and value["value"] != "default" else ""),
                *(_with_gap(score, None if value["default"] else score) for score in value["scores"].values()),
            ]
            for value in axis["values"]
        ]
        yield Table([axis["label"], *heads], rows)


def efficiency_tables(result: Json) -> Iterator[Table]:
    """Contexts and systems down; time and memory across, medians."""
    rows = [
        [
            f"{point['context']:,}: {result['systems'][point['system']]}",
            f"{point['first_token']['median']:.3g} s",
            f"{point['per_token']['median'] * 1e3:.3g} ms",
            "-" if not point["peak"] else f"{point['peak']['beyond'] / (1 << 20):,.0f} MiB",
        ]
        for point in result["points"]
    ]
    yield Table(["context: system", "first token", "each new token", "peak beyond the weights"], rows)


def layer_tables(result: Json) -> Iterator[Table]:
    """What reading at each layer is worth, what its keys find, and the loss of tokens read once and twice."""
    if effect := result.get("effect"):
        kinds = list(effect["alone"]["nats"])
        lines = [("none", effect["alone"]), ("none, all in the window", effect["context"])]
        lines += [(", ".join(map(str, each["layers"])), each) for each in [*effect["single"], *effect["sets"][1:]]]
        rows = [
            [said, *(f"{each['nats'][k]:.3f}" for k in kinds), f"{100 * each['share']:.0f} %"] for said, each in lines
        ]
        caption = "Loss of facts told earlier and of text, by the layers that read memory without training."
        yield Table(["layers", *(f"{kind}, nats" for kind in kinds), "of the window's gain"], rows, caption)
    far, rows = farthest(result), []
    for layer, score in result["scores"].items():
        remembered, allowed = (int(layer) in result[field] for field in ("memory_layers", "allowed"))
        remarks = {
            "recommended": int(layer) in recommended(result),
            "paper's rule": result["default"] == int(layer),
            "cannot be remembered": not remembered,
            "not copied by the SideNet": remembered and not allowed,
        }
        found = list[str]()
        for ranks in far.values():
            rank, recall = sorted(ranks["rank"][layer]), ranks["recall"][layer]
            found.append(f"{rank[0]:.1f} ({rank[len(rank) // 2]:.0f})")
            found.append(f"{max(recall):.2f} ({sum(recall) / len(recall):.2f})")
        rows.append([str(layer), *found, f"{score:.3f}", ", ".join(said for said, true in remarks.items() if true)])
    heads = [
        head
        for source, ranks in far.items()
        for head in (f"{source}: rank of {ranks['distance']}", f"{source}: found (chance {ranks['chance']:.2f})")
    ]
    caption = "How well keys find what followed an earlier occurrence: best head (all heads)."
    yield Table(["layer", *heads, "score", ""], rows, caption)
    rows = [
        [f"{one['source']}, {one['distance']} tokens apart", f"{one['first_loss']:.2f}", f"{one['second_loss']:.2f}"]
        for one in result["copying"]
    ]
    if rows:
        yield Table(["nats per token", "first time", "second time"], rows)


def farthest(result: Json) -> Json:
    """By source, the ranks of keys at the greatest distance."""
    return {ranks["source"]: ranks for ranks in sorted(result["ranks"], key=lambda ranks: ranks["distance"])}


def recommended(result: Json) -> Sequence[int]:
    """Layers to remember; older results have one alone."""
    found = result["recommended"]
    return found if isinstance(found, list) else [found]


# the paper's


def paper() -> Json:
    """What the paper reports: Wang et al., NeurIPS 2023 (arXiv 2306.07174); ``setting``, and tables by name.

    A number marked (r) was recalled from the paper's tables and checked only by its sums and differences: it shows the
    shape, and is no pass mark. In perplexities, % is the distance from the paper's own backbone.
    """
    found: Json = json.loads((files("longmem.evaluation") / "paper.json").read_text(encoding="utf-8"))
    return {name: each if name == "setting" else Table(**each) for name, each in found.items()}


def beside(kind: str, said: str) -> list[Table]:
    """The paper's table of the same kind of measurement; what a result says of itself tells books from LaTeX."""
    if kind == "perplexity":
        said = said.lower()
        books = any(word in said for word in ("book", "pg19", "pg22", "gutenberg"))
        kind = "latex" if "latex" in said or "arxiv" in said else "books" if books else kind
    return [table for name, table in paper().items() if name == kind]


KINDS: dict[str | None, Callable[[Json], Iterator[Table]]] = {
    "ablate": ablation_tables,
    "perplexity": perplexity_tables,
    "efficiency": efficiency_tables,
    "layers": layer_tables,
    "harness": harness_tables,
    "needle": needle_tables,
}
"""Makers of tables, by the name of a task; every other has those of ``task_tables``."""
