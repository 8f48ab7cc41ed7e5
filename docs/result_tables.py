"""Tables of results on the pages: README.md, docs/results.md, docs/experiments.md and the model cards.

``make_pages.py`` puts them there: a comment ``<!-- KIND: FILES -->`` names the files of ``results/`` that they are of.

- ``results``: one table of each file, the first or, as ``FILE:-2``, the last but one.
- ``sections``: the first table of each file, or as ``FILE:2`` the first two; pictures, the paper's table, the command.
- ``gains`` and ``groups``, with the name of a system before the files: what it gains over those it is compared with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from longmem.evaluation.report import section
from longmem.evaluation.results import Json
from longmem.evaluation.tables import Table, difference, gap, markdown, tables_of

ROOT = Path(__file__).parents[1]
MARKERS = re.compile(r"<!-- (results|sections|gains|groups): ([^>]*?) -->\n.*?<!-- /\1 -->\n", re.DOTALL)
FOLDER = "results"
"""Of pictures, beside the page that they are on."""


def with_results(page: str, pictures: dict[str, str] | None = None) -> str:
    """The page with each table of results made again from the files its marker names.

    Args:
        pictures: those of the page are added, SVG by the path of their file.
    """
    pictures = {} if pictures is None else pictures

    def fill(match: re.Match[str]) -> str:
        kind, names = match[1], match[2].split()
        system = names.pop(0) if kind in ("gains", "groups") else ""
        pairs = [name.partition(":")[::2] for name in names]
        found = {name: json.loads((ROOT / name).read_text(encoding="utf-8")) for name, _ in pairs}
        if kind == "results":
            parts = [_result(found[name], name, int(which or 0)) for name, which in pairs]
        elif kind == "sections":
            made = [section(name, found[name], folder=FOLDER, most_tables=int(which or 1)) for name, which in pairs]
            parts = [each.text for each in made]
            pictures.update({path: svg for each in made for path, svg in each.pictures.items()})
        else:
            parts = [markdown((_gains if kind == "gains" else _groups)(found, system))]
        return f"<!-- {kind}: {match[2]} -->\n" + "\n\n\n".join(parts) + f"\n\n<!-- /{kind} -->\n"

    return MARKERS.sub(fill, page)


def _result(result: Json, where: str, which: int) -> str:
    """One table of a result, and its file."""
    bench = [made(result) for field, made in BENCHES.items() if field in result]
    around = result.get("surroundings")
    machine = f"{around['machine']}, {around['threads']} thread(s), {around['date']}. " if around else ""
    made = "." if result.get("header", result)["command"] else f": {result['reported']}."
    return f"{markdown((bench or tables_of(result))[which])}\n\n{machine}`{where}`{made}"


def _gains(results: Mapping[str, Json], system: str) -> Table:
    """What one system gains over each other in results of ``longmem eval perplexity``: texts and protocols across."""
    columns = list[tuple[str, Json, str]]()
    for where, result in results.items():
        samples = result["header"]["samples"]
        counted = f"{samples['documents']} of {samples.get('projects', samples['documents'])}"
        columns += [(f"{_text_of(where)}, {name}", p["all"], counted) for name, p in result["protocols"].items()]
    systems = next(iter(results.values()))["systems"]
    rows = [
        [systems[name], *(gap(difference(all, system, name), digits=1) for _, all, _ in columns)]
        for name in _others(columns[0][1], system)
    ]
    return Table(
        [f"{systems[system]}, against", *(head for head, _, _ in columns)],
        [["documents of projects", *(counted for *_, counted in columns)], *rows],
        "% of perplexity, below 0 is better, [95 % interval]; intervals draw projects, then their documents, and say "
        "little about other projects where there are only a few.",
    )


def _groups(results: Mapping[str, Json], system: str) -> Table:
    """The same under the sliding window for each group of documents: groups down, the others across."""
    first = next(iter(results.values()))
    others = _others(first["protocols"]["sliding"]["all"], system)
    rows = [
        [
            f"{_text_of(where)}, {group['name']} ({group['documents']} documents)",
            *(gap(difference(group, system, name), digits=1) for name in others),
        ]
        for where, result in results.items()
        for group in result["protocols"]["sliding"]["groups"]
    ]
    return Table(["% of perplexity, sliding", *(f"against {first['systems'][name]}" for name in others)], rows)


def _others(scores: Json, system: str) -> list[str]:
    return [gap["against"] for gap in scores["differences"] if gap["system"] == system]


def _text_of(where: str) -> str:
    """``results/small-latex/perplexity.json`` is ``latex``."""
    return where.split("/")[-2].removeprefix("small-").removeprefix("smollm2-")


def _training(result: dict[str, Any]) -> Table:
    """Of ``benchmarks.training``: a line for each run."""
    rows = []
    for name, run in result["trainings"].items():
        valid = run["valid"][-1] if run["valid"] else {}
        losses = [valid.get(field) for field in ("loss", "loss_memory_off", "loss_backbone")]
        cells = ["-" if loss is None else f"{loss:.3f}" for loss in losses]
        rows.append([name, f"{run['steps']:,}", f"{run['tokens']:,}", f"{run['seconds'] / 60:.0f}", *cells])
    heads = ["training", "steps", "tokens", "minutes", "validation loss, nats", "with memory off", "of its backbone"]
    return Table(heads, rows)


def _kept_back(result: dict[str, Any]) -> Table:
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


BENCHES: dict[str, Callable[[dict[str, Any]], Table]] = {"kept_back": _kept_back, "trainings": _training}
"""Tables of benchmarks, by the field that a result of the kind has."""
