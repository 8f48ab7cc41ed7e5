"""``longmem demo``: a memory at work, in about a minute; or all of it from scratch, in some more."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longmem.cli.outputs import folder_option

if TYPE_CHECKING:
    from longmem.demo.reading import Passage, TokenReading
    from longmem.demo.remembering import Continuation, Remembered
    from longmem.evaluation.perplexity import PerplexityResult

EXAMPLES = 4


@click.command(name="demo", epilog="Example: longmem demo sqlite3 my-book.txt --out runs/demo")
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@click.option("--model", type=click.Path(path_type=Path), help="Folder of a SideNet; default: the pair in models/.")
@folder_option("--out", default=Path("runs/demo"), show_default=True, help="Where all of it goes.")
@click.option("--train", is_flag=True, help="Train a small pair first, on the standard library's source.")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0.01),
    nargs=2,
    help="With --train: time for backbone and SideNet, instead of 3.5 and 1.75.",
)
@click.option("--json", "as_json", is_flag=True, help="Print numbers and files as JSON.")
def command(
    texts: tuple[str, ...],
    model: Path | None,
    out: Path,
    train: bool,
    minutes: tuple[float, float] | None,
    as_json: bool,
) -> None:
    """Let the shipped pair remember texts, and show what that changes.

    A TEXT is a file, a folder, an archive, or the name of a Python package (json, sqlite3, rich); by default two
    packages of the standard library that the pair was not trained on. Their beginnings go into a memory store.
    Then: perplexity with and without memory, what every token of a passage found, and how the text is continued.

    With --train, tokenizer, backbone and SideNet are trained first from the standard library's source, some packages
    held out, in six minutes or as long as --minutes says.
    """
    from transformers.utils import logging

    if train and (texts or model is not None):
        raise click.UsageError("--train makes its own model and text; name neither TEXT nor --model")
    if minutes is not None and not train:
        raise click.UsageError("--minutes is for --train")
    logging.disable_progress_bar()

    def say(line: str) -> None:
        click.echo(line, err=True)

    if train:
        from longmem.demo.run import run_demo

        trained = run_demo(out, minutes=minutes, say=say)
        result, passage, files, made = trained.perplexity, trained.passage, [trained.page, trained.picture], None
    else:
        from longmem.demo.remembering import DEFAULT_TEXTS, remember

        made = remember(out, texts or DEFAULT_TEXTS, model=model, say=say)
        result, passage, files = made.perplexity, made.passage, [made.page, made.picture]
    if as_json:
        click.echo(json.dumps(_plain(result, files, made)))
    else:
        _show(result, passage, files, made)


def _plain(result: PerplexityResult, files: list[Path], made: Remembered | None) -> dict[str, Any]:
    from longmem.demo.page import perplexity_rows

    plain: dict[str, Any] = {"page": str(files[0]), "picture": str(files[1]), "perplexity": perplexity_rows(result)}
    if made is not None:
        plain |= {"store": str(made.store), "tokens": made.tokens, "continuation": asdict(made.continuation)}
    return plain


def _show(result: PerplexityResult, passage: Passage, files: list[Path], made: Remembered | None) -> None:
    from rich.console import Console

    from longmem.cli.evaluating import show
    from longmem.evaluation.results import to_json
    from longmem.evaluation.tables import tables_of

    console = Console(width=None if sys.stdout.isatty() else 120)
    show(tables_of(json.loads(to_json(result)))[:1])
    lines = passage_lines(passage)
    for line in lines if made is None else (*lines, *continuation_lines(made.continuation)):
        console.print(line, markup=False, highlight=False)
    click.echo(f"\nevery token of the passage: {files[0]}\nas a picture: {files[1]}")
    if made is not None:
        click.echo(
            f"{made.tokens:,} tokens are kept in {made.store} ({made.size / 2**20:.1f} MiB); go on with "
            f"longmem memory list --store {made.store}"
        )


def continuation_lines(found: Continuation) -> Iterator[str]:
    """What comes next in the text, and what the model would have written."""
    yield f"\n{found.document} goes on behind what was remembered:\n"
    yield from _bars(found.prompt[-400:])
    for title, text in (
        ("the text itself", found.real),
        (f"with memory (the text itself would cost {found.loss_with:.2f} nats a token)", found.with_memory),
        (f"without ({found.loss_without:.2f})", found.without),
    ):
        yield f"\n{title}:"
        yield from _bars(text)


def passage_lines(passage: Passage) -> Iterator[str]:
    """The passage, and what the tokens found whose next one memory made most likely."""
    yield f"\n{passage.file}; {passage.memory_tokens:,} tokens before it in memory:\n"
    yield from _bars("".join(token.text for token in passage.tokens))
    tokens = list(enumerate(passage.tokens[:-1]))
    helped = sorted(tokens, key=lambda pair: pair[1].next_without - pair[1].next_with)[:EXAMPLES]
    for number, token in sorted(helped):
        following = passage.tokens[number + 1].text
        yield (
            f"\nafter {_visible(token.text)} (share given to memory {token.share:.0%}), the next token "
            f"{_visible(following)} has {token.next_with:.0%} with memory and {token.next_without:.0%} without; found:"
        )
        yield from _found(passage, token)


def _bars(text: str) -> Iterator[str]:
    yield from ("  │ " + line for line in text.splitlines())


def _found(passage: Passage, token: TokenReading) -> Iterator[str]:
    for number, part in token.found[:3]:
        chunk = passage.chunks[number]
        around = " ".join((chunk.before + "[[" + chunk.text + "]]" + chunk.after).split())
        yield f"  {part:5.1%}  {chunk.file}, {chunk.tokens_back:,} tokens back: {around}"


def _visible(text: str) -> str:
    return "“" + text.replace("\n", "↵").replace(" ", "␣") + "”"
