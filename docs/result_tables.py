"""Result tables of README.md, docs/experiments.md and the model cards, and the page docs/results.md.

``make_pages.py`` puts them on the pages: a comment ``<!-- results: FILES -->`` names the files of a table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longmem.evaluation.report import Report, build_report
from longmem.evaluation.results import Json
from longmem.evaluation.systems import BACKBONE, CONTROL, MEMORY_OFF, WINDOW, sized
from longmem.evaluation.tables import Table, difference, gap, kind_of, markdown, tables_of

ROOT = Path(__file__).parents[1]
MARKERS = re.compile(r"<!-- (results|gains|groups): ([^>]*?) -->\n.*?<!-- /\1 -->\n", re.DOTALL)
SHOWN = (
    "small-books",
    "small-latex",
    "small-python",
    "chapterbreak",
    "icl",
    "needle/needle.json",
    "needle-books",
    "ablate-python",
    "efficiency",
)
"""What of results/ is on docs/results.md."""
MOST = {"ablate": 2}
"""Tables of one result on docs/results.md, by kind; else one, and of a task docs/experiments.md has the last."""
INTRO = (
    "Made by `make docs` from the JSON files in `results/`, which hold settings, seeds, versions, machine and every "
    "number. `longmem report results --out runs/report` shows all of them. What was tried on the way is in "
    "experiments.md."
)


def with_results(page: str) -> str:
    """The page with each table of results made again from the files its marker names."""

    def fill(match: re.Match[str]) -> str:
        kind, names = match[1], match[2].split()
        system = names.pop(0) if kind != "results" else ""
        found = {n: json.loads((ROOT / n).read_text(encoding="utf-8")) for n in names if (ROOT / n).exists()}
        if kind == "results":
            made = "\n".join(result_table(result, name) for name, result in found.items())
        else:
            made = text_of([(gains_table if kind == "gains" else groups_table)(found, system)]) if found else ""
        return f"<!-- {kind}: {match[2]} -->\n{made.rstrip()}\n\n<!-- /{kind} -->\n"

    return MARKERS.sub(fill, page)


def result_table(result: dict[str, Any], where: str) -> str:
    """The main table of a result, or of a task the last that docs/results.md leaves out; and its file."""
    tables, kind = tables_of(result), kind_of(result)
    if kind == "bench":
        tables = [made(result) for field, made in BENCHES.items() if field in result] or tables
    elif kind == "task" and result["header"]["task"] != "needle":
        tables = [table for table in tables if table.caption][-1:]
    else:
        tables = tables[-1:] if kind == "layers" else tables[:1]
    around = result.get("surroundings")
    machine = f"{around['machine']}, {around['threads']} thread(s), {around['date']}. " if around else ""
    made = "." if result.get("header", result)["command"] else f": {result['reported']}."
    return f"{text_of(tables)}\n{machine}`{where}`{made}\n\n"


def text_of(tables: Sequence[Table]) -> str:
    return "\n\n".join(map(markdown, tables)) + "\n"


def results_report() -> Report:
    """The page docs/results.md, not written yet."""
    files = [ROOT / "results" / name for name in SHOWN]
    return build_report(files, intro=[INTRO], base=ROOT, folder="results", most_tables=MOST)


def training_table(result: dict[str, Any]) -> Table:
    """Of ``benchmarks.training``: a line for each run."""
    rows = []
    for name, run in result["trainings"].items():
        valid = run["valid"][-1] if run["valid"] else {}
        losses = [valid.get(field) for field in ("loss", "loss_memory_off", "loss_backbone")]
        cells = ["-" if loss is None else f"{loss:.3f}" for loss in losses]
        rows.append([name, f"{run['steps']:,}", f"{run['tokens']:,}", f"{run['seconds'] / 60:.0f}", *cells])
    heads = ["training", "steps", "tokens", "minutes", "validation loss, nats", "with memory off", "of its backbone"]
    return Table(heads, rows)


def gains_table(results: Mapping[str, Json], system: str) -> Table:
    """What one system gains over each other: texts and protocols across.

    Args:
        results: of ``longmem eval perplexity``, by the path of their file.
        system: whose gains.
    """
    systems = next(iter(results.values()))["systems"]
    others, columns = _others(system, systems), list[tuple[str, Json, str]]()
    for where, result in results.items():
        samples = result["header"]["samples"]
        counted = f"{samples['documents']} of {samples.get('projects', samples['documents'])}"
        columns += [(f"{_text_of(where)}, {name}", p["all"], counted) for name, p in result["protocols"].items()]
    rows = [
        [words, *(gap(difference(all, system, name), digits=1) for _, all, _ in columns)]
        for name, words in others.items()
    ]
    return Table(
        [f"{systems[system]}, against", *(head for head, _, _ in columns)],
        [["documents of projects", *(counted for *_, counted in columns)], *(row for row in rows if any(row[1:]))],
        "% of perplexity, below 0 is better, [95 % interval]; intervals draw projects, then their documents, and say "
        "little about other projects where there are only a few.",
    )


def groups_table(results: Mapping[str, Json], system: str) -> Table:
    """The same under the sliding window for each group of documents: groups down, the others across."""
    others = _others(system, next(iter(results.values()))["systems"])
    rows = [
        [
            f"{_text_of(where)}, {group['name']} ({group['documents']} documents)",
            *(gap(difference(group, system, name), digits=1) for name in others),
        ]
        for where, result in results.items()
        for group in result["protocols"]["sliding"]["groups"]
    ]
    return Table(["% of perplexity, sliding", *(f"against {words}" for words in others.values())], rows)


def _text_of(where: str) -> str:
    """``results/small-latex/perplexity.json`` is ``latex``."""
    return where.split("/")[-2].removeprefix("small-").removeprefix("smollm2-")


def _others(system: str, systems: Mapping[str, str]) -> dict[str, str]:
    """What a system is compared with, in words: systems with as much memory, or none."""
    size = system.rpartition("_")[2]
    free = [name for name in systems if name.startswith("training_free_") and name.endswith(f"_{size}")]
    named = {
        BACKBONE: "its backbone alone",
        MEMORY_OFF: "itself with memory off",
        CONTROL: "the SideNet trained without memory",
        f"memtrm_{size}": "MemTRM, trained on as many tokens",
    }
    windows = sorted((found[1], name) for name in systems if (found := sized(name)) and found[0] == WINDOW)
    named |= {name: f"its backbone with a window of {count:,}" for count, name in windows}
    for name in free:
        label = systems[name].split(",")[0]
        named[name] = label if "calibrated" in label else f"{label}, nothing trained"
    return {name: words for name, words in named.items() if name in systems}


def kept_back_table(result: dict[str, Any]) -> Table:
    """Of texts that were kept back: a line for each kind."""
    rows = [
        [
            f"{kind}, {found['documents']} documents of {found['projects']} projects" if found["documents"] else kind,
            f"{found['percent']:+.1f}" + (f" [{found['low']:+.1f}, {found['high']:+.1f}]" if found["low"] else ""),
        ]
        for kind, found in result["kept_back"].items()
    ]
    heads = ["texts that were kept back", "LongMem, % against its backbone, sliding window"]
    return Table(heads, rows)


def effect_table(result: dict[str, Any]) -> Table:
    """Of reading memory without training: at the five single layers that recall facts best, and at sets of layers."""
    effect = result["effect"]
    rows = [("none", effect["alone"]), ("none, everything in the window", effect["context"])]
    best = sorted(effect["single"], key=lambda found: -found["facts"])[:5]
    rows += [(", ".join(map(str, found["layers"])), found) for found in best]
    for found in effect["sets"]:
        bias = f", bias {found['bias']:+g}" if found["bias"] else ""
        rows.append((f"{', '.join(map(str, found['layers'])) or 'none'}{bias} ({found['questions']} questions)", found))
    texts = list(effect["alone"]["text"])
    cells = [
        [name, f"{found['facts']:.2f}", *(f"{found['text'][t]:.3f}" if found["text"] else "-" for t in texts)]
        for name, found in rows
    ]
    return Table(["layers that read", "facts, log probability", *(f"{t}, nats" for t in texts)], cells)


def calibrated_table(result: dict[str, Any]) -> Table:
    """Perplexity of a calibrated reader and of longer windows, % against the backbone's own window."""
    text = result["calibrated"]["text"]
    kinds = list(next(iter(text.values())))
    rows = []
    for system, found in text.items():
        cells = []
        for kind in kinds:
            of_kind = found[kind]
            change = f" ({100 * of_kind['change']:+.1f} % [{100 * of_kind['low']:+.1f}, {100 * of_kind['high']:+.1f}])"
            cells.append(f"{of_kind['ppl']:.2f}{change if of_kind['change'] else ''}, {of_kind['blocks']} windows")
        rows.append([system, *cells])
    return Table(["perplexity", *kinds], rows)


BENCHES: dict[str, Callable[[dict[str, Any]], Table]] = {
    "calibrated": calibrated_table,
    "effect": effect_table,
    "kept_back": kept_back_table,
    "trainings": training_table,
}
"""Tables of benchmarks, by the field that a result of the kind has."""
