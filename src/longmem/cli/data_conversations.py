"""``longmem data conversations``: a small conversation set in the shape of LoCoMo."""

from __future__ import annotations

import json
from pathlib import Path

import click

from longmem.cli.outputs import file_option


@click.command(
    epilog="Example: longmem data conversations --out data/conversations.json --seed 0",
)
@file_option("--out", required=True, help="JSON file to write.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything that is drawn.")
@click.option("--conversations", type=int, default=10, show_default=True, help="How many.")
@click.option("--sessions", type=int, default=6, show_default=True, help="Of each.")
@click.option("--turns", type=int, default=16, show_default=True, help="Of each session, at least.")
@click.option("--facts", type=int, default=6, show_default=True, help="Told by each speaker, besides two journeys.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def conversations(
    out: Path, seed: int, conversations: int, sessions: int, turns: int, facts: int, as_json: bool
) -> None:
    """Make conversations over several sessions, with questions about the earlier ones.

    From templates; names, places and dates are drawn. The file has the shape of locomo10.json and is for longmem eval
    dialogue.
    """
    from longmem.data.conversations import ConversationSettings, make_conversations
    from longmem.files import write_whole

    made = make_conversations(ConversationSettings(conversations, sessions, turns, facts, seed))
    write_whole(out, [json.dumps(made, indent=1), "\n"])
    questions = sum(len(sample["qa"]) for sample in made)
    if as_json:
        click.echo(json.dumps({"data": str(out), "conversations": len(made), "questions": questions}, indent=1))
    else:
        click.echo(f"{out}: {len(made)} conversations, {questions} questions")
