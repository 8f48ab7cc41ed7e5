"""``longmem eval``: measurements of a model on long text."""

from __future__ import annotations

from itertools import islice
from typing import Any

import click

from longmem.cli.common import options, token_count
from longmem.cli.evaluating import MODEL, RUN, load, save_and_show
from longmem.cli.tasks import COMMANDS


@click.group()
def command() -> None:
    """Measure a model on long text."""


for _task in COMMANDS:
    command.add_command(_task)


def _protocols(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    if not names or set(names) - {"segments", "sliding"}:
        raise click.BadParameter(f"{value!r} must name segments, sliding, or both by comma")
    return names


@command.command(
    epilog="Example: longmem eval perplexity --model models/small/sidenet --data latex/test.tar.xz "
    "--memory-sizes 1k,8k,64k --group-by-prefix __ --out runs/latex"
)
@MODEL
@click.option("--data", required=True, multiple=True, help="File, folder, .jsonl or archive; may be repeated.")
@click.option("--include", multiple=True, help="Pattern of the document ids to take; may be repeated.")
@click.option("--num-documents", type=click.IntRange(min=1), help="Take the first so many documents.")
@click.option("--max-tokens", type=token_count(2), help="Take the first so many tokens of each document.")
@click.option("--protocol", callback=_protocols, default="segments,sliding", help="Which, by comma.")
@click.option("--stride", type=click.IntRange(min=1), help="How far the sliding window moves; default: half of it.")
@click.option(
    "--group-by-prefix",
    "separator",
    help="Report documents apart by their file name up to this string. Without it they are projects up to __, of which "
    "intervals draw.",
)
@RUN
@options("seed")
def perplexity(data: tuple[str, ...], max_tokens: int | None, **shared: Any) -> None:
    """Perplexity with and without memory, segment by segment and under a sliding window.

    Every document is streamed from its beginning with an empty memory. Compared on the same tokens: the backbone
    alone, the SideNet with memory switched off, LongMem at each memory size, and where they are named a SideNet trained
    without memory (--control), a Memorizing Transformer (--memtrm) and untrained memory attention (--training-free).
    Differences come with bootstrap intervals that draw projects and then their documents. With --out, an interrupted
    run goes on where it stopped.
    """
    from longmem.data.text import TextSource, read_documents
    from longmem.evaluation import perplexity as evaluation
    from longmem.evaluation.documents import tokenize_documents
    from longmem.evaluation.results import Bootstrap, command_line

    # before the model: wrong paths show at once
    texts = list(islice(read_documents(TextSource(data, include=shared["include"])), shared["num_documents"]))
    loaded, tokenizer, device = load(shared)
    settings = evaluation.PerplexitySettings(
        window=shared["window"] or loaded.default_window(),
        stride=shared["stride"],
        protocols=shared["protocol"],
        rows=shared["rows"],
        bootstrap=Bootstrap(resamples=shared["resamples"], seed=shared["seed"]),
    )
    out = shared["out"]
    result = evaluation.perplexity(
        loaded.comparison,
        tokenize_documents(texts, tokenizer, max_tokens=max_tokens, group_separator=shared["separator"]),
        settings,
        device=device,
        records=None if out is None else out / "records.jsonl",
        command=command_line(),
        config={name: shared[name] for name in ("control", "memtrm", "dtype", "num_documents")}
        | {
            "model": loaded.model,
            "training_free": list(shared["training_free"]),
            "tokenizer": loaded.tokenizer,
            "data": list(data),
            "include": list(shared["include"]),
            "max_tokens": max_tokens,
            "device": device,
        },
    )
    save_and_show(result, shared)
