"""Ours beside the paper's, and in plain words what is not alike."""

from __future__ import annotations

from typing import Any

from longmem.evaluation import paper_numbers as paper
from longmem.evaluation.report.blocks import Block, Table, Text
from longmem.evaluation.report.files import ResultFile
from longmem.evaluation.report.pictures import largest
from longmem.evaluation.systems import BACKBONE, LONGMEM, MEMTRM, sized

RECALLED = "(r): recalled from the paper's tables, not checked against them; read it as shape."


def paper_tables(file: ResultFile) -> list[paper.PaperTable]:
    """Those whose setting is the same kind as this result's."""
    if file.kind == "task":
        return [table for table in paper.TABLES if table.task == file.task]
    if file.kind != "perplexity":
        return []
    said = " ".join(map(str, [*file.config.get("data", []), file.name])).lower()
    if any(word in said for word in ("latex", "arxiv")):
        return [paper.ARXIV]
    return [paper.BOOKS] if any(word in said for word in ("book", "pg19", "pg-19", "pg22", "gutenberg")) else []


def perplexity_beside(file: ResultFile) -> list[Block]:
    """The paper's distances from its backbone, and ours by its protocol, by length of the document or for all."""
    found: list[Block] = []
    scores = file.data["protocols"].get("segments")
    if scores is None:
        return found
    for table in paper_tables(file):
        lengths = {part["name"]: part for part in scores["by_length"]} | {"ArXiv": scores["all"]}
        rows = []
        for name, (_, line) in table.rows.items():
            cells = [
                "-" if figure is None else figure.shown(table.digits) + _distance(table, name, column)
                for figure, column in zip(line, table.columns, strict=True)
            ]
            rows.append([f"paper: {name}", *cells])
        for system in largest(file.data["systems"]):
            kind = system if (memory := sized(system)) is None else memory[0]
            if kind in (BACKBONE, LONGMEM, MEMTRM):
                cells = [_ours(lengths.get(column), system) for column in table.columns]
                rows.append([f"ours: {file.data['systems'][system]}", *cells])
        caption = (
            f"**Beside the paper.** {table.title}; in brackets the distance from its own backbone. Ours by segments, "
            f"the paper's {table.setting}."
        )
        found.append(Table(["", *table.columns], rows, caption))
        if table.recalled:
            found.append(Text(RECALLED, quiet=True))
    return found


def _distance(table: paper.PaperTable, name: str, column: str) -> str:
    known = paper.relative(table, column).get(name)
    return "" if known is None else f" ({known[0]:+.1f} %)"


def _ours(scores: dict[str, Any] | None, system: str) -> str:
    if scores is None:
        return "-"
    value = next(one["perplexity"] for one in scores["systems"] if one["system"] == system)
    percent = [d["percent"] for d in scores["differences"] if (d["system"], d["against"]) == (system, BACKBONE)]
    return f"{value:.2f}" + "".join(f" ({one:+.1f} %)" for one in percent)


def task_beside(file: ResultFile) -> list[Block]:
    """The paper's table of this task; ours stands above it, in groups of its own."""
    found: list[Block] = []
    for table in paper_tables(file):
        rows = [
            [name, *("-" if figure is None else figure.shown(table.digits) for figure in line)]
            for name, (_, line) in table.rows.items()
        ]
        caption = f"**Beside the paper.** {table.title}: {table.setting}."
        found.append(Table(["paper", *table.columns], rows, caption))
        if table.recalled:
            found.append(Text(RECALLED, quiet=True))
    return found


def differs(file: ResultFile) -> Text | None:
    """What is not as in the paper, from the header; None where the paper has nothing of the kind."""
    if not paper_tables(file):
        return (
            Text("The paper has no number for this setting.", quiet=True)
            if file.kind in ("perplexity", "task")
            else None
        )
    samples, config = file.header.get("samples", {}), file.config
    window = config.get("window", "not recorded")
    sizes = sorted({memory[1] for name in file.data["systems"] if (memory := sized(name)) is not None})
    held = f"{', '.join(f'{size:,}' for size in sizes)} tokens" if sizes else "none"
    counted = ", ".join(f"{count:,} {name}" for name, count in samples.items() if name not in ("words", "bytes"))
    parts = [
        f"model: {_model(file)} (paper: {paper.MODEL}; training: {paper.TRAINING})",
        f"window: {window:,} tokens (paper: 1,024)" if isinstance(window, int) else f"window: {window}",
        f"memory: {held} (paper: {paper.MEMORY})",
        f"data: {_data(config)}; {counted} (paper: {paper.DATA})"
        if file.kind == "perplexity"
        else f"measured: {counted}",
    ]
    end = " Vocabularies differ, so perplexities do not compare, distances do." if file.kind == "perplexity" else ""
    return Text("**What differs from the paper.** " + "; ".join(parts) + "." + end)


def _model(file: ResultFile) -> str:
    """Parameters of the backbone and of what was trained over it, where the header has them."""
    models = file.header.get("models", {})
    name = f"`{file.config['model']}`" if "model" in file.config else "not named"
    counts = [
        f"backbone of {_count(one['parameters'])}"
        for key, one in models.items()
        if key == BACKBONE and "parameters" in one
    ]
    counts += [
        f"SideNet of {_count(one['trained_parameters'])}"
        for key, one in models.items()
        if key == "memory_off" and "trained_parameters" in one
    ]
    return f"{name}, {' and '.join(counts) if counts else 'its size is not recorded in this file'}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f}M parameters"


def _data(config: dict[str, Any]) -> str:
    named = config.get("data") or config.get("books") or []
    return ", ".join(f"`{one}`" for one in ([named] if isinstance(named, str) else named)) or "not recorded"
