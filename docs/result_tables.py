"""Result tables of README.md, docs/experiments.md and the model cards, and the page docs/results.md.

``make_api.py`` puts them on the pages: a comment ``<!-- results: FILES -->`` names the files of a table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from longmem.evaluation.pages import Table, markdown
from longmem.evaluation.report import Report, build_report
from longmem.evaluation.tables import gains_table, groups_table, kind_of, tables_of

ROOT = Path(__file__).parents[1]
MARKERS = re.compile(r"<!-- (results|gains|groups): ([^>]*?) -->\n.*?<!-- /\1 -->\n", re.DOTALL)
SHOWN = (
    "small-books",
    "small-latex",
    "small-python",
    "chapterbreak",
    "icl",
    "needle",
    "needle-books",
    "dialogue",
    "ablate-python",
    "efficiency",
)
"""Folders of results/ on docs/results.md."""
INTRO = (
    "Made by `make docs` from the JSON files in `results/`, which hold settings, seeds, versions, machine and every "
    "number. `longmem report results --out runs/report` shows all of them. What was tried on the way is in "
    "[experiments](experiments.md)."
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
    """The main tables of a result, its file, and the command that made it."""
    tables, kind = tables_of(result), kind_of(result)
    if kind == "bench":
        tables = [made(result) for field, made in BENCHES.items() if field in result] or tables
    elif kind == "task" and result["header"]["task"] != "needle":
        nothing = {"0.0 [0.0, 0.0]", "0.0"}  # of a metric by which all systems score 0
        tables = [t for t in tables if t.caption and any(set(row[1:]) - nothing for row in t.rows)]
    else:
        tables = tables[-1:] if kind == "layers" else tables[:1]
    around = result.get("surroundings")
    machine = f"{around['machine']}, {around['threads']} thread(s), {around['date']}. " if around else ""
    command = result.get("header", result)["command"]
    made = f", made by\n`{command}`" if command else f": {result['reported']}."
    return f"{text_of(tables)}\n{machine}`{where}`{made}\n\n"


def text_of(tables: Sequence[Table]) -> str:
    return markdown(tables, "")


def results_report() -> Report:
    """The page docs/results.md, not written yet."""
    return build_report([ROOT / "results" / name for name in SHOWN], intro=[INTRO], base=ROOT, most_tables=2)


def stale_table(result: dict[str, Any]) -> Table:
    """Of ``benchmarks.staleness``: a line for each text."""
    rows = []
    for name, text in result["stale"].items():
        cells = [f"{text['off']['perplexity']:.2f}"]
        for way in ("fresh", "stale"):
            found = text[way]
            edges = f" [{found['interval'][0]:+.1f}, {found['interval'][1]:+.1f}]" if found["interval"] else ""
            cells.append(f"{found['perplexity']:.2f} ({found['percent_against_off']:+.1f} %{edges})")
        rows.append([f"{name}, {text['documents']} documents", *cells])
    return Table(["MemTRM, by segments", "memory off", "its own memory", "written before it was trained"], rows)


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


BENCHES: dict[str, Callable[[dict[str, Any]], Table]] = {
    "kept_back": kept_back_table,
    "stale": stale_table,
    "trainings": training_table,
}
"""Tables of benchmarks, by the field that a result of the kind has."""
