"""``longmem layers``: which layer of a backbone to remember."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longmem.cli.outputs import folder_option

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from longmem.evaluation.layers import LayerReport

DTYPES = ("auto", "float32", "bfloat16", "float16")


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of token counts; try 128,256,512") from None


@click.command(epilog="Example: longmem layers runs/latex-backbone --data latex/valid.tar.xz --out results/layers")
@click.argument("model")
@click.option("--data", multiple=True, help="Text: file, folder, .jsonl or archive; default: Python's own sources.")
@click.option("--tokenizer", help="Folder or hub id; default: the model's.")
@click.option(
    "--distances", callback=_numbers, default="128,256,512,1024", show_default=True, help="Tokens between occurrences."
)
@click.option("--segment", type=int, help="Tokens encoded at once; default: the model's window, at most 1024.")
@click.option("--rows", type=click.IntRange(min=1), default=4, show_default=True, help="Passages per source.")
@click.option("--stride", type=click.IntRange(min=1), default=2, show_default=True, help="Of the SideNet to be.")
@click.option("--chunk-size", type=int, default=4, show_default=True)
@click.option("--num-retrieved", type=int, default=64, show_default=True, help="Tokens that a query may retrieve.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, ...; auto takes a GPU if there is one.")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="Of the weights.")
@click.option("--json", "as_json", is_flag=True, help="Print every number as JSON.")
@folder_option("--out", help="Folder for layers.json and the heat map layers.png.")
def command(
    model: str,
    data: tuple[str, ...],
    tokenizer: str | None,
    distances: tuple[int, ...],
    segment: int | None,
    rows: int,
    stride: int,
    chunk_size: int,
    num_retrieved: int,
    seed: int,
    device: str,
    dtype: str,
    as_json: bool,
    out: Path | None,
) -> None:
    """Find the layer whose keys are worth remembering.

    For every layer and head of MODEL (a causal language model, or the backbone of a LongMem): how well its
    position-free queries find the token that followed an earlier occurrence of the current one. Keys can be remembered
    to advantage only where a backbone can copy, so its loss on text that it has just read is shown as well.
    """
    from transformers.utils import logging

    from longmem.evaluation.layer_inputs import load_backbone
    from longmem.evaluation.layer_plots import plot_layers
    from longmem.evaluation.layers import measure_layers
    from longmem.evaluation.results import command_line, to_json, write_json

    logging.disable_progress_bar()
    backbone, beside = load_backbone(model, device=device, dtype=dtype)
    text = _text(data, tokenizer or beside, rows, max(distances), given=bool(data or tokenizer))
    report = measure_layers(
        backbone,
        text,
        distances=distances,
        segment=segment,
        rows=rows,
        chunk_size=chunk_size,
        num_retrieved=num_retrieved,
        stride=stride,
        seed=seed,
        name=model,
        command=command_line(),
        progress=lambda what: click.echo(f"measuring {what}", err=True),
    )
    if out is not None:
        write_json(out / "layers.json", report)
        click.echo(f"wrote {out / 'layers.json'} and {plot_layers(report, out / 'layers.png')}", err=True)
    if as_json:
        click.echo(to_json(report))
        return
    _print(report)


def _text(data: tuple[str, ...], tokenizer: str, rows: int, length: int, *, given: bool) -> Tensor | None:
    """Rows of text; without ``--data`` and without a tokenizer, none."""
    from longmem.data import load_tokenizer, read_documents
    from longmem.errors import DataError
    from longmem.evaluation.layer_inputs import standard_text, text_rows

    try:
        reader = load_tokenizer(tokenizer)
    except DataError:
        if given:
            raise
        click.echo(f"{tokenizer}: no tokenizer, measuring random tokens only; --tokenizer names one", err=True)
        return None
    documents = [document.text for document in read_documents(list(data))] if data else standard_text()
    return text_rows(documents, reader, rows, length)


def _print(report: LayerReport) -> None:
    from rich.console import Console

    console = Console()
    console.print(_layer_table(report))
    if report.copying:
        console.print(_copy_table(report))
    console.print(report.conclusion, style="bold", highlight=False)


def _layer_table(report: LayerReport) -> Table:
    from rich.table import Table

    far = report.farthest()
    table = Table(
        title="What each layer finds of the token that followed an earlier occurrence",
        caption="rank: median over queries, best head (median head). found: share of queries whose right chunk is "
        "retrieved, best head (mean of heads). score: over all distances, 0 is chance, 1 is best.",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("layer", justify="right")
    for ranks in far:
        what = f"{ranks.source}, {ranks.distance} apart"
        table.add_column(f"{what}\nrank of {ranks.distance}", justify="right")
        table.add_column(f"found\nchance {ranks.chance:.2f}", justify="right")
    table.add_column("score", justify="right")
    table.add_column("")
    for layer in sorted(report.scores):
        cells: list[str] = []
        for ranks in far:
            rank, recall = sorted(ranks.rank[layer]), ranks.recall[layer]
            cells.append(f"{rank[0]:.1f} ({rank[len(rank) // 2]:.0f})")
            cells.append(f"{max(recall):.2f} ({sum(recall) / len(recall):.2f})")
        style = "bold" if layer == report.recommended else None
        table.add_row(str(layer), *cells, f"{report.scores[layer]:.3f}", _remark(report, layer), style=style)
    return table


def _remark(report: LayerReport, layer: int) -> str:
    remarks: list[Any] = []
    if layer == report.recommended:
        remarks.append("recommended")
    if layer == report.default:
        remarks.append("paper's rule")
    if layer not in report.memory_layers:
        remarks.append("cannot be remembered")
    elif layer not in report.allowed:
        remarks.append("not copied by the SideNet")
    return ", ".join(remarks)


def _copy_table(report: LayerReport) -> Table:
    from rich.table import Table

    table = Table(title="Loss on tokens read twice in one window (nats per token)", title_justify="left")
    for name in ("source", "apart", "first pass", "second pass", "gained"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for copied in report.copying:
        gained = copied.first_loss - copied.second_loss
        table.add_row(
            copied.source,
            str(copied.distance),
            f"{copied.first_loss:.3f}",
            f"{copied.second_loss:.3f}",
            f"{gained:.3f}",
        )
    return table
