"""``longmem demo``: a trained pair remembers texts, and what that changes is shown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from longmem.cli.outputs import folder_option

if TYPE_CHECKING:
    from longmem.demo import Demo

EXAMPLES = 4


@click.command(name="demo", epilog="Example: longmem demo sqlite3 my-book.txt --out runs/demo")
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@click.option("--model", help="Folder or hub id of a LongMem; default: the pair in models/small.")
@folder_option("--out", default=Path("runs/demo"), show_default=True, help="Where all of it goes.")
@click.option("--json", "as_json", is_flag=True, help="Print numbers and files as JSON.")
def command(texts: tuple[str, ...], model: str | None, out: Path, as_json: bool) -> None:
    """Let the shipped pair remember texts, and show what that changes.

    A TEXT is a file, a folder, an archive, or the name of a Python package (json, sqlite3, rich); by default two
    packages of the standard library that the pair was not trained on. Their beginnings go into a memory store.
    Then: perplexity with and without memory, and how the first text goes on, with what every token of that reads.
    """
    from transformers.utils import logging

    from longmem.demo import DEFAULT_TEXTS, run_demo

    logging.disable_progress_bar()
    made = run_demo(out, texts or DEFAULT_TEXTS, model=model, say=lambda line: click.echo(line, err=True))
    if as_json:
        plain = asdict(made) | {"store": str(made.store), "page": str(made.page)}
        click.echo(json.dumps(plain | {"perplexity": made.perplexity}))
    else:
        _show(made)


def _show(made: Demo) -> None:
    from longmem.evaluation.pages import plain
    from longmem.evaluation.tables import tables_of

    table = tables_of(made.perplexity)[0]
    click.echo("\n" + plain(table, shutil.get_terminal_size((120, 24)).columns))
    click.echo("\n".join(_continuation(made)))
    click.echo(
        f"\nevery token of it, and what it read: {made.page}\n{made.tokens:,} tokens are kept in {made.store}; go on "
        f"with: longmem memory list --store {made.store}"
    )


def _continuation(made: Demo) -> Iterator[str]:
    mean = sum(token.gain for token in made.read) / len(made.read)
    yield f"\n{made.document} goes on after the part that was remembered:"
    yield from _bars(made.prompt[-400:])
    for title, text in (
        (f"the text itself (with memory {mean:+.2f} nats a token likelier)", made.real),
        ("with memory", made.with_memory),
        ("without", made.without),
    ):
        yield f"\n{title}:"
        yield from _bars(text)
    yield "\nwhat helped most:"
    for token in sorted(made.read, key=lambda token: -token.gain)[:EXAMPLES]:
        yield f"  {_visible(token.text)} {token.gain:+.2f} nats, read:"
        for chunk in token.found[:2]:
            around = " ".join(f"{chunk.before}[[{chunk.text}]]{chunk.after}".split())
            yield f"    {chunk.share:5.1%}  {chunk.document}, token {chunk.start_token:,}: {around}"


def _bars(text: str) -> Iterator[str]:
    yield from ("  │ " + line for line in text.splitlines())


def _visible(text: str) -> str:
    return "“" + text.replace("\n", "↵").replace(" ", "␣") + "”"
