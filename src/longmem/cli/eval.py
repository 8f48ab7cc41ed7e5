"""``longmem eval``, ``longmem layers`` and ``longmem report``. Imports of torch wait until a command runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longmem.cli.common import (
    at_least,
    by_comma,
    folder_option,
    options,
    print_json,
    together,
    token_count,
    token_counts,
)
from longmem.errors import ConfigError

if TYPE_CHECKING:
    from longmem.evaluation.asking import Asker
    from longmem.evaluation.tables import Table
    from longmem.evaluation.tasks import Task

Given = dict[str, Any]
Option = Callable[[Any], Any]


def option(*names: str, help: str, default: Any = None, least: int | None = None, **more: Any) -> Option:
    if least is not None:
        more["type"] = click.IntRange(min=least)
    return click.option(*names, default=default, help=help, **more)


names = by_comma(str, "names")
MODEL = together(
    option("--model", required=True, help="LongMem or MemTRM checkpoint, run folder, or a causal LM."),
    options("backbone"),
    option("--control", help="SideNet trained equally long without memory, over the same backbone."),
    option("--memtrm", help="MemTRM checkpoint or run folder, trained from the same backbone."),
    option("--training-free", multiple=True, metavar="GATE", help="Also memory attention on the bare backbone: "
            "the share (0 to 1) of its heads that memory gets, or the folder of a TrainingFree; may be repeated."),
    options("tokenizer", "set"),
    option("--memory-sizes", callback=token_counts, help="Tokens a row remembers, e.g. 1k,8k,64k; default: the "
            "model's own."),
    option("--systems", callback=names, help="Ask only systems whose names begin so, by comma, e.g. "
            "backbone,memory."),
)  # fmt: skip
"""Options that say which systems are compared."""
RUN = together(
    options("device", "dtype"),
    option("--window", least=2, help="Tokens seen at once; default: the backbone's positions, at most 1024."),
    option("--batch", "rows", least=1, default=8, help="Texts side by side."),
    option("--resamples", least=1, default=2000, help="Of the bootstrap."),
    folder_option("--out", help="Folder for the result, pictures, and records to resume from."),
    options("json"),
)
"""Options that say where models run, how much runs at once, and where results go."""
TASK = together(
    MODEL,
    option("--full-context", least=2, help="Also the backbone with a window of so many tokens, which holds what the "
           "others have in memory."),
    RUN,
)  # fmt: skip
"""Options of every task, behind its own."""


def load(given: Given, remembered: int = 0) -> tuple[list[Asker], Given]:
    """The systems that the options name, and for the result what it is made with.

    Raises:
        LongMemError: settings, checkpoints or their tokenizer are at fault.
    """
    from longmem.evaluation.systems import chosen, load_systems
    from longmem.modeling.loading import named_dtype

    how = "backbone control memtrm training_free memory_sizes tokenizer device window windows rows full_context reading"
    named: Given = {name: given[name] for name in how.split() if given.get(name) is not None}
    named |= {"dtype": named_dtype(given["dtype"]), "default_sizes": [remembered] if remembered else None}
    found = load_systems(given["model"], **named)
    about = {
        name: value for name, value in given.items() if name not in ("out", "as_json", "resamples") and value != {}
    }
    backbone = found[0]
    used = {"tokenizer": backbone.tokenizer.name_or_path, "window": backbone.window}
    return chosen(found, given.get("systems") or ()), about | used | {"device": str(backbone.model.device)}


def save_and_show(result: Any, given: Given) -> None:
    """Write ``OUT/<task>.json`` and pictures, and print tables, or with ``--json`` the result."""
    from longmem.evaluation.report import plot_all
    from longmem.evaluation.results import as_json, write_json
    from longmem.evaluation.tables import tables_of

    result = as_json(result)
    if given["out"] is not None:
        path = given["out"] / f"{result['header']['task']}.json"
        write_json(path, result)
        for written in (path, *plot_all(result, given["out"])):
            click.echo(f"wrote {written}", err=True)
    if given["as_json"]:
        print_json(result)
    else:
        show(tables_of(result))


def show(tables: Sequence[Table]) -> None:
    """Tables on stdout, as wide as the terminal, or ``COLUMNS``, or 120; wider ones row by row."""
    from longmem.evaluation.tables import plain

    width = shutil.get_terminal_size((120, 24)).columns
    for table in tables:
        click.echo("\n" + plain(table, width))


def _task(name: str, task: str, help: str, example: str, *own: Option) -> click.Command:
    """A command whose own options are the settings of a task (``module.Class``)."""

    def run(**given: Any) -> None:
        from longmem.evaluation.results import Bootstrap
        from longmem.evaluation.tasks import run_task

        settings = {setting: given.pop(setting) for setting in settings_of_task}
        if settings.get("limit") == 0:
            settings["limit"] = None
        # before the models are loaded: wrong paths and settings show at once
        made: Task = getattr(import_module(f"longmem.evaluation.tasks.{module}"), kind)(**settings)
        askers, about = load(given, made.remembered)
        result = run_task(
            made,
            askers,
            records=given["out"] and given["out"] / "records.jsonl",
            bootstrap=Bootstrap(resamples=given["resamples"]),
            config=about,
        )
        save_and_show(result, given)
        for note in () if given["as_json"] else made.notes(result):
            click.echo(note)

    module, kind = task.split(".")
    epilog = f"Example: longmem eval {name} --model models/small/sidenet {example} --out results/{name}"
    command = click.command(name, help=help, epilog=epilog)(together(*own, TASK)(run))
    settings_of_task = [str(parameter.name) for parameter in command.params[: len(own)]]
    return command


def _depths(context: click.Context, parameter: click.Parameter, value: str) -> list[float]:
    """``0,50,100``, or one number: so many, evenly spaced."""
    said, many = "numbers; try 0,50,100 or 11", "," in value
    found: list[float] = by_comma(at_least(0, float) if many else at_least(1, int), said)(context, parameter, value)
    count = 1 if many else int(found[0])
    even = [round(100 * at / (count - 1), 3) for at in range(count)] if count > 1 else [50.0]
    return found if many else even


def _recalled(default: int) -> Option:
    return option("--recall", default=default, least=0, help="Passages found by text search, for further systems "
                  "that have them in their window (+recall); 0: no such systems.")  # fmt: skip


_numbers = by_comma(at_least(0, int), "numbers; try 0,200")
_distances = by_comma(at_least(0), "token counts; try 1024,8k,64k")
_SEED: Option = options("seed")

TASKS = [
    _task(
        "chapterbreak", "comprehension.ChapterBreakTask",
        """ChapterBreak: the true beginning of the next chapter against five of other chapters.

        The likeliest of six suffixes wins; chance is 16.7 %. Of the prefix, the window has what fits beside the
        suffix; systems with memory read the rest, others lose it.
        """,
        "--data data/chapterbreak_ctx_8192.json",
        option("--data", required=True, help="chapterbreak_ctx_<N>.json, official or self-made."),
        option("--prefix", "prefixes", default="4k,6k,8k", callback=token_counts, help="Tokens before the boundary, "
               "by comma; at most N."),
        option("--suffix-tokens", default=128, least=1, help="Of each suffix, the first ones."),
        option("--limit", least=1, help="Examples of each split, drawn with a seed; default: all."),
        _SEED,
    ),
    _task(
        "icl", "icl.IclTask",
        """In-context learning: sentiment, subjectivity or intent of short texts, after labelled examples.

        Every seed draws demonstrations, the same for every system: some for the window, and others that only memory
        holds. With --recall those of memory that text search finds are in the window too, nearest to the question. The
        farthest are left out where not all fit, and the result says so.
        """,
        "--data data/icl --datasets sst2,subj --limit 20 --recall 16",
        option("--data", required=True, help="Folder with folders SST-2, mr, subj, sst-5, mpqa, icl_banking77, "
               "icl_clinc150; see the docs."),
        option("--datasets", default="sst2,mr,subj,sst5,mpqa", callback=names, help="Which sets, by comma; also "
               "banking77, clinc150."),
        option("--local-shots", default="4,20", callback=_numbers, help="Demonstrations in the window, by comma."),
        option("--memory-shots", default="0,200,2000", callback=_numbers, help="Demonstrations in memory, by comma."),
        option("--seeds", "draws", default=6, least=1, help="Draws of demonstrations."),
        option("--limit", default=30, least=0, help="Test texts of each set, drawn once, not stratified; 0 takes all."),
        _recalled(0),
    ),
    _task(
        "squad", "comprehension.SquadTask",
        """SQuAD v1.1: exact match and F1 of greedy answers, after questions that were answered before.

        Demonstrations are one question for each passage, the same for every system: some for the window, others that
        only memory holds. What does not fit the window is left out from the far end, and the result says how much.
        """,
        "--train squad/train-v1.1.json --data squad/dev-v1.1.json",
        option("--train", required=True, help="SQuAD v1.1 JSON file that demonstrations are drawn from."),
        option("--data", required=True, help="SQuAD v1.1 JSON file whose questions are asked."),
        option("--local-shots", default=3, least=0, help="Demonstrations in the window."),
        option("--memory-shots", default="0,200", callback=_numbers, help="Demonstrations in memory, by comma."),
        option("--seeds", "draws", default=1, least=1, help="Draws of demonstrations."),
        option("--limit", default=200, least=0, help="Questions, drawn once; 0 takes all."),
        option("--max-answer-tokens", default=32, least=1, help="Where an answer without a line end is cut."),
    ),
    _task(
        "needle", "hidden.NeedleTask",
        """Facts hidden in 4k to 1M tokens of real text, and asked for at its end.

        A system with memory reads the text into it and has the question alone in its window; one without has the end
        of the text there. An answer is exact when greedy decoding writes every token of it. Default of --memory-sizes:
        the longest text.
        """,
        "--lengths 4k,16k,64k,1m --depths 5 --trials 40",
        option("--data", "text", multiple=True, help="File, folder, .jsonl or archive of text; may be repeated. "
               "Default: Python's standard library."),
        option("--kinds", default="passkey", callback=names, help="Of facts, by comma: passkey, pair, multi (one of "
               "several pairs is asked for), twohop."),
        option("--lengths", default="4k,16k,64k", callback=token_counts, help="Tokens of text; k is 1,024 and m is "
               "1,024k."),
        option("--depths", default="5", callback=_depths, help="Where the fact is, in % of the text, e.g. 0,25,50; one "
               "number: so many, evenly spaced."),
        option("--trials", default=40, least=1, help="For each kind, length and depth."),
        _SEED,
    ),
    _task(
        "dialogue", "conversations.DialogueTask",
        """Conversations over several sessions: later questions (LoCoMo) and replies (MSC).

        Sessions go to memory; the newest tokens of them and the question are in the window of every system. Scored by
        F1 of words, BLEU-4 (needs pip install 'longmem-lm[eval]') and the likelihood of the reference answer.
        """,
        "--data data/conversations.json",
        option("--data", multiple=True, required=True, help="locomo10.json or one of its form, or session_N/test.txt "
               "of MSC; may be repeated."),
        option("--recent", least=0, help="Tokens of the newest session that are in the window; default: half of it. "
               "All before is for memory."),
        option("--new-tokens", least=1, help="Of an answer, at most; default: 50, or a quarter of the window."),
        option("--conversations", least=1, help="The first so many of each file; default: all."),
        option("--questions", least=1, help="Of each conversation, drawn with a seed; default: all."),
        option("--bleu/--no-bleu", "with_bleu", default=True, help="Measure BLEU-4, which needs sacrebleu."),
        _recalled(0),
        _SEED,
    ),
    _task(
        "facts", "conversations.FactsTask",
        """Facts told in one conversation and asked for in another, with other text between.

        Kinds and values of facts are those held out from calibration. Compared are also the backbone with the
        conversation in its window, and systems with passages in their window that text search finds (+recall).
        """,
        "--between 1k,16k,128k",
        option("--data", "text", multiple=True, help="Text between, see needle. Default: Python's standard library."),
        option("--told", help="Your own facts: JSON lines of said, asked, and answer with the value in {braces}."),
        option("--changed", is_flag=True, default=False, help="Facts are told again after the text, with other values: "
               "the newer ones are asked for."),
        option("--between", default="1k,16k,128k", callback=_distances, help="Tokens between, by comma."),
        option("--sessions", default=10, least=1, help="Conversations that tell facts."),
        option("--facts", default=10, least=1, help="Told in each conversation."),
        option("--new-tokens", default=24, least=1, help="Of an answer, at most."),
        _recalled(5),
        _SEED,
    ),
    _task(
        "babi", "hidden.BabiTask",
        """bAbI questions whose facts are hidden in the text of books, as in BABILong.

        A system with memory reads the whole text into it; one without has the end of the text in its window.
        """,
        "--data data/babi --text data/books/test.tar.xz --lengths 4k,64k",
        option("--data", required=True, help="Folder or archive of bAbI's English tasks."),
        option("--text", multiple=True, required=True, help="Text that hides the facts; may be repeated."),
        option("--tasks", default="1,2,3,4,5", callback=_numbers, help="Numbers of tasks, by comma."),
        option("--lengths", default="1k,4k,16k,64k", callback=token_counts, help="Tokens of text, by comma."),
        option("--trials", default=50, least=1, help="Questions for each task and length."),
        option("--shots", default=2, least=0, help="Short stories with answers before the question."),
        _recalled(0),
        _SEED,
    ),
]  # fmt: skip


PROTOCOLS = click.Choice(("segments,sliding", "segments", "sliding"))


@click.group(commands=TASKS)
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
    from longmem.data.tokens import tokenize_documents
    from longmem.evaluation import perplexity as evaluation
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


# beside longmem eval


@click.command(epilog="Example: longmem layers models/small/backbone --data latex/valid.tar.xz --out runs/layers")
@click.argument("model")
@option("--data", multiple=True, help="Text: file, folder, .jsonl or archive; default: Python's own sources.")
@options("tokenizer")
@option("--distances", callback=token_counts, default="128,256,512,1024", help="Tokens between occurrences that keys "
        "find.")  # fmt: skip
@option("--rows", least=1, default=4, help="Passages of text.")
@option("--stride", least=1, help="Of the SideNet to be: take only layers that it copies.")
@option("--chunk-size", least=1, default=4, help="Tokens per chunk.")
@option("--num-retrieved", least=1, default=64, help="Tokens that a query may retrieve.")
@options("seed")
@options("device", "dtype", "json")
@folder_option("--out", help="Folder for layers.json and the heat map layers.png.")
def layers(model: str, data: tuple[str, ...], tokenizer: str | None, **given: Any) -> None:
    """Find the layers whose memory is worth most.

    For every layer of MODEL (a causal language model, or the backbone of a LongMem): what is predicted better when it
    reads memory, of facts told in an earlier conversation and of text. Then for sets of up to four layers: the best
    one, and the one that adds most to it, and so on. It takes minutes.

    That is explained by the keys: for every layer and head, how well position-free queries find the token that followed
    an earlier occurrence of the current one. Keys can be remembered to advantage only where a backbone can copy, so its
    loss on text that it has just read is shown as well.
    """
    from longmem.data.text import read_documents
    from longmem.data.tokens import load_tokenizer
    from longmem.evaluation.layers import conclusion, layers_report, text_rows
    from longmem.evaluation.results import header
    from longmem.evaluation.tasks.hidden import standard_library
    from longmem.modeling.checkpoints import backbone_of, checked_device, checkpoint_folder
    from longmem.modeling.loading import load_backbone, named_dtype

    device, (where, revision) = checked_device(given["device"]), backbone_of(checkpoint_folder(model))
    backbone: Any = load_backbone(where, revision, named_dtype(given["dtype"]))
    backbone.to(device).eval()
    reader = load_tokenizer(tokenizer or where, backbone)
    texts = (document.text for document in read_documents(list(data))) if data else islice(standard_library(), 4)
    text = text_rows(texts, reader, given["rows"], max(given["distances"]))
    settings = {n: given[n] for n in ("distances", "rows", "stride", "chunk_size", "num_retrieved", "seed")}
    models = {"backbone": model, "class": type(backbone).__name__}
    samples = {"text": len(text), "random": given["rows"]}
    about = header("layers", config=settings, models=models, samples=samples, seeds=[given["seed"]])
    result = {"header": about, **layers_report(backbone, text, reader, **settings)}
    save_and_show(result, given)
    if not given["as_json"]:
        click.echo(f"\n{conclusion(result)}")


@click.command(epilog="Example: longmem report results --out runs/report")
@click.argument("results", nargs=-1, required=True, metavar="RESULTS...")
@folder_option("--out", required=True, help="Folder for report.md, report.html, pictures/.")
@click.option("--title", default="Results", help="Of the page.")
@options("json")
def report(results: tuple[str, ...], out: Path, title: str, as_json: bool) -> None:
    """Make a Markdown page and one self-contained HTML page of RESULTS, files or folders of them.

    Takes what `longmem eval`, `longmem layers` and the benches write. The paper's own numbers stand beside ours where
    the setting is the same kind. A file that is no result, or a damaged one, is named in one line and left out.
    """
    from longmem.evaluation.report import build_report

    report = build_report(results, title=title)
    written = report.write(out)
    for problem in report.problems:
        click.echo(f"not shown: {problem}", err=True)
    if as_json:
        print_json({"written": written, "shown": report.shown, "not_shown": report.problems})
    else:
        click.echo(out / "report.md")
        click.echo(out / "report.html")
