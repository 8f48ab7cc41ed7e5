"""The tables of results, from the JSON as it is in the files: for the terminal, for reports and for the docs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from longmem.evaluation.pages import Table
from longmem.evaluation.systems import BACKBONE, largest

Json = dict[str, Any]

KINDS: dict[str, tuple[str, ...]] = {
    "ablate": ("axes", "protocols"),
    "perplexity": ("protocols", "systems"),
    "efficiency": ("points", "ratios"),
    "task": ("metrics", "groups", "systems"),
    "layers": ("ranks", "recommended"),
    "harness": ("tasks", "systems"),
}
"""Kinds of results by the fields that each has."""

MOST_ROWS = 48  # of a table of groups or of a benchmark's numbers; the file has the rest
MOST_PARTS = 24  # groups of documents that are shown one by one
FEW_PROJECTS = 5


def kind_of(result: Json) -> str | None:
    """``bench`` is any measurement of ``benchmarks/``; None is no result."""
    if not isinstance(result.get("header"), dict):
        return "bench" if isinstance(result.get("command"), str) else None
    return next((kind for kind, fields in KINDS.items() if all(field in result for field in fields)), None)


def tables_of(result: Json) -> list[Table]:
    """All tables of a result, the main one first."""
    makers = {
        "perplexity": perplexity_tables,
        "task": task_tables,
        "harness": harness_tables,
        "ablate": ablation_tables,
        "efficiency": efficiency_tables,
        "layers": layer_tables,
        "bench": bench_tables,
    }
    return list(makers[kind_of(result) or "bench"](result))


# perplexity


def perplexity_tables(result: Json) -> Iterator[Table]:
    """Systems down, protocols across; then the other differences, other units, groups, lengths and positions."""
    systems, protocols = result["systems"], result["protocols"]
    heads = [protocol_title(scores) for scores in protocols.values()]
    every = [scores["all"] for scores in protocols.values()]
    rows = [
        [
            label,
            *(f"{_score(scores, name)['perplexity']:.3f}{_against(scores, name, bracket=True)}" for scores in every),
        ]
        for name, label in systems.items()
    ]
    yield Table(["system", *heads], rows, f"Perplexity per token of {_counted(result)}")
    wanted = dict.fromkeys((d["system"], d["against"]) for scores in every for d in scores["differences"])
    rows = [
        [f"{systems[name]}, against {systems[other]}", *(_against(scores, name, other) for scores in every)]
        for name, other in wanted
        if other != BACKBONE
    ]
    if rows:
        yield Table(["% of perplexity", *heads], rows)
    blocks = [
        [systems[name], *(gap(difference(scores, name, BACKBONE), "blocks") for scores in every)]
        for name in systems
        if any((difference(scores, name, BACKBONE) or {}).get("blocks") for scores in every)
    ]
    if blocks:
        yield Table(
            ["% against the backbone", *heads],
            blocks,
            "Intervals over blocks of tokens instead of documents: narrower, for more of this text.",
        )
    units = [
        [label, *(f"{_units(_score(scores, name))}" for scores in every)]
        for name, label in systems.items()
        if "word_perplexity" in _score(every[0], name)
    ]
    if units:
        yield Table(["per word; bits per byte", *heads], units)
    for field, what in (("groups", "group"), ("by_length", "tokens of the document")):
        for scores in protocols.values():
            if 1 < len(scores[field]) <= MOST_PARTS:
                yield _parts_table(result, scores, field, what)
    for scores in protocols.values():
        yield _position_table(result, scores)


def protocol_title(scores: Json) -> str:
    """``sliding window, 256 by 128``: the window, and how far it moves."""
    if scores["stride"] == scores["window"]:
        return f"segments of {scores['window']:,}"
    return f"sliding window, {scores['window']:,} by {scores['stride']:,}"


def _counted(result: Json) -> str:
    """How many documents and projects there are, and what the intervals draw."""
    samples = result["header"]["samples"]
    documents, projects = samples["documents"], samples.get("projects")
    of = "" if projects in (None, documents) else f" of {projects} project{'s' * (projects != 1)}"
    said = f"{documents} document{'s' * (documents != 1)}{of}, {samples['tokens']:,} tokens"
    if documents == 1:
        over = ", [95 % interval] over blocks of its tokens"
        blocks = any(d["blocks"] for p in result["protocols"].values() for d in p["all"]["differences"])
        return f"{said}; % against the backbone, below 0 is better{over if blocks else ''}."
    return f"{said}; % against the backbone, below 0 is better, [95 % interval]. {caveat(documents, projects)}"


def caveat(documents: int, projects: int | None) -> str:
    """What an interval over documents of so many projects says, and what not."""
    if projects is None:
        return "Intervals draw documents as if each were of another project."
    if projects == documents:
        return "Intervals draw documents, no two of one project."
    if projects == 1:
        return "All documents are of one project: the intervals say nothing about others."
    few = f" {projects} projects say little about another one." if projects < FEW_PROJECTS else ""
    return f"Intervals draw projects, then their documents.{few}"


def _parts_table(result: Json, scores: Json, field: str, what: str) -> Table:
    """The backbone's perplexity in each group or bucket of lengths, and % against it."""
    systems, parts = result["systems"], scores[field]
    rows = [[systems[BACKBONE], *(f"{_score(part, BACKBONE)['perplexity']:.3f}" for part in parts)]]
    rows += [
        [f"{systems[name]}, %", *(_against(part, name) for part in parts)]
        for name in largest(systems)
        if name != BACKBONE
    ]
    heads = ["system", *(f"{part['name']} ({part['documents']})" for part in parts)]
    return Table(heads, rows, f"By {what} (documents): {protocol_title(scores)}.")


def _position_table(result: Json, scores: Json) -> Table:
    parts = scores["all"]["by_position"]
    rows = [
        [result["systems"][name], *(f"{part['perplexity'][name]:.2f}" for part in parts)]
        for name in largest(result["systems"])
    ]
    heads = ["system", *(f"{part['low']:,}+" for part in parts)]
    return Table(heads, rows, f"Perplexity by position, the number of tokens before: {protocol_title(scores)}.")


def _score(scores: Json, system: str) -> Json:
    found: Json = next(score for score in scores["systems"] if score["system"] == system)
    return found


def _units(score: Json) -> str:
    words = score["word_perplexity"]
    shown = "-" if words is None else f"{words:,.2f}" if words < 1e6 else f"{words:.3g}"
    return f"{shown}; {score['bits_per_byte']:.4f}" if score["bits_per_byte"] is not None else f"{shown}; -"


def difference(scores: Json, system: str, against: str) -> Json | None:
    return next((d for d in scores["differences"] if (d["system"], d["against"]) == (system, against)), None)


def _against(scores: Json, system: str, against: str = BACKBONE, *, bracket: bool = False) -> str:
    said = gap(difference(scores, system, against))
    return f" ({said})" if bracket and said else said


def gap(difference: Json | None, interval: str = "documents", digits: int = 2) -> str:
    """``-9.50 [-11.23, -7.89]``; without documents to draw the interval is over blocks."""
    if difference is None:
        return ""
    return _signed(difference["percent"], difference[interval] or difference["blocks"], digits)


def _signed(value: float, edges: Json | None, digits: int = 2) -> str:
    return f"{value:+.{digits}f}" + (
        "" if edges is None else f" [{edges['low']:+.{digits}f}, {edges['high']:+.{digits}f}]"
    )


# tasks


def task_tables(result: Json) -> Iterator[Table]:
    """For each metric: groups down, systems across; needles by length; paired differences of the first metric.

    Where there are averages over groups only those are shown.
    """
    systems, groups = result["systems"], result["groups"]
    if result["header"]["task"] == "needle":
        yield from (needle_table(result, metric) for metric in result["metrics"])
        return
    groups = [group for group in groups if group["group"].startswith("average")] or groups
    for metric in result["metrics"]:
        digits = 2 if metric["unit"] == "nats" else 1
        scores = [_of_group(group, metric["name"]) for group in groups]
        rows = [
            [f"{group['group']} ({group['examples']:,})", *(_mean(some.get(name), digits) for name in systems)]
            for group, some in zip(groups[:MOST_ROWS], scores, strict=False)
        ]
        chance = "" if metric["chance"] is None else f", chance {metric['chance']:.3g}"
        unit = f" in {metric['unit']}" if metric["unit"] else ""
        caption = f"**{metric['label']}**{unit}, {metric['better']} is better{chance}; [95 % interval]."
        yield Table([result["header"]["task"], *systems.values()], rows, caption)
    first, everything, shown = result["metrics"][0], result["groups"][0], largest(systems)
    rows = [
        [f"{systems[d['system']]}, against {systems[d['against']]}", _signed(d["value"], d["interval"])]
        for d in everything["differences"]
        if d["metric"] == first["name"] and d["system"] in shown and d["value"] is not None
    ]
    if rows:
        yield Table([f"difference, {everything['group']}", first["label"]], rows)


def needle_table(result: Json, metric: Json) -> Table:
    """Right answers by length, all depths together and the worst of them."""
    depths: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for example in result["examples"]:
        what, _, depth = example["group"].partition(", depth ")
        for system, values in example["values"].items():
            depths[what][system][depth].append(values[metric["name"]])
    rows = []
    for what, by_system in depths.items():
        cells = []
        for system in result["systems"]:
            answers = [answer for part in by_system[system].values() for answer in part]
            worst = min(sum(part) / len(part) for part in by_system[system].values())
            right, asked = sum(answers) / 100, len(answers)
            cells.append(f"{sum(answers) / asked:.1f} % ({right:.0f} of {asked}; worst depth {worst:.0f} %)")
        rows.append([what, *cells])
    return Table([metric["label"], *result["systems"].values()], rows)


def _of_group(group: Json, metric: str) -> dict[str, Json]:
    return {score["system"]: score for score in group["scores"] if score["metric"] == metric}


def _mean(score: Json | None, digits: int) -> str:
    if score is None or score["value"] is None:
        return "-"
    edges = score["interval"]
    said = f" [{edges['low']:.{digits}f}, {edges['high']:.{digits}f}]" if edges else ""
    return f"{score['value']:.{digits}f}{said}"


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
                *(
                    f"{score['perplexity']:.3f}"
                    + ("" if value["default"] else f" ({gap(score | {'blocks': score.get('blocks')})})")
                    for score in value["scores"].values()
                ),
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
    """What each layer finds, and the loss of tokens that are read for the first and for the second time."""
    far = {ranks["source"]: ranks for ranks in sorted(result["ranks"], key=lambda ranks: ranks["distance"])}
    remarks = {"recommended": "recommended", "default": "paper's rule"}
    rows = []
    for layer, score in result["scores"].items():
        said = [words for name, words in remarks.items() if result[name] == int(layer)]
        if int(layer) not in result["memory_layers"]:
            said.append("cannot be remembered")
        elif int(layer) not in result["allowed"]:
            said.append("not copied by the SideNet")
        found = [cell for ranks in far.values() for cell in _found(ranks, layer)]
        rows.append([str(layer), *found, f"{score:.3f}", ", ".join(said)])
    heads = [
        head
        for source, ranks in far.items()
        for head in (f"{source}: rank of {ranks['distance']}", f"{source}: found (chance {ranks['chance']:.2f})")
    ]
    caption = "How well keys find what followed an earlier occurrence: best head (all heads)."
    yield Table(["layer", *heads, "score", ""], rows, caption)
    if result["copying"]:
        turns = ("first", "second")
        rows = [
            [f"{each['source']}, {each['distance']} tokens apart", *(f"{each[f'{t}_loss']:.2f}" for t in turns)]
            for each in result["copying"]
        ]
        yield Table(["nats per token", *(f"{turn} time" for turn in turns)], rows)


def _found(ranks: Json, layer: str) -> tuple[str, str]:
    """Least and middle rank, largest and mean recall."""
    rank, recall = sorted(ranks["rank"][layer]), ranks["recall"][layer]
    return (
        f"{rank[0]:.1f} ({rank[len(rank) // 2]:.0f})",
        f"{max(recall):.2f} ({sum(recall) / len(recall):.2f})",
    )


def bench_tables(result: Json) -> Iterator[Table]:
    """Every number of a benchmark with the path to it; median, least and most are one."""
    about = ("command", "surroundings", "seed", "rounds", "shape")
    lines = [line for name, value in result.items() if name not in about for line in _leaves(name, value)]
    more = f" {len(lines) - MOST_ROWS} more numbers are in the file." if len(lines) > MOST_ROWS else ""
    yield Table(["", "value"], lines[:MOST_ROWS], f"Medians (least to most) where there are rounds.{more}")


def _leaves(name: str, value: Any) -> Iterator[list[str]]:
    if isinstance(value, dict) and {"median", "min", "max"} <= value.keys():
        yield [name, f"{_number(value['median'])} ({_number(value['min'])} to {_number(value['max'])})"]
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name} · {key}", inner) if key not in ("shape", "surroundings") else ()
    elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        for number, one in enumerate(value):
            yield from _leaves(f"{name} · {number}", one)
    elif isinstance(value, int | float | str) and not isinstance(value, bool):
        yield [name, value if isinstance(value, str) else _number(value)]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
