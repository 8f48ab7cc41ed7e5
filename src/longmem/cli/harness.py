"""``longmem eval harness``: tasks of lm-evaluation-harness, with what does not fit the window in memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longmem.cli.counts import TokenCount
from longmem.cli.outputs import folder_option
from longmem.errors import ConfigError

if TYPE_CHECKING:
    from longmem.evaluation.harness import HarnessResult


def _names(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    return [name.strip() for name in value.split(",") if name.strip()]


@click.command(
    epilog="Example: longmem eval harness --model runs/llama-sidenet --tasks sst2,boolq --num-fewshot 60 --limit 200",
)
@click.option("--model", required=True, help="LongMem checkpoint, run folder, or a causal LM by itself.")
@click.option("--tasks", required=True, callback=_names, help="Names by comma, as lm-evaluation-harness knows them.")
@click.option(
    "--include",
    multiple=True,
    type=click.Path(exists=True, file_okay=False),
    help="Folder with further tasks; repeatable.",
)
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples before each question; default: the task's.")
@click.option("--limit", type=click.IntRange(min=1), help="Take the first so many documents of each task.")
@click.option("--backbone", help="Where the backbone is, if not where the checkpoint says.")
@click.option("--control", help="SideNet checkpoint trained equally long without memory, over the same backbone.")
@click.option("--tokenizer", help="Folder or hub id; default: the model's, else its backbone's.")
@click.option("--memory-size", type=TokenCount(), help="Tokens each request remembers; default: the model's.")
@click.option("--window", type=click.IntRange(min=8), help="Tokens seen at once; default: as the backbone's positions.")
@click.option(
    "--batch", "rows", type=click.IntRange(min=1), default=8, show_default=True, help="Requests side by side."
)
@click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, ...; auto takes a GPU where there is one."
)
@click.option(
    "--dtype",
    type=click.Choice(("auto", "float32", "bfloat16", "float16")),
    default="auto",
    show_default=True,
    help="Of the weights; auto: as saved.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the choice of examples.")
@folder_option("--out", help="Folder for harness.json.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON instead of a table.")
def harness(
    model: str,
    tasks: list[str],
    include: tuple[str, ...],
    num_fewshot: int | None,
    limit: int | None,
    backbone: str | None,
    control: str | None,
    tokenizer: str | None,
    memory_size: int | None,
    window: int | None,
    rows: int,
    device: str,
    dtype: str,
    seed: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Tasks of lm-evaluation-harness, on the backbone alone, with memory switched off, and with memory.

    The harness cuts off the beginning of contexts that do not fit the window. With memory it is read instead, into a
    memory that belongs to the request alone: try more examples (--num-fewshot) than fit. Needs
    pip install 'longmem-lm[eval]'.
    """
    if not tasks:
        raise ConfigError("--tasks (none) must name at least one; `lm-eval ls tasks` lists them")
    import torch
    from transformers.utils import logging

    from longmem.evaluation.loading import load_comparison, load_tokenizer
    from longmem.evaluation.results import command_line, to_json, write_json

    try:
        from longmem.evaluation.harness import harness as evaluate
    except ImportError as problem:
        if (problem.name or "").partition(".")[0] != "lm_eval":
            raise
        raise ConfigError("lm-evaluation-harness is not installed; pip install 'longmem-lm[eval]'") from problem

    logging.disable_progress_bar()
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    loaded = load_comparison(
        model,
        backbone=backbone,
        control=control,
        memory_sizes=None if memory_size is None else [memory_size],
        tokenizer=tokenizer,
        device=place,
        dtype=None if dtype == "auto" else getattr(torch, dtype),
    )
    result = evaluate(
        loaded.comparison,
        load_tokenizer(loaded.tokenizer, loaded.comparison.model),
        tasks,
        window=loaded.default_window() if window is None else window,
        rows=rows,
        num_fewshot=num_fewshot,
        limit=limit,
        include=include,
        seed=seed,
        command=command_line(),
        config={"model": loaded.model, "tokenizer": loaded.tokenizer, "device": place, "dtype": dtype},
    )
    if out is not None:
        write_json(out / "harness.json", result)
    if as_json:
        click.echo(to_json(result))
    else:
        _show(result)


def _show(result: HarnessResult) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "metric", title=f"window of {result.header.config['window']} tokens")
    for label in result.systems.values():
        table.add_column(label, justify="right")
    for task, metrics in result.tasks.items():
        for metric, scores in metrics.items():
            table.add_row(task, metric, *(_cell(scores.get(system)) for system in result.systems))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    error = "" if score["stderr"] is None else f" ± {score['stderr']:.4f}"
    return f"{score['value']:.4f}{error}"
