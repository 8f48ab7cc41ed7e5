"""What all commands of ``longmem eval`` share: options, loading, the run, tables and files.

Imports of torch wait until a command runs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from longmem.cli.counts import token_counts
from longmem.cli.outputs import folder_option

if TYPE_CHECKING:
    from longmem.evaluation.loading import Loaded
    from longmem.evaluation.pages import Table

Command = Callable[..., Any]


def model_options(command: Command) -> Command:
    """Which systems are compared."""
    return _with(
        command,
        click.option("--model", required=True, help="LongMem or MemTRM checkpoint, run folder, or a causal LM."),
        click.option("--backbone", help="Where the backbone is, if not where the checkpoint says."),
        click.option("--control", help="SideNet trained equally long without memory, over the same backbone."),
        click.option("--memtrm", help="MemTRM checkpoint or run folder, trained from the same backbone."),
        click.option(
            "--training-free",
            multiple=True,
            metavar="GATE",
            help="Also memory attention on the bare backbone: the share (0 to 1) of its heads that memory gets, or the "
            "folder of a TrainingFree; may be repeated.",
        ),
        click.option("--tokenizer", help="Folder or hub id; default: the model's, else its backbone's."),
        click.option(
            "--memory-sizes",
            callback=token_counts,
            help="Tokens a row remembers, e.g. 1k,8k,64k; default: the model's own.",
        ),
    )


def machine_options(command: Command) -> Command:
    """Where and in which precision models run."""
    dtypes = click.Choice(("auto", "float32", "bfloat16", "float16"))
    return _with(
        command,
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, ...; auto takes a GPU if any."),
        click.option("--dtype", type=dtypes, default="auto", show_default=True, help="Of the weights; auto: as saved."),
    )


def run_options(command: Command) -> Command:
    """How much runs at once, and where results go."""
    positive = click.IntRange(min=1)
    return _with(
        command,
        click.option(
            "--window",
            type=click.IntRange(min=2),
            help="Tokens seen at once; default: the backbone's positions, at most 1024.",
        ),
        click.option("--batch", "rows", type=positive, default=8, show_default=True, help="Texts side by side."),
        click.option("--resamples", type=positive, default=2000, show_default=True, help="Of the bootstrap."),
        folder_option("--out", help="Folder for the result, pictures, and records to resume from."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON instead of tables."),
    )


def load(shared: dict[str, Any]) -> tuple[Loaded, Any, str]:
    """The systems that the options of ``model_options`` name, their tokenizer, and the device.

    Raises:
        LongMemError: settings, checkpoints or their tokenizer are at fault.
    """
    import torch
    from transformers.utils import logging

    from longmem.evaluation.loading import checked_device, load_comparison, load_tokenizer

    logging.disable_progress_bar()
    device = checked_device(shared["device"])
    dtype = None if shared["dtype"] == "auto" else getattr(torch, shared["dtype"])
    names = ("backbone", "control", "memtrm", "training_free", "memory_sizes", "tokenizer")
    given = {name: shared[name] for name in names if name in shared}
    loaded = load_comparison(shared["model"], device=device, dtype=dtype, **given)
    return loaded, load_tokenizer(loaded.tokenizer, loaded.comparison.model), device


def save_and_show(result: Any, shared: dict[str, Any]) -> None:
    """Write ``OUT/<task>.json`` and pictures, and print tables, or with ``--json`` the result."""
    from longmem.evaluation.plots import plot_all
    from longmem.evaluation.results import to_json, write_json
    from longmem.evaluation.tables import tables_of

    text = to_json(result)
    plain = json.loads(text)
    if shared["out"] is not None:
        path = shared["out"] / f"{plain['header']['task']}.json"
        write_json(path, result)
        for written in (path, *plot_all(plain, shared["out"])):
            click.echo(f"wrote {written}", err=True)
    if shared["as_json"]:
        click.echo(text)
        return
    show(tables_of(plain))


def show(tables: Sequence[Table]) -> None:
    """Tables on stdout, as wide as the terminal, or ``COLUMNS``, or 120; wider ones row by row."""
    from longmem.evaluation.pages import plain

    width = shutil.get_terminal_size((120, 24)).columns
    for table in tables:
        click.echo("\n" + plain(table, width))


def _with(command: Command, *options: Callable[[Command], Command]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command
