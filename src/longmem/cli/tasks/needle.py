"""``longmem eval needle``: facts hidden in long text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from longmem.cli.counts import token_counts
from longmem.cli.evaluating import comparison_options, open_comparison, run_and_show
from longmem.cli.outputs import folder_option

MOST_DEPTHS = 1001


def _depths(context: click.Context, parameter: click.Parameter, value: str) -> list[float]:
    """``0,50,100``, or one number: so many, evenly spaced."""
    try:
        depths = [float(word) for word in value.split(",") if word.strip()]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of depths in %; try 0,50,100 or 11") from None
    if len(depths) != 1:
        return depths
    count = depths[0]
    if not 1 <= count <= MOST_DEPTHS or count != int(count):
        raise click.BadParameter(
            f"{value!r}: one number says how many depths there are, 1 to {MOST_DEPTHS}; try 5, or 0,50,100"
        )
    return [50.0] if count == 1 else [round(100 * at / (count - 1), 3) for at in range(int(count))]


def _names(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    return [name.strip() for name in value.split(",") if name.strip()]


@click.command(
    epilog="Example: longmem eval needle --model models/needle --lengths 4k,16k,64k,1m --depths 5 --trials 40 "
    "--out results/needle",
)
@comparison_options
@click.option(
    "--data",
    multiple=True,
    help="File, folder, .jsonl or archive of text; may be repeated. Default: the source of Python's standard library.",
)
@click.option(
    "--kinds",
    callback=_names,
    default="passkey",
    show_default=True,
    help="Of facts, by comma: passkey, pair, multi (one of several pairs is asked for), twohop.",
)
@click.option(
    "--lengths",
    callback=token_counts,
    default="4k,16k,64k",
    show_default=True,
    help="Tokens of text; k is 1,024 and m is 1,024k.",
)
@click.option(
    "--depths",
    callback=_depths,
    default="5",
    show_default=True,
    help="Where the fact is, in % of the text, e.g. 0,25,50; one number: so many, evenly spaced.",
)
@click.option(
    "--trials", type=click.IntRange(min=1), default=40, show_default=True, help="For each kind, length and depth."
)
@folder_option("--cache", help="Keep here what the text leaves in memory, for other runs over the same backbone.")
@click.option(
    "--systems",
    callback=_names,
    default="",
    help="Ask only systems whose names begin so, by comma, e.g. memory,backbone; default: all.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of facts, places and texts.")
def needle(
    data: tuple[str, ...],
    kinds: list[str],
    lengths: list[int],
    depths: list[float],
    trials: int,
    cache: Path | None,
    systems: list[str],
    seed: int,
    **shared: Any,
) -> None:
    """Facts hidden in 4k to 1M tokens of real text, and asked for at its end.

    A system with memory reads the text into it, segment by segment, and has the question alone in its window. A system
    without has the end of the text in its window, and finds what is hidden there. An answer is exact when greedy
    decoding writes every token of it; beside that, its likelihood is compared with those of other answers. With --out,
    a heat map of depth against length is drawn for every system. Default of --memory-sizes: the longest text.
    """
    from longmem.errors import ConfigError
    from longmem.evaluation.loading import has_memory
    from longmem.evaluation.tasks.needle import Needle
    from longmem.evaluation.tasks.needle_plot import plot_needle
    from longmem.evaluation.tasks.needle_text import read_haystack

    if not lengths:
        raise ConfigError("--lengths (none) must name at least one length; try 4k,16k,64k")
    longest = max(lengths)
    remembers = has_memory(shared["model"]) or shared["memtrm"] or shared["training_free"]
    sizes = shared["memory_sizes"] or ([longest] if remembers else None)
    opened = open_comparison(shared | {"memory_sizes": sizes})
    if systems:
        chosen = [asker for asker in opened.askers if asker.name.startswith(tuple(systems))]
        if not chosen:
            names = ", ".join(asker.name for asker in opened.askers)
            raise ConfigError(f"--systems ({', '.join(systems)}) names none of {names}")
        opened = replace(opened, askers=chosen)
    haystack = read_haystack(data, opened.tokenizer, longest, opened.window)
    task = Needle(haystack, opened.tokenizer, kinds, lengths, depths, trials, seed, _say, cache)
    result = run_and_show(task, opened, shared, seeds=(seed,))
    if shared["out"] is not None:
        for path in plot_needle(result, shared["out"]):
            click.echo(f"wrote {path}", err=True)


def _say(done: int, total: int) -> None:
    """Long texts take minutes to read: say every tenth."""
    if done * 10 // total > (done - 1) * 10 // total:
        click.echo(f"read {done:,} of {total:,} segments into memory", err=True)
