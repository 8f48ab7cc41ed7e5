"""``longmem demo``: all of it on a small scale."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from longmem.demo.reading import Passage, TokenReading

EXAMPLES = 4


@click.command(name="demo", epilog="Example: longmem demo --minutes 8 4 --out runs/longer-demo")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True, help="Where all of it goes."
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0.01),
    nargs=2,
    help="Training time of backbone and SideNet, instead of 3.5 and 1.75.",
)
@click.option("--json", "as_json", is_flag=True, help="Print numbers and files as JSON.")
def command(out: Path, minutes: tuple[float, float] | None, as_json: bool) -> None:
    """Train and look into a small LongMem on this machine's own text.

    Learns a tokenizer, a small backbone and a SideNet from the source files of Python's standard library, whole
    packages as documents; measures perplexity on packages that were held out, with and without memory; and shows what
    every token of a held-out passage found in memory, on a page and in a picture. What is there already is used again.
    """
    from rich.console import Console
    from transformers.utils import logging

    from longmem.cli.tables import system_table
    from longmem.demo.run import perplexity_rows, run_demo

    logging.disable_progress_bar()
    with _measuring() as progress:
        result = run_demo(out, minutes=minutes, say=lambda line: click.echo(line, err=True), progress=progress)
    if as_json:
        files = {
            "page": str(result.page),
            "picture": str(result.picture),
            "perplexity": perplexity_rows(result.perplexity),
        }
        click.echo(json.dumps(files))
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    for name, protocol in result.perplexity.protocols.items():
        console.print(f"\n{name}: window {protocol.window}, moved by {protocol.stride}; {protocol.all.tokens:,} tokens")
        console.print(system_table(result.perplexity, protocol.all))
    click.echo("% of perplexity per token, below 0 is better; 95 % [over documents] (over blocks of tokens)")
    for line in passage_lines(result.passage):
        console.print(line, markup=False, highlight=False)
    click.echo(f"\nevery token of the passage: {result.page}\nas a picture: {result.picture}")


def passage_lines(passage: Passage) -> Iterator[str]:
    """The passage, and what the tokens found whose next one memory made most likely."""
    yield f"\n{passage.file}, held out from training; {passage.memory_tokens:,} tokens of its package in memory:\n"
    yield from ("  │ " + line for line in "".join(token.text for token in passage.tokens).splitlines())
    tokens = list(enumerate(passage.tokens[:-1]))
    helped = sorted(tokens, key=lambda pair: pair[1].next_without - pair[1].next_with)[:EXAMPLES]
    for number, token in sorted(helped):
        following = passage.tokens[number + 1].text
        yield (
            f"\nafter {_visible(token.text)} (share given to memory {token.share:.0%}), the next token "
            f"{_visible(following)} has {token.next_with:.0%} with memory and {token.next_without:.0%} without; found:"
        )
        yield from _found(passage, token)


def _found(passage: Passage, token: TokenReading) -> Iterator[str]:
    for number, part in token.found[:3]:
        chunk = passage.chunks[number]
        around = " ".join((chunk.before + "[[" + chunk.text + "]]" + chunk.after).split())
        yield f"  {part:5.1%}  {chunk.file}, {chunk.tokens_back:,} tokens back: {around}"


def _visible(text: str) -> str:
    return "“" + text.replace("\n", "↵").replace(" ", "␣") + "”"


@contextmanager
def _measuring() -> Iterator[Any]:
    """A progress callback that draws a bar once it is called, on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    tasks: dict[str, Any] = {}

    def advance(what: str, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        if not tasks:
            bar.start()
        if what not in tasks:
            tasks[what] = bar.add_task(f"measuring, {what}", total=total)
        bar.update(tasks[what], completed=done)

    try:
        yield advance
    finally:
        bar.stop()
