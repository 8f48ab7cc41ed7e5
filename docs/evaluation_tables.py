"""Tables of results of the evaluations, as Markdown; ``make_api.py`` puts them on the pages."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from table_format import line, made_by, table


def evaluation_table(result: dict[str, Any], where: str) -> str:
    """The table of a result of ``longmem eval``, and the command that made it.

    Args:
        where: name of its file.
    """
    if "protocols" in result:
        return perplexity_table(result, where)
    return (needle_table if result["header"]["task"] == "needle" else task_table)(result, where)


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


def _others(system: str) -> dict[str, str]:
    """What it is compared with: systems with as much memory, or none."""
    size = system.rpartition("_")[2]
    return {
        "backbone": "its backbone alone",
        "memory_off": "itself with memory off",
        "control": "the SideNet trained equally long without memory",
        f"memtrm_{size}": "MemTRM, trained on as many tokens",
    }


def task_table(result: dict[str, Any], where: str) -> str:
    """Of ``longmem eval icl`` and ``chapterbreak``: every metric of every group of examples, systems across.

    Where there are averages over groups, only those are shown.
    """
    systems, metrics = result["systems"], result["metrics"]
    groups = [group for group in result["groups"] if group["group"].startswith("average")] or result["groups"]
    rows = []
    for metric in metrics:
        for group in groups:
            scores = {score["system"]: score for score in group["scores"] if score["metric"] == metric["name"]}
            rows.append([f"{metric['label']}: {group['group']}", *(_score(scores[name]) for name in systems)])
    origin = f"95 % intervals. {made_by(where, result['header']['command'])}"
    return "\n\n".join([table([f"{result['header']['task']}", *systems.values()], rows), origin]) + "\n\n"


def _score(score: dict[str, Any]) -> str:
    edges = score["interval"]
    return f"{score['value']:.1f}" + (f" [{edges['low']:.1f}, {edges['high']:.1f}]" if edges else "")


def gains_table(results: dict[str, dict[str, Any]], system: str) -> str:
    """What one system gains over each other: texts and protocols across.

    Args:
        results: of ``longmem eval perplexity``, by the name of their file.
        system: whose gains.
    """
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
        for name, words in _others(system).items()
        if name in cells
    ]
    label = next(iter(results.values()))["systems"][system]
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
    others = {name: words for name, words in _others(system).items() if any(name in cells for cells in rows.values())}
    heads = ["% of perplexity, sliding", *(f"against {words}" for words in others.values())]
    return table(heads, [[group, *(cells.get(name, "") for name in others)] for group, cells in rows.items()]) + "\n\n"


def _gap(gap: dict[str, Any]) -> str:
    edges = gap["documents"] or gap["blocks"]
    return f"{gap['percent']:+.1f} [{edges['low']:+.1f}, {edges['high']:+.1f}]"
