"""``longmem eval squad``: answers to questions about passages, after demonstrations in the window and in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from longmem.cli.evaluating import comparison_options, open_comparison, run_and_show
from longmem.cli.tasks.icl import counts

if TYPE_CHECKING:
    from longmem.evaluation.runner import TaskResult


@click.command(
    epilog="Example: longmem eval squad --model runs/sidenet --train squad/train-v1.1.json --data squad/dev-v1.1.json "
    "--out results/squad",
)
@comparison_options
@click.option("--train", required=True, help="SQuAD v1.1 JSON file that demonstrations are drawn from.")
@click.option("--data", required=True, help="SQuAD v1.1 JSON file whose questions are asked.")
@click.option(
    "--local-shots", type=click.IntRange(min=0), default=3, show_default=True, help="Demonstrations in the window."
)
@click.option(
    "--memory-shots", callback=counts, default="0,200", show_default=True, help="Demonstrations in memory, by comma."
)
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True, help="Draws of demonstrations.")
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    default=200,
    show_default=True,
    help="Questions, drawn once with a fixed seed; 0 takes all.",
)
@click.option(
    "--max-answer-tokens",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Where an answer is cut that has no line end before.",
)
def squad(
    train: str,
    data: str,
    local_shots: int,
    memory_shots: tuple[int, ...],
    seeds: int,
    limit: int,
    max_answer_tokens: int,
    **shared: Any,
) -> None:
    """SQuAD v1.1: exact match and F1 of greedy answers, after questions that were answered before.

    Demonstrations are drawn from the training file, one question for each passage, the same for every system: some
    for the window, others that only memory holds. What does not fit the window is left out from the far end, of the
    question's own passage last, and the result says how much.
    """
    from longmem.evaluation.tasks.squad import SquadSettings, SquadTask
    from longmem.evaluation.tasks.squad_data import read_squad

    settings = SquadSettings(local_shots, memory_shots, seeds, limit or None, max_answer_tokens)
    files = read_squad(train), read_squad(data)  # before the models: wrong paths show at once
    opened = open_comparison(shared)
    task = SquadTask(*files, opened.tokenizer, settings)
    result = run_and_show(
        task,
        opened,
        shared,
        seeds=list(task.seeds),
        finish=lambda result: task.summarise(result, opened.askers),
    )
    if not shared["as_json"]:
        for line in cut_lines(result):
            click.echo(line)


def cut_lines(result: TaskResult) -> Iterator[str]:
    """What of demonstrations and passages did not fit, where something did not."""
    for group, systems in result.extra["shots"].items():
        local, memory = (int(number) for number in group.split(" + "))
        for name, seen in systems.items():
            parts = [f"{seen['window']:g} of {local} demonstrations fit the window"] if seen["window"] < local else []
            parts += [f"{seen['memory']:g} of {memory} are in memory"] if 0 < seen["memory"] < memory else []
            parts += [f"{seen['cut']:g} tokens of the passage are cut"] if seen["cut"] else []
            if parts:
                yield f"{group}, {name}: {', '.join(parts)} (means)"
