"""What all commands of ``longmem eval`` share: options, loading, the run, tables and files.

Imports of torch wait until a command runs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from longmem.cli.common import folder_option, options, together, token_counts

if TYPE_CHECKING:
    from longmem.evaluation.loading import Loaded
    from longmem.evaluation.tables import Table

MODEL = together(
    click.option("--model", required=True, help="LongMem or MemTRM checkpoint, run folder, or a causal LM."),
    options("backbone"),
    click.option("--control", help="SideNet trained equally long without memory, over the same backbone."),
    click.option("--memtrm", help="MemTRM checkpoint or run folder, trained from the same backbone."),
    click.option("--training-free", multiple=True, metavar="GATE", help="Also memory attention on the bare backbone: "
                 "the share (0 to 1) of its heads that memory gets, or the folder of a TrainingFree; may be repeated."),
    options("tokenizer"),
    click.option("--memory-sizes", callback=token_counts, help="Tokens a row remembers, e.g. 1k,8k,64k; default: the "
                 "model's own."),
)  # fmt: skip
"""Options that say which systems are compared."""
RUN = together(
    options("device", "dtype"),
    click.option("--window", type=click.IntRange(min=2), help="Tokens seen at once; default: the backbone's positions, "
                 "at most 1024."),
    click.option("--batch", "rows", type=click.IntRange(min=1), default=8, help="Texts side by side."),
    click.option("--resamples", type=click.IntRange(min=1), default=2000, help="Of the bootstrap."),
    folder_option("--out", help="Folder for the result, pictures, and records to resume from."),
    options("json"),
)  # fmt: skip
"""Options that say where models run, how much runs at once, and where results go."""


def load(shared: dict[str, Any]) -> tuple[Loaded, Any, str]:
    """The systems that the options of ``MODEL`` name, their tokenizer, and the device.

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
    from longmem.evaluation.tables import plain

    width = shutil.get_terminal_size((120, 24)).columns
    for table in tables:
        click.echo("\n" + plain(table, width))
