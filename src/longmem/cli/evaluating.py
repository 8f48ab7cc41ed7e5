"""What all commands of ``longmem eval`` that compare systems share: options, loading, the run, the table.

Imports of torch wait until a command runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longmem.cli.counts import token_counts
from longmem.cli.outputs import folder_option

if TYPE_CHECKING:
    from longmem.evaluation.asking import Asker
    from longmem.evaluation.loading import Loaded
    from longmem.evaluation.runner import TaskResult
    from longmem.evaluation.task import Task

DTYPES = ("auto", "float32", "bfloat16", "float16")

Command = Callable[..., Any]


def model_options(command: Command) -> Command:
    """Which systems are compared."""
    return _with(
        command,
        click.option(
            "--model", required=True, help="LongMem or MemTRM checkpoint, run folder, or a causal LM by itself."
        ),
        click.option("--backbone", help="Where the backbone is, if not where the checkpoint says."),
        click.option(
            "--control", help="SideNet checkpoint trained equally long without memory, over the same backbone."
        ),
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
    return _with(
        command,
        click.option(
            "--device", default="auto", show_default=True, help="cpu, cuda, ...; auto takes a GPU where there is one."
        ),
        click.option(
            "--dtype",
            type=click.Choice(DTYPES),
            default="auto",
            show_default=True,
            help="Of the weights; auto: as saved.",
        ),
    )


def comparison_options(command: Command) -> Command:
    """All that ``open_comparison`` and ``run_and_show`` take."""
    command = _with(
        command,
        click.option(
            "--window",
            type=click.IntRange(min=2),
            help="Tokens seen at once; default: the backbone's positions, at most 1024.",
        ),
        click.option(
            "--full-context",
            type=click.IntRange(min=2),
            help="Also the backbone with a window of so many tokens, which holds what the others have in memory.",
        ),
        click.option(
            "--batch",
            "rows",
            type=click.IntRange(min=1),
            default=8,
            show_default=True,
            help="Sequences side by side.",
        ),
        click.option(
            "--resamples", type=click.IntRange(min=1), default=2000, show_default=True, help="Of the bootstrap."
        ),
        folder_option("--out", help="Folder for the result and for records to resume from."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON instead of a table."),
    )
    return model_options(machine_options(command))


@dataclass(frozen=True)
class Opened:
    """The systems of a command."""

    loaded: Loaded
    tokenizer: Any
    askers: list[Asker]
    window: int
    device: str

    @property
    def config(self) -> dict[str, Any]:
        return {"window": self.window, "device": self.device}


def open_comparison(shared: dict[str, Any]) -> Opened:
    """Load the systems that the options of ``comparison_options`` name.

    Raises:
        LongMemError: settings, checkpoints or their tokenizer are at fault.
    """
    import torch
    from transformers.utils import logging

    from longmem.evaluation.asking import askers
    from longmem.evaluation.loading import load_comparison, load_tokenizer

    logging.disable_progress_bar()
    device = shared["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = None if shared["dtype"] == "auto" else getattr(torch, shared["dtype"])
    names = ("backbone", "control", "memtrm", "training_free", "memory_sizes", "tokenizer")
    loaded = load_comparison(shared["model"], device=device, dtype=dtype, **{name: shared[name] for name in names})
    tokenizer = load_tokenizer(loaded.tokenizer, loaded.comparison.model)
    window = shared["window"] or loaded.default_window()
    found = askers(
        loaded.comparison,
        tokenizer,
        window=window,
        rows=shared["rows"],
        full_context=shared["full_context"],
        device=device,
    )
    return Opened(loaded, tokenizer, found, window, device)


def run_and_show(
    task: Task,
    opened: Opened,
    shared: dict[str, Any],
    *,
    seeds: Sequence[int] = (0,),
    finish: Callable[[TaskResult], TaskResult] | None = None,
) -> TaskResult:
    """Ask all systems, save the result and print it.

    Args:
        task: see ``longmem.evaluation.task``.
        opened: from ``open_comparison``.
        shared: the options of ``comparison_options``.
        seeds: of the choice of examples.
        finish: adds what else the task has to say before the result is saved.

    Returns:
        The result, for pictures of its own.
    """
    from longmem.evaluation.bootstrap import Bootstrap
    from longmem.evaluation.results import command_line
    from longmem.evaluation.runner import run_task

    names = ("backbone", "control", "memtrm", "training_free", "full_context", "rows", "dtype")
    out: Path | None = shared["out"]
    with examples_bar() as progress:
        result = run_task(
            task,
            opened.askers,
            records=None if out is None else out / "records.jsonl",
            bootstrap=Bootstrap(resamples=shared["resamples"]),
            command=command_line(),
            config={"model": opened.loaded.model, "tokenizer": opened.loaded.tokenizer}
            | opened.config
            | {name: shared[name] for name in names},
            seeds=seeds,
            progress=progress,
        )
    if finish is not None:
        result = finish(result)
    save(result, shared)
    if not shared["as_json"]:
        show(result)
    return result


def save(result: TaskResult, shared: dict[str, Any]) -> None:
    """Write ``OUT/<task>.json``, and print it where ``--json`` asks for that."""
    from longmem.evaluation.results import to_json, write_json

    if shared["out"] is not None:
        path = shared["out"] / f"{result.header.task}.json"
        write_json(path, result)
        click.echo(f"wrote {path}", err=True)
    if shared["as_json"]:
        click.echo(to_json(result))


def show(result: TaskResult) -> None:
    """The result's tables on stdout."""
    from rich.console import Console

    from longmem.cli.tables import task_tables

    console = Console(width=None if sys.stdout.isatty() else 120)
    for part in task_tables(result):
        console.print(part)


@contextmanager
def examples_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, one line for each system."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        yield advance


def _with(command: Command, *options: Callable[[Command], Command]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command
