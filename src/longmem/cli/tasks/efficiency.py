"""``longmem eval efficiency``: time and memory against the length of the context."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from longmem.cli.counts import TokenCount, token_counts
from longmem.cli.evaluating import machine_options
from longmem.cli.outputs import folder_option

if TYPE_CHECKING:
    from longmem.evaluation.efficiency import EfficiencyResult, Point


def _names(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip())


@click.command(
    epilog="Example: longmem eval efficiency --random hidden=512,layers=12 --contexts 1k,4k,16k --out runs/efficiency"
)
@click.option("--model", help="LongMem checkpoint or run folder.")
@click.option(
    "--random",
    "shape",
    metavar="SHAPE",
    help="In place of --model: a backbone of random weights, e.g. hidden=512,layers=12,heads=8,vocab=8192; speed does "
    "not depend on the weights.",
)
@click.option("--backbone", help="Where the backbone is, if not where the checkpoint says.")
@click.option(
    "--contexts",
    callback=token_counts,
    default="1k,2k,4k,8k,16k,32k,64k",
    show_default=True,
    help="Lengths in tokens; k is 1,024.",
)
@click.option(
    "--window", type=click.IntRange(min=2), help="Of LongMem; default: the backbone's positions, at most 1024."
)
@click.option("--memory-size", type=TokenCount(), help="Most tokens in memory; default: the model's own.")
@click.option("--new-tokens", type=click.IntRange(min=2), default=32, show_default=True, help="Behind each context.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Rounds of all systems.")
@click.option(
    "--piece", type=click.IntRange(min=1), help="Tokens that full attention reads at once; default: all of them."
)
@click.option(
    "--budget",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    help="Seconds for the rounds of one context; what would take longer is left out, and that is said.",
)
@click.option(
    "--systems", callback=_names, default="longmem,full,windowed", show_default=True, help="Which of these, by comma."
)
@click.option("--no-memory", is_flag=True, help="Do not measure peak memory (on a CPU a process for every point).")
@click.option("--seed", type=int, default=0, show_default=True, help="Of random weights and of the text.")
@machine_options
@folder_option("--out", help="Folder for efficiency.json and its picture.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON instead of a table.")
def efficiency(
    model: str | None,
    shape: str | None,
    backbone: str | None,
    contexts: list[int],
    window: int | None,
    memory_size: int | None,
    new_tokens: int,
    repeats: int,
    piece: int | None,
    budget: float,
    systems: tuple[str, ...],
    no_memory: bool,
    seed: int,
    device: str,
    dtype: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Time to the first token, per new token, tokens per second and peak memory, against the context.

    LongMem, with what lies beyond its window in memory, beside full attention of the same backbone over the same
    tokens (SDPA, key/value cache), and the backbone with the window alone. Where the backbone's positions end, full
    attention is left out and that is said; --random measures any shape at any length.
    """
    import torch
    from transformers.utils import logging

    from longmem.evaluation.efficiency import EfficiencySettings
    from longmem.evaluation.efficiency import efficiency as measure
    from longmem.evaluation.efficiency_plots import efficiency_figure
    from longmem.evaluation.efficiency_run import RandomShape, Source
    from longmem.evaluation.results import command_line, to_json, write_json
    from longmem.evaluation.themes import save

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    settings = EfficiencySettings(
        tuple(contexts), window, memory_size, new_tokens, repeats, piece, budget, systems, memory=not no_memory
    )
    random = None if shape is None else RandomShape.parse(shape)
    if True:  # goes with this command
        result = measure(
            Source(model, backbone, random, place, dtype, seed),
            settings,
            command=command_line(),
        )
    if out is not None:
        write_json(out / "efficiency.json", result)
        import json

        plain = json.loads(to_json(result))
        save(lambda theme: efficiency_figure(plain, theme), out / "efficiency.png")
        click.echo(f"wrote {out / 'efficiency.json'}", err=True)
    if as_json:
        click.echo(to_json(result))
    else:
        _show(result)


def _show(result: EfficiencyResult) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"window {result.window:,}, memory up to {result.memory_size:,} tokens, attention {result.attention}"
    table = Table("context", "system", title=title)
    for name in (
        "first token, s",
        "read, tokens/s",
        "per new token, ms",
        "generated, tokens/s",
        "peak, MiB beyond weights",
    ):
        table.add_column(name, justify="right")
    for point in result.points:
        table.add_row(f"{point.context:,}", point.system, *_cells(point))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for ratio in result.ratios:
        peak = "" if ratio.peak is None else f", memory {ratio.peak:.2f}"
        console.print(
            f"{ratio.context:,} tokens: {ratio.system} over longmem: first token {ratio.first_token.median:.2f}, "
            f"per token {ratio.per_token.median:.2f}{peak}",
            highlight=False,
        )
    for absent in result.left_out:
        console.print(f"{absent.context:,} tokens: {absent.system} left out: {absent.reason}", highlight=False)


def _cells(point: Point) -> list[str]:
    return [
        f"{point.first_token.median:.3g}",
        f"{point.read.median:,.0f}",
        f"{1e3 * point.per_token.median:.3g}",
        f"{point.generated.median:,.1f}",
        "-" if point.peak is None else f"{point.peak.beyond / 2**20:,.0f}",
    ]
