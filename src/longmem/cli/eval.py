"""``longmem eval``: measurements of a model on long text."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import islice
from typing import Any

import click

from longmem.cli.common import options, token_count, token_counts
from longmem.cli.tasks import COMMANDS, MODEL, RUN, load, names, option, save_and_show
from longmem.errors import ConfigError

PROTOCOLS = click.Choice(("segments,sliding", "segments", "sliding"))


@click.group(commands=COMMANDS)
def command() -> None:
    """Measure a model on long text."""


@command.command(
    epilog="Example: longmem eval perplexity --model models/small/sidenet --data latex/test.tar.xz "
    "--memory-sizes 1k,8k,64k --group-by-prefix __ --out runs/latex"
)
@MODEL
@option("--data", required=True, multiple=True, help="File, folder, .jsonl or archive; may be repeated.")
@option("--include", multiple=True, help="Pattern of the document ids to take; may be repeated.")
@option("--num-documents", least=1, help="Take the first so many documents.")
@option("--max-tokens", type=token_count(2), help="Take the first so many tokens of each document.")
@option("--protocol", type=PROTOCOLS, default="segments,sliding", help="One, or both.")
@option("--stride", least=1, help="How far the sliding window moves; default: half of it.")
@option("--windows", callback=token_counts, help="Longer windows that the backbone alone is measured with "
        "too, by comma.")  # fmt: skip
@option("--group-by-prefix", "separator", help="Report documents apart by their file name up to this string. Without "
         "it they are projects up to __, of which intervals draw.")  # fmt: skip
@RUN
@options("seed")
def perplexity(data: tuple[str, ...], max_tokens: int | None, **given: Any) -> None:
    """Perplexity with and without memory, segment by segment and under a sliding window.

    Every document is streamed from its beginning with an empty memory. Differences come with bootstrap intervals that
    draw projects and then their documents. With --out, an interrupted run goes on where it stopped.
    """
    from longmem.data.text import TextSource, read_documents
    from longmem.evaluation import perplexity as evaluation
    from longmem.evaluation.loading import tokenize_documents
    from longmem.evaluation.results import Bootstrap

    # before the model: wrong paths show at once
    texts = list(islice(read_documents(TextSource(data, include=given["include"])), given["num_documents"]))
    systems, about = load(given)
    settings = evaluation.PerplexitySettings(
        stride=given["stride"],
        protocols=tuple(given["protocol"].split(",")),
        bootstrap=Bootstrap(resamples=given["resamples"], seed=given["seed"]),
    )
    result = evaluation.perplexity(
        systems,
        tokenize_documents(texts, systems[0].tokenizer, max_tokens=max_tokens, group_separator=given["separator"]),
        settings,
        records=given["out"] and given["out"] / "records.jsonl",
        config=about | {"data": list(data), "max_tokens": max_tokens},
    )
    save_and_show(result, given)


@command.command(epilog="Example: longmem eval harness --model runs/sidenet --tasks sst2,boolq --num-fewshot 60")
@option("--tasks", required=True, callback=names, help="Names by comma, as lm-evaluation-harness knows them.")
@option("--include", multiple=True, type=click.Path(exists=True, file_okay=False), help="Folder with further tasks.")
@option("--num-fewshot", least=0, help="Examples before each question; default: the task's.")
@option("--limit", least=1, help="Take the first so many documents of each task.")
@options("seed")
@MODEL
@RUN
def harness(tasks: list[str], include: tuple[str, ...], **given: Any) -> None:
    """Tasks of lm-evaluation-harness; needs pip install 'longmem-lm[eval]'.

    The harness cuts off the beginning of contexts that do not fit the window. With memory it is read instead, into a
    memory that belongs to the request alone: try more examples (--num-fewshot) than fit.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError("lm-evaluation-harness is not installed; pip install 'longmem-lm[eval]'")
    from longmem.evaluation.harness import harness as evaluate

    askers, about = load(given)
    settings = {name: given[name] for name in ("num_fewshot", "limit", "seed", "resamples")}
    result = evaluate(askers, tasks, include=include, **settings, config=about)
    save_and_show(result, given)
