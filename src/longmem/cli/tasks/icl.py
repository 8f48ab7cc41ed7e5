"""``longmem eval icl``: label short texts after demonstrations in the window and in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from longmem.cli.evaluating import comparison_options, open_comparison, run_and_show

if TYPE_CHECKING:
    from longmem.evaluation.runner import TaskResult


def names(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip())


def counts(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """``0,200,2000`` as numbers."""
    try:
        return tuple(int(word) for word in names(context, parameter, value))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers; try 0,200,2000") from None


@click.command(
    epilog="Example: longmem eval icl --model models/small/sidenet --data data/icl --datasets sst2,subj "
    "--limit 20 --out results/icl",
)
@comparison_options
@click.option(
    "--data", required=True, help="Folder with the folders of the sets: SST-2, mr, subj, sst-5, mpqa; see the docs."
)
@click.option(
    "--datasets", callback=names, default="sst2,mr,subj,sst5,mpqa", show_default=True, help="Which sets, by comma."
)
@click.option(
    "--split",
    type=click.Choice(("released", "dev", "test")),
    default="released",
    show_default=True,
    help="What is asked; released: dev of SST-2 and SST-5, test of the others, as the released script has it.",
)
@click.option(
    "--local-shots", callback=counts, default="4,20", show_default=True, help="Demonstrations in the window, by comma."
)
@click.option(
    "--memory-shots",
    callback=counts,
    default="0,200,2000",
    show_default=True,
    help="Demonstrations in memory, by comma.",
)
@click.option("--seeds", type=click.IntRange(min=1), default=6, show_default=True, help="Draws of demonstrations.")
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    default=30,
    show_default=True,
    help="Test texts of each set, drawn once with a fixed seed, not stratified; 0 takes all.",
)
def icl(
    data: str,
    datasets: tuple[str, ...],
    split: Any,
    local_shots: tuple[int, ...],
    memory_shots: tuple[int, ...],
    seeds: int,
    limit: int,
    **shared: Any,
) -> None:
    """In-context learning: sentiment and subjectivity of short texts, after labelled examples.

    Every seed draws demonstrations, the same for every system: some for the window, nearest to the question, and others
    that only memory holds. An answer is right if the first token begins the label, as the released script has it; if
    the label is the likeliest of all; and if it is so after contextual calibration. Demonstrations that do not fit the
    window are left out from the far end, and the result says how many are left.
    """
    from longmem.evaluation.bootstrap import Bootstrap
    from longmem.evaluation.tasks.icl import IclSettings, IclTask
    from longmem.evaluation.tasks.icl_data import read_icl
    from longmem.evaluation.tasks.icl_summary import summarise

    settings = IclSettings(local_shots, memory_shots, seeds, limit or None)
    sets = read_icl(data, datasets, split)  # before the models: wrong paths show at once
    opened = open_comparison(shared)
    task = IclTask(sets, opened.tokenizer, settings)
    result = run_and_show(
        task,
        opened,
        shared,
        seeds=list(task.seeds),
        finish=lambda result: summarise(result, task, opened.askers, Bootstrap(resamples=shared["resamples"])),
    )
    if not shared["as_json"]:
        for line in shots_lines(result):
            click.echo(line)


def shots_lines(result: TaskResult) -> list[str]:
    """How many demonstrations each system had before it, where not all of them fit."""
    who: dict[str, dict[str, None]] = {}
    for group, systems in result.extra["shots"].items():
        dataset, _, shots = group.rpartition(", ")
        local, memory = (int(number) for number in shots.split(" + "))
        for name, seen in systems.items():
            if seen["window"] < local:
                line = f"{dataset}: {seen['window']:g} of {local} demonstrations fit the window"
                who.setdefault(line, {})[name] = None
            if 0 < seen["memory"] < memory:
                line = f"{dataset}: {seen['memory']:g} of {memory:,} demonstrations for memory are held"
                who.setdefault(line, {})[name] = None
    return [f"{line}, on average ({', '.join(names)})" for line, names in who.items()]
