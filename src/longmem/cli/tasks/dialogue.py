"""``longmem eval dialogue``: questions and replies after many sessions."""

from __future__ import annotations

from typing import Any

import click

from longmem.cli.evaluating import comparison_options, open_comparison, run_and_show


@click.command(
    epilog="Example: longmem eval dialogue --model models/small/sidenet --data data/conversations.json "
    "--out results/dialogue",
)
@comparison_options
@click.option(
    "--data",
    required=True,
    multiple=True,
    help="locomo10.json, session_N/test.txt of MSC, or what longmem data conversations made; may be repeated.",
)
@click.option(
    "--recent",
    type=int,
    help="Tokens of the newest session that stand in the window; default: half of it. All before is for memory.",
)
@click.option("--new-tokens", type=int, help="Of an answer, at most; default: 50, or a quarter of the window.")
@click.option("--conversations", type=int, help="The first so many of each file; default: all.")
@click.option("--questions", type=int, help="Of each conversation, drawn with a seed; default: all.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of that draw, and of the order of adversarial choices."
)
def dialogue(
    data: tuple[str, ...],
    recent: int | None,
    new_tokens: int | None,
    conversations: int | None,
    questions: int | None,
    seed: int,
    **shared: Any,
) -> None:
    """Conversations over several sessions: later questions (LoCoMo) and replies (MSC).

    Sessions go to memory; the newest tokens of them and the question are in the window of every system. Scored by F1
    of words, BLEU-4 (needs pip install 'longmem-lm[eval]') and the likelihood of the reference answer. Reported apart
    for each category of LoCoMo and each session of MSC; intervals are over conversations.
    """
    from longmem.evaluation.tasks.dialogue import DialogueSettings, DialogueTask
    from longmem.evaluation.tasks.dialogue_data import read_dialogues
    from longmem.evaluation.tasks.dialogue_metrics import bleu

    bleu("", "")  # before the models: an extra that is missing, and wrong paths, show at once
    files = [read_dialogues(path) for path in data]
    opened = open_comparison(shared)
    settings = DialogueSettings.for_window(
        opened.window,
        recent=recent,
        conversations=conversations,
        questions=questions,
        seed=seed,
        **({} if new_tokens is None else {"new_tokens": new_tokens}),
    )
    answers = None if shared["out"] is None else shared["out"] / "answers.jsonl"
    run_and_show(DialogueTask(files, opened.tokenizer, settings, answers), opened, shared, seeds=[seed])
