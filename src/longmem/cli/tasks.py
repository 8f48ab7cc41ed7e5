"""The tasks of ``longmem eval``, ``chapterbreak`` to ``babi``: one table of commands and their options.

``longmem eval harness`` runs other people's tasks on the same systems. Imports of torch wait until a command runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from longmem.cli.common import Command, by_comma, options, token_counts
from longmem.cli.evaluating import MODEL, RUN, load, save_and_show
from longmem.errors import ConfigError

if TYPE_CHECKING:
    from longmem.evaluation.asking import Asker
    from longmem.evaluation.task import Task

Given = dict[str, Any]
Build = Callable[[Any, int], "Task"]
"""``(tokenizer, window)`` -> the task."""
MOST_DEPTHS = 1001


class TaskCommand(NamedTuple):
    """One command.

    Attributes:
        help: what it measures.
        example: of its arguments beside ``--model``.
        build: takes the command's own options and those of all commands, reads files, so that wrong paths show before
            models are loaded, and returns what makes the task.
        options: the command's own.
    """

    help: str
    example: str
    build: Callable[[Given, Given], Build]
    options: tuple[Callable[[Command], Command], ...]


def _depths(context: click.Context, parameter: click.Parameter, value: str) -> list[float]:
    """``0,50,100``, or one number: so many, evenly spaced."""
    depths: list[float] = by_comma(float, "numbers; try 0,50,100 or 11")(context, parameter, value)
    if len(depths) != 1:
        return depths
    if not 1 <= depths[0] <= MOST_DEPTHS or depths[0] != int(depths[0]):
        raise click.BadParameter(
            f"{value!r}: one number says how many depths there are, 1 to {MOST_DEPTHS}; try 5, or 0,50,100"
        )
    last = int(depths[0]) - 1
    return [round(100 * at / last, 3) for at in range(last + 1)] if last else [50.0]


def _option(
    *names: str, help: str, default: Any = None, least: int | None = None, **more: Any
) -> Callable[[Command], Command]:
    if least is not None:
        more["type"] = click.IntRange(min=least)
    return click.option(*names, default=default, help=help, **more)


_names, _numbers = by_comma(str, "names"), by_comma(int, "numbers; try 0,200")


def _recalled(default: int) -> Callable[[Command], Command]:
    return _option("--recall", default=default, least=0, help="Passages found by text search, for further systems "
                   "that have them in their window (+recall); 0: no such systems.")  # fmt: skip


_SEED: Callable[[Command], Command] = options("seed")


def _chapterbreak(own: Given, shared: Given) -> Build:
    from longmem.evaluation.tasks.chapterbreak import ChapterBreakTask, files_for, read_chapterbreak

    files = [read_chapterbreak(path) for path in own.pop("data")]
    for prefix in own["prefixes"]:
        files_for(files, prefix)
    return lambda tokenizer, window: ChapterBreakTask(files, tokenizer, **own)


def _icl(own: Given, shared: Given) -> Build:
    from longmem.evaluation.tasks.icl import IclTask
    from longmem.evaluation.tasks.icl_data import read_icl

    sets = read_icl(own.pop("data"), own.pop("datasets"), own.pop("split"))
    return lambda tokenizer, window: IclTask(sets, tokenizer, **own)


def _squad(own: Given, shared: Given) -> Build:
    from longmem.evaluation.tasks.squad import SquadTask, read_squad

    files = read_squad(own.pop("train")), read_squad(own.pop("data"))
    return lambda tokenizer, window: SquadTask(*files, tokenizer, **own)


def _needle(own: Given, shared: Given) -> Build:
    from longmem.evaluation.tasks.needle import NeedleTask, read_haystack

    if not own["lengths"]:
        raise ConfigError("--lengths (none) must name at least one length; try 4k,16k,64k")
    data, longest = own.pop("data"), max(own["lengths"])
    _remember(shared, longest)
    return lambda tokenizer, window: NeedleTask(read_haystack(data, tokenizer, longest, window), tokenizer, **own)


def _dialogue(own: Given, shared: Given) -> Build:
    from longmem.evaluation.tasks.dialogue import DialogueTask, bleu, read_dialogues

    if own["with_bleu"]:
        bleu("", "")  # an extra that is missing shows at once
    files = [read_dialogues(path) for path in own.pop("data")]
    given = {name: value for name, value in own.items() if value is not None}
    return lambda tokenizer, window: DialogueTask(files, tokenizer, **DialogueTask.sizes(window) | given)


def _facts(own: Given, shared: Given) -> Build:
    from longmem.evaluation.tasks.facts import TELLING, FactsTask
    from longmem.evaluation.tasks.needle import read_haystack

    data, longest = own.pop("data"), max(own["between"], default=0)
    _remember(shared, longest + TELLING)
    return lambda tokenizer, window: FactsTask(read_haystack(data, tokenizer, longest, 1024), tokenizer, **own)


def _babi(own: Given, shared: Given) -> Build:
    from longmem.evaluation.tasks.babi import BabiTask, read_babi
    from longmem.evaluation.tasks.needle import read_haystack

    sets, text, longest = read_babi(own.pop("data"), own.pop("tasks")), own.pop("text"), max(own["lengths"], default=0)
    _remember(shared, longest)
    return lambda tokenizer, window: BabiTask(read_haystack(text, tokenizer, longest, window), sets, tokenizer, **own)


def _remember(shared: Given, tokens: int) -> None:
    """Memory of so many tokens, where there is any and its size was not given."""
    from longmem.evaluation.loading import has_memory

    if has_memory(shared["model"]) or shared["memtrm"] or shared["training_free"]:
        shared["memory_sizes"] = shared["memory_sizes"] or [tokens]


TASKS = {
    "chapterbreak": TaskCommand(
        """ChapterBreak: the true beginning of the next chapter against five of other chapters.

        The likeliest of six suffixes wins; chance is 16.7 %. Of the prefix, the window has what fits beside the
        suffix; systems with memory read the rest, others lose it. Reported apart for each split and prefix; intervals
        are over works.
        """,
        "--data data/chapterbreak_ctx_8192.json --out results/chapterbreak",
        _chapterbreak,
        (
            _option("--data", multiple=True, required=True, help="chapterbreak_ctx_<N>.json, official or self-made; "
                    "for a prefix the shortest N that is long enough counts. May be repeated."),
            _option("--prefix", "prefixes", default="4k,6k,8k", callback=token_counts, help="Tokens before the "
                    "boundary, by comma."),
            _option("--suffix-tokens", default=128, least=1, help="Of each suffix, the first ones."),
            _option("--limit", least=1, help="Examples of each split, drawn with a seed; default: all."),
            _SEED,
        ),
    ),
    "icl": TaskCommand(
        """In-context learning: sentiment, subjectivity or intent of short texts, after labelled examples.

        Every seed draws demonstrations, the same for every system: some for the window, nearest to the question, and
        others that only memory holds. An answer is right if the first token begins the label, as the released script
        has it; if the label is the likeliest of all; and if it is so after contextual calibration. Demonstrations that
        do not fit the window are left out from the far end, and the result says how many are left.
        """,
        "--data data/icl --datasets sst2,subj --limit 20 --out results/icl",
        _icl,
        (
            _option("--data", required=True, help="Folder with folders SST-2, mr, subj, sst-5, mpqa, icl_banking77, "
                    "icl_clinc150; see the docs."),
            _option("--datasets", default="sst2,mr,subj,sst5,mpqa", callback=_names, help="Which sets, by comma; also "
                    "banking77, clinc150."),
            _option("--split", default="released", type=click.Choice(("released", "dev", "test")), help="What is "
                    "asked; released: dev of SST-2 and SST-5, test of the others, as the released script has it."),
            _option("--local-shots", default="4,20", callback=_numbers, help="Demonstrations in the window, by comma."),
            _option("--memory-shots", default="0,200,2000", callback=_numbers, help="Demonstrations in memory, by "
                    "comma."),
            _option("--seeds", default=6, least=1, help="Draws of demonstrations."),
            _option("--limit", default=30, least=0, help="Test texts of each set, drawn once, not stratified; 0 takes "
                    "all."),
        ),
    ),
    "squad": TaskCommand(
        """SQuAD v1.1: exact match and F1 of greedy answers, after questions that were answered before.

        Demonstrations are drawn from the training file, one question for each passage, the same for every system: some
        for the window, others that only memory holds. What does not fit the window is left out from the far end, of
        the question's own passage last, and the result says how much.
        """,
        "--train squad/train-v1.1.json --data squad/dev-v1.1.json --out results/squad",
        _squad,
        (
            _option("--train", required=True, help="SQuAD v1.1 JSON file that demonstrations are drawn from."),
            _option("--data", required=True, help="SQuAD v1.1 JSON file whose questions are asked."),
            _option("--local-shots", default=3, least=0, help="Demonstrations in the window."),
            _option("--memory-shots", default="0,200", callback=_numbers, help="Demonstrations in memory, by comma."),
            _option("--seeds", default=1, least=1, help="Draws of demonstrations."),
            _option("--limit", default=200, least=0, help="Questions, drawn once; 0 takes all."),
            _option("--max-answer-tokens", default=32, least=1, help="Where an answer without a line end is cut."),
        ),
    ),
    "needle": TaskCommand(
        """Facts hidden in 4k to 1M tokens of real text, and asked for at its end.

        A system with memory reads the text into it, segment by segment, and has the question alone in its window. A
        system without has the end of the text in its window, and finds what is hidden there. An answer is exact when
        greedy decoding writes every token of it; beside that, its likelihood is compared with those of other answers.
        With --out, a heat map of depth against length is drawn for every system. Default of --memory-sizes: the
        longest text.
        """,
        "--lengths 4k,16k,64k,1m --depths 5 --trials 40 --out results/needle",
        _needle,
        (
            _option("--data", multiple=True, help="File, folder, .jsonl or archive of text; may be repeated. Default: "
                    "Python's standard library."),
            _option("--kinds", default="passkey", callback=_names, help="Of facts, by comma: passkey, pair, multi (one "
                    "of several pairs is asked for), twohop."),
            _option("--lengths", default="4k,16k,64k", callback=token_counts, help="Tokens of text; k is 1,024 and m "
                    "is 1,024k."),
            _option("--depths", default="5", callback=_depths, help="Where the fact is, in % of the text, e.g. "
                    "0,25,50; one number: so many, evenly spaced."),
            _option("--trials", default=40, least=1, help="For each kind, length and depth."),
            _SEED,
        ),
    ),
    "dialogue": TaskCommand(
        """Conversations over several sessions: later questions (LoCoMo) and replies (MSC).

        Sessions go to memory; the newest tokens of them and the question are in the window of every system. Scored by
        F1 of words, BLEU-4 (needs pip install 'longmem-lm[eval]') and the likelihood of the reference answer. Reported
        apart for each category of LoCoMo and each session of MSC; intervals are over conversations.
        """,
        "--data data/conversations.json --out results/dialogue",
        _dialogue,
        (
            _option("--data", multiple=True, required=True, help="locomo10.json or one of its form, or "
                    "session_N/test.txt of MSC; may be repeated."),
            _option("--recent", least=0, help="Tokens of the newest session that are in the window; default: half of "
                    "it. All before is for memory."),
            _option("--new-tokens", least=1, help="Of an answer, at most; default: 50, or a quarter of the window."),
            _option("--conversations", least=1, help="The first so many of each file; default: all."),
            _option("--questions", least=1, help="Of each conversation, drawn with a seed; default: all."),
            _option("--bleu/--no-bleu", "with_bleu", default=True, help="Measure BLEU-4, which needs sacrebleu."),
            _recalled(0),
            _SEED,
        ),
    ),
    "facts": TaskCommand(
        """Facts told in one conversation and asked for in another, with other text between.

        Kinds and values of facts are those held out from calibration. A system with memory reads the conversation and
        the text; compared are the backbone that knows nothing, the backbone with the conversation in its window, and
        systems with passages in their window that text search finds (+recall). Measured are the value's likelihood,
        its first token, and whether a greedy answer names it.
        """,
        "--between 1k,16k,128k --out results/facts",
        _facts,
        (
            _option("--data", multiple=True, help="Text between, see needle. Default: Python's standard library."),
            _option("--between", default="1k,16k,128k", callback=token_counts, help="Tokens between, by comma."),
            _option("--sessions", default=10, least=1, help="Conversations that tell facts."),
            _option("--facts", default=10, least=1, help="Told in each conversation."),
            _option("--new-tokens", default=24, least=1, help="Of an answer, at most."),
            _recalled(5),
            _SEED,
        ),
    ),
    "babi": TaskCommand(
        """bAbI questions whose facts are hidden in the text of books, as in BABILong.

        A system with memory reads the whole text into it; one without has the end of the text in its window. Measured
        are the likeliest of all answers of the task, and the greedy answer by BABILong's rule.
        """,
        "--data data/babi --text data/books/test.tar.xz --lengths 4k,64k --out results/babi",
        _babi,
        (
            _option("--data", required=True, help="Folder or archive of bAbI's English tasks."),
            _option("--text", multiple=True, required=True, help="Text that hides the facts; may be repeated."),
            _option("--tasks", default="1,2,3,4,5", callback=_numbers, help="Numbers of tasks, by comma."),
            _option("--lengths", default="1k,4k,16k,64k", callback=token_counts, help="Tokens of text, by comma."),
            _option("--trials", default=50, least=1, help="Questions for each task and length."),
            _option("--shots", default=2, least=0, help="Short stories with answers before the question."),
            _recalled(0),
            _SEED,
        ),
    ),
}  # fmt: skip


def _command(name: str, task: TaskCommand) -> click.Command:
    def run(**given: Any) -> None:
        own = {parameter: given.pop(parameter) for parameter in named}
        if own.get("limit") == 0:
            own["limit"] = None
        build = task.build(own, given)
        askers, tokenizer, config = _open(given)
        made = build(tokenizer, askers[0].window)
        _run(made, made.systems(askers), config, given)

    full = _option("--full-context", least=2, help="Also the backbone with a window of so many tokens, which holds "
                   "what the others have in memory.")  # fmt: skip
    some = _option("--systems", default="", callback=_names, help="Ask only systems whose names begin so, by comma, "
                   "e.g. memory,backbone.")  # fmt: skip
    decorated: Any = MODEL(full(some(RUN(run))))
    for option in reversed(task.options):
        decorated = option(decorated)
    example = f"Example: longmem eval {name} --model models/small/sidenet {task.example}"
    made = click.command(name, help=task.help, epilog=example)(decorated)
    named = [str(parameter.name) for parameter in made.params[: len(task.options)]]
    return made


def _open(given: Given) -> tuple[list[Asker], Any, Given]:
    """The systems that the options name, their tokenizer, and what the result says about their making."""
    from longmem.evaluation.asking import askers
    from longmem.evaluation.systems import chosen

    loaded, tokenizer, device = load(given)
    window = given["window"] or loaded.default_window()
    full, rows = given.get("full_context"), given["rows"]
    found = askers(loaded.comparison, tokenizer, window=window, rows=rows, full_context=full, device=device)
    names = chosen([asker.name for asker in found], given.get("systems", ()))
    options = ("backbone", "control", "memtrm", "training_free", "full_context", "rows", "dtype")
    config = {"model": loaded.model, "tokenizer": loaded.tokenizer, "window": window, "device": device}
    config |= {name: given.get(name) for name in options}
    return [asker for asker in found if asker.name in names], tokenizer, config


def _run(task: Task, askers: Sequence[Asker], config: Given, given: Given) -> None:
    """Ask all systems, write the result and its pictures, and print it."""
    from longmem.evaluation.results import Bootstrap, command_line
    from longmem.evaluation.task import run_task

    result = run_task(
        task,
        askers,
        records=None if given["out"] is None else given["out"] / "records.jsonl",
        bootstrap=Bootstrap(resamples=given["resamples"]),
        command=command_line(),
        config=config,
    )
    save_and_show(result, given)
    if not given["as_json"]:
        for note in task.notes(result):
            click.echo(note)


@click.command(epilog="Example: longmem eval harness --model runs/sidenet --tasks sst2,boolq --num-fewshot 60")
@_option("--tasks", required=True, callback=_names, help="Names by comma, as lm-evaluation-harness knows them.")
@_option("--include", multiple=True, type=click.Path(exists=True, file_okay=False), help="Folder with further tasks.")
@_option("--num-fewshot", least=0, help="Examples before each question; default: the task's.")
@_option("--limit", least=1, help="Take the first so many documents of each task.")
@_SEED
@MODEL
@RUN
def harness(tasks: list[str], include: tuple[str, ...], **given: Any) -> None:
    """Tasks of lm-evaluation-harness, on the backbone alone, with memory switched off, and with memory.

    The harness cuts off the beginning of contexts that do not fit the window. With memory it is read instead, into a
    memory that belongs to the request alone: try more examples (--num-fewshot) than fit. Needs
    pip install 'longmem-lm[eval]'.
    """
    if not tasks:
        raise ConfigError("--tasks (none) must name at least one; `lm-eval ls tasks` lists them")
    try:
        from longmem.evaluation.harness import harness as evaluate
    except ImportError as problem:
        if (problem.name or "").partition(".")[0] != "lm_eval":
            raise
        raise ConfigError("lm-evaluation-harness is not installed; pip install 'longmem-lm[eval]'") from problem
    from longmem.evaluation.results import command_line

    askers, _, config = _open(given)
    settings = {name: given[name] for name in ("num_fewshot", "limit", "seed", "resamples")}
    result = evaluate(askers, tasks, include=include, **settings, command=command_line(), config=config)
    save_and_show(result, given)


COMMANDS = [*(_command(name, task) for name, task in TASKS.items()), harness]
