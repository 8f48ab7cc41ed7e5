"""Tables of results of the evaluations, as Markdown; ``make_api.py`` puts them on the pages."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from table_format import line, made_by, table

TURNS = ("first", "second")


def evaluation_table(result: dict[str, Any], where: str) -> str:
    """The table of a result of ``longmem eval``, and the command that made it.

    Args:
        where: name of its file.
    """
    if "protocols" in result:
        return perplexity_table(result, where)
    if "copying" in result:
        return copying_table(result, where)
    return (needle_table if result["header"]["task"] == "needle" else task_table)(result, where)


def copying_table(result: dict[str, Any], where: str) -> str:
    """Of ``longmem layers``: the loss of tokens that are read for the first and for the second time."""
    rows = [
        [f"{each['source']}, {each['distance']} tokens apart", *(f"{each[f'{turn}_loss']:.2f}" for turn in TURNS)]
        for each in result["copying"]
    ]
    heads = [where.split("/")[-2], *(f"{turn} time, nats per token" for turn in TURNS)]
    return "\n\n".join([table(heads, rows), made_by(where, result["header"]["command"])]) + "\n\n"


def perplexity_table(result: dict[str, Any], where: str) -> str:
    """Of ``longmem eval perplexity``: systems down, protocols across."""
    protocols, header = result["protocols"], result["header"]
    heads = [f"{name}, window {p['window']}, moved by {p['stride']}" for name, p in protocols.items()]
    lines = [line([where.split("/")[-2], *heads]), "|---|" + "---:|" * len(heads)]
    for system, label in result["systems"].items():
        cells = []
        for protocol in protocols.values():
            scores = protocol["all"]
            perplexity = next(s["perplexity"] for s in scores["systems"] if s["system"] == system)
            against = [d for d in scores["differences"] if (d["system"], d["against"]) == (system, "backbone")]
            cells.append(f"{perplexity:.3f}" + "".join(_difference(d) for d in against))
        lines.append(line([label, *cells]))
    counted = f"{header['samples']['documents']} documents, {header['samples']['tokens']:,} tokens"
    origin = f"{counted}; % against the backbone, 95 % interval over documents. {made_by(where, header['command'])}"
    return "\n".join(lines) + f"\n\n{origin}\n\n"


def _difference(difference: dict[str, Any]) -> str:
    interval = difference["documents"] or difference["blocks"]
    edges = f" [{interval['low']:+.2f}, {interval['high']:+.2f}]" if interval else ""
    return f" ({difference['percent']:+.2f} %{edges})"


def needle_table(result: dict[str, Any], where: str) -> str:
    """Of ``longmem eval needle``: exact answers by length, all depths together and the worst of them."""
    depths: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for example in result["examples"]:
        for system, values in example["values"].items():
            found[example["group"], system].append(values["exact"])
    for (group, system), answers in found.items():
        depths[group.rsplit(", depth", 1)[0]][system].append(answers)
    systems = result["systems"]
    rows = []
    for name, by_system in depths.items():
        cells = []
        for system in systems:
            parts = by_system[system]
            answers = [answer for part in parts for answer in part]
            right, worst = sum(answers) / 100, min(sum(part) / len(part) for part in parts)
            cells.append(
                f"{sum(answers) / len(answers):.1f} % ({right:.0f} of {len(answers)}; worst depth {worst:.0f} %)"
            )
        rows.append([name, *cells])
    origin = made_by(where, result["header"]["command"])
    return "\n\n".join([table(["exact answers", *systems.values()], rows), origin]) + "\n\n"


def _others(system: str, systems: dict[str, str]) -> dict[str, str]:
    """What it is compared with: systems with as much memory, or none.

    Args:
        systems: labels of all that were measured, by name.
    """
    size = system.rpartition("_")[2]
    free = [name for name in systems if name.startswith("training_free_") and name.endswith(f"_{size}")]
    return {
        "backbone": "its backbone alone",
        "memory_off": "itself with memory off",
        "control": "the SideNet trained equally long without memory",
        f"memtrm_{size}": "MemTRM, trained on as many tokens",
    } | {name: f"{systems[name].split(',')[0]}, nothing trained" for name in free}


def task_table(result: dict[str, Any], where: str) -> str:
    """Of ``longmem eval icl``, ``chapterbreak``, ``dialogue``: every metric of every group of examples, systems across.

    Where there are averages over groups, only those are shown; where all systems score 0, nothing is.
    """
    systems, metrics = result["systems"], result["metrics"]
    groups = [group for group in result["groups"] if group["group"].startswith("average")] or result["groups"]
    rows = []
    for metric in metrics:
        for group in groups:
            scores = {score["system"]: score for score in group["scores"] if score["metric"] == metric["name"]}
            if any(score["value"] for score in scores.values()):
                cells = [_score(scores[name], 2 if metric["unit"] == "nats" else 1) for name in systems]
                rows.append([f"{metric['label']}: {group['group']}", *cells])
    origin = f"95 % intervals. {made_by(where, result['header']['command'])}"
    return "\n\n".join([table([f"{result['header']['task']}", *systems.values()], rows), origin]) + "\n\n"


def _score(score: dict[str, Any], digits: int) -> str:
    edges = score["interval"]
    low_high = f" [{edges['low']:.{digits}f}, {edges['high']:.{digits}f}]" if edges else ""
    return f"{score['value']:.{digits}f}{low_high}"


def gains_table(results: dict[str, dict[str, Any]], system: str) -> str:
    """What one system gains over each other: texts and protocols across.

    Args:
        results: of ``longmem eval perplexity``, by the name of their file.
        system: whose gains.
    """
    systems = next(iter(results.values()))["systems"]
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    heads: list[str] = []
    for where, result in results.items():
        for protocol, scores in result["protocols"].items():
            heads.append(f"{where.split('/')[-2].removeprefix('small-')}, {protocol}")
            for gap in scores["all"]["differences"]:
                if gap["system"] == system:
                    cells[gap["against"]][heads[-1]] = _gap(gap)
    rows = [
        [words, *(cells[name].get(head, "") for head in heads)]
        for name, words in _others(system, systems).items()
        if name in cells
    ]
    label = systems[system]
    made = ", ".join(f"`{where}`" for where in results)
    told = f"% of perplexity, below 0 is better; 95 % intervals over documents. From {made}."
    return "\n\n".join([table([f"{label}, against", *heads], rows), told]) + "\n\n"


def groups_table(results: dict[str, dict[str, Any]], system: str) -> str:
    """The same under the sliding window, for each group of documents: groups down, the others across."""
    rows: dict[str, dict[str, str]] = {}
    for where, result in results.items():
        text = where.split("/")[-2].removeprefix("small-")
        for group in result["protocols"]["sliding"]["groups"]:
            gaps = [gap for gap in group["differences"] if gap["system"] == system]
            rows[f"{text}, {group['name']} ({group['documents']} documents)"] = {g["against"]: _gap(g) for g in gaps}
    known = _others(system, next(iter(results.values()))["systems"])
    others = {name: words for name, words in known.items() if any(name in cells for cells in rows.values())}
    heads = ["% of perplexity, sliding", *(f"against {words}" for words in others.values())]
    return table(heads, [[group, *(cells.get(name, "") for name in others)] for group, cells in rows.items()]) + "\n\n"


def _gap(gap: dict[str, Any]) -> str:
    edges = gap["documents"] or gap["blocks"]
    return f"{gap['percent']:+.1f} [{edges['low']:+.1f}, {edges['high']:+.1f}]"
