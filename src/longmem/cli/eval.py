"""``longmem eval``: measurements of a model on long text."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import click

from longmem.cli.counts import TokenCount
from longmem.cli.evaluating import machine_options, model_options
from longmem.cli.harness import harness
from longmem.cli.outputs import folder_option
from longmem.cli.tasks.ablate import ablate
from longmem.cli.tasks.chapterbreak import chapterbreak
from longmem.cli.tasks.dialogue import dialogue
from longmem.cli.tasks.efficiency import efficiency
from longmem.cli.tasks.icl import icl
from longmem.cli.tasks.needle import needle
from longmem.cli.tasks.squad import squad

if TYPE_CHECKING:
    from longmem.evaluation.perplexity import PerplexityResult


@click.group()
def command() -> None:
    """Measure a model on long text."""


command.add_command(chapterbreak)
command.add_command(dialogue)
command.add_command(ablate)
command.add_command(efficiency)
command.add_command(harness)
command.add_command(icl)
command.add_command(needle)
command.add_command(squad)


@command.command(
    epilog="Example: longmem eval perplexity --model runs/latex-sidenet --data latex/test.tar.xz "
    "--memory-sizes 1k,8k,64k --group-by-prefix __ --out results/latex",
)
@model_options
@click.option("--data", required=True, multiple=True, help="File, folder, .jsonl or archive; may be repeated.")
@click.option("--include", multiple=True, help="Pattern of the document ids to take; may be repeated.")
@click.option("--num-documents", type=click.IntRange(min=1), help="Take the first so many documents.")
@click.option("--max-tokens", type=TokenCount(2), help="Take the first so many tokens of each document.")
@click.option("--protocol", default="segments,sliding", show_default=True, help="Which protocols, by comma.")
@click.option("--window", type=int, help="Tokens seen at once; default: the backbone's positions, at most 1024.")
@click.option("--stride", type=int, help="How far the sliding window moves; default: half the window.")
@click.option("--batch", "rows", type=int, default=8, show_default=True, help="Documents side by side.")
@click.option("--group-by-prefix", "separator", help="Report documents apart by their file name up to this string.")
@machine_options
@click.option("--resamples", type=int, default=2000, show_default=True, help="Of the bootstrap.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the bootstrap.")
@folder_option("--out", help="Folder for perplexity.json, curves, and records to resume from.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON instead of a table.")
def perplexity(
    model: str,
    backbone: str | None,
    control: str | None,
    memtrm: str | None,
    training_free: tuple[str, ...],
    tokenizer: str | None,
    data: tuple[str, ...],
    include: tuple[str, ...],
    num_documents: int | None,
    max_tokens: int | None,
    memory_sizes: list[int] | None,
    protocol: str,
    window: int | None,
    stride: int | None,
    rows: int,
    separator: str | None,
    device: str,
    dtype: str,
    resamples: int,
    seed: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Perplexity with and without memory, segment by segment and under a sliding window.

    Every document is streamed from its beginning with an empty memory. Compared on the same tokens: the backbone
    alone, the SideNet with memory switched off, LongMem at each memory size, and where they are named a SideNet trained
    without memory (--control), a Memorizing Transformer (--memtrm) and untrained memory attention (--training-free).
    Differences come with bootstrap intervals over documents and over blocks. With --out, an interrupted run goes on
    where it stopped.
    """
    import torch
    from rich.console import Console
    from transformers.utils import logging

    from longmem.cli.tables import perplexity_tables
    from longmem.data.text import TextSource, read_documents
    from longmem.evaluation import perplexity as evaluation
    from longmem.evaluation.bootstrap import Bootstrap
    from longmem.evaluation.documents import tokenize_documents
    from longmem.evaluation.loading import load_comparison, load_tokenizer
    from longmem.evaluation.results import command_line, to_json, write_json

    logging.disable_progress_bar()
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    source = TextSource(tuple(data), include=include)
    texts = list(islice(read_documents(source), num_documents))  # before the model: wrong paths show at once
    loaded = load_comparison(
        model,
        backbone=backbone,
        control=control,
        memtrm=memtrm,
        training_free=training_free,
        memory_sizes=memory_sizes,
        tokenizer=tokenizer,
        device=place,
        dtype=None if dtype == "auto" else getattr(torch, dtype),
    )
    settings = evaluation.PerplexitySettings(
        window=loaded.default_window() if window is None else window,
        stride=stride,
        protocols=tuple(name.strip() for name in protocol.split(",")),
        rows=rows,
        bootstrap=Bootstrap(resamples=resamples, seed=seed),
    )
    documents = tokenize_documents(
        texts,
        load_tokenizer(loaded.tokenizer, loaded.comparison.model),
        max_tokens=max_tokens,
        group_separator=separator,
    )
    with _Bar() as bar:
        result = evaluation.perplexity(
            loaded.comparison,
            documents,
            settings,
            device=place,
            records=None if out is None else out / "records.jsonl",
            command=command_line(),
            config={
                "model": loaded.model,
                "control": control,
                "memtrm": memtrm,
                "training_free": list(training_free),
                "tokenizer": loaded.tokenizer,
                "data": list(data),
                "include": list(include),
                "num_documents": num_documents,
                "max_tokens": max_tokens,
                "device": place,
                "dtype": dtype,
            },
            progress=bar.advance,
        )
    if out is not None:
        write_json(out / "perplexity.json", result)
        _plot(result, out)
    if as_json:
        click.echo(to_json(result))
    else:
        console = Console(width=None if sys.stdout.isatty() else 120)
        for part in perplexity_tables(result):
            console.print(part)


def _plot(result: PerplexityResult, out: Path) -> None:
    from longmem.evaluation.plots import plot_all

    for path in plot_all(result, out):
        click.echo(f"wrote {path}", err=True)


class _Bar:
    """A progress bar on stderr, one line for each protocol."""

    def __enter__(self) -> _Bar:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens, all systems"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.tasks: dict[str, TaskID] = {}
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def advance(self, what: str, done: int, total: int) -> None:
        if what not in self.tasks:
            self.tasks[what] = self.progress.add_task(what, total=total)
        self.progress.update(self.tasks[what], completed=done)
