"""``longmem eval chapterbreak``: which of six beginnings is the next chapter's."""

from __future__ import annotations

from typing import Any

import click

from longmem.cli.counts import token_counts
from longmem.cli.evaluating import comparison_options, open_comparison, run_and_show


@click.command(
    epilog="Example: longmem eval chapterbreak --model models/small/sidenet "
    "--data data/chapterbreak/chapterbreak_ctx_8192.json --out results/chapterbreak",
)
@comparison_options
@click.option(
    "--data",
    required=True,
    multiple=True,
    help="chapterbreak_ctx_<N>.json, official or made by longmem data chapterbreak; may be repeated: for a prefix "
    "those files count whose N is just large enough.",
)
@click.option(
    "--prefix",
    callback=token_counts,
    default="4k,6k,8k",
    show_default=True,
    help="Tokens before the boundary, by comma.",
)
@click.option("--suffix-tokens", type=int, default=128, show_default=True, help="Of each suffix, the first ones.")
@click.option("--limit", type=int, help="Examples of each split, drawn with a seed; default: all.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of that draw.")
def chapterbreak(
    data: tuple[str, ...], prefix: list[int], suffix_tokens: int, limit: int | None, seed: int, **shared: Any
) -> None:
    """ChapterBreak: the true beginning of the next chapter against five of other chapters.

    The likeliest of six suffixes wins; chance is 16.7 %. Of the prefix, the window has what fits beside the suffix;
    systems with memory read the rest, others lose it. Reported apart for each split and prefix; intervals are over
    works.
    """
    from longmem.evaluation.tasks.chapterbreak import ChapterBreakSettings, ChapterBreakTask
    from longmem.evaluation.tasks.chapterbreak_data import files_for, read_chapterbreak

    settings = ChapterBreakSettings(tuple(prefix), suffix_tokens, limit, seed)
    files = [read_chapterbreak(path) for path in data]  # before the models: wrong paths show at once
    for length in settings.prefixes:
        files_for(files, length)
    opened = open_comparison(shared)
    run_and_show(ChapterBreakTask(files, opened.tokenizer, settings), opened, shared, seeds=[seed])
