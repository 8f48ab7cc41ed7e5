"""``longmem eval ablate``: one setting changed at a time."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longmem.cli.counts import TokenCount, token_counts
from longmem.cli.evaluating import machine_options
from longmem.cli.outputs import folder_option
from longmem.errors import ConfigError

if TYPE_CHECKING:
    from longmem.evaluation.ablation import AblationResult, Axis, Trained, ValueScore


def _words(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(word.strip() for word in value.split(",") if word.strip())


def _shares(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    try:
        return None if value is None else tuple(float(word) for word in value.split(",") if word.strip())
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of shares; try 0,0.25,0.5") from None


@click.command(
    epilog="Example: longmem eval ablate --model runs/latex-sidenet --data latex/test.tar.xz --of chunk_size,rows "
    "--out results/ablate-latex",
)
@click.option("--model", help="LongMem checkpoint or run folder; default: the one trained by --recipe.")
@click.option("--backbone", help="Where the backbone is, if not where the checkpoint says.")
@click.option("--data", required=True, multiple=True, help="File, folder, .jsonl or archive; may be repeated.")
@click.option("--include", multiple=True, help="Pattern of the document ids to take; may be repeated.")
@click.option("--num-documents", type=click.IntRange(min=1), help="Take the first so many documents.")
@click.option("--max-tokens", type=TokenCount(2), help="Take the first so many tokens of each document.")
@click.option(
    "--of",
    "axes",
    callback=_words,
    default="chunk_size,num_retrieved,memory_size,rows,memory_dtype,gate_share",
    show_default=True,
    help="Which settings, by comma; an empty list measures trained SideNets only.",
)
@click.option("--chunk-sizes", callback=token_counts, help="Default: 1 to 16, those that fit.")
@click.option("--num-retrieved", callback=token_counts, help="K; default: 1 to 64 chunks.")
@click.option("--memory-sizes", callback=token_counts, help="Default: a 64th of the model's own to all of it.")
@click.option("--gate-shares", callback=_shares, help="Forced on every head; default: 0,0.1,0.25,0.5,0.75,1.")
@click.option("--memory-dtypes", callback=_words, help="Default: float32,float16,bfloat16,int8.")
@click.option("--memory-size", type=TokenCount(), help="Of the default; default: the model's own.")
@click.option(
    "--also",
    multiple=True,
    metavar="LABEL=FOLDER",
    help="A SideNet trained otherwise over the same backbone; AXIS:LABEL=FOLDER names what it belongs to, e.g. "
    "memory_layer:1=runs/layer1. May be repeated.",
)
@click.option("--recipe", help="Train SideNets on the spot from this recipe, with --train-tokens for each.")
@click.option("--train-tokens", callback=token_counts, help="Budget of each of them; k is 1,024.")
@click.option("--train-layers", callback=token_counts, help="Memory layers to train, e.g. 1,3,5.")
@click.option("--train-inits", callback=_words, help="copy,zero")
@click.option("--train-fusions", callback=_words, help="gate,softmax")
@click.option("--protocol", default="sliding,segments", show_default=True, help="Which protocols, by comma.")
@click.option("--window", type=int, help="Tokens seen at once; default: the backbone's positions, at most 1024.")
@click.option("--stride", type=int, help="How far the sliding window moves; default: half the window.")
@click.option("--batch", "rows", type=int, default=8, show_default=True, help="Documents side by side.")
@click.option("--resamples", type=int, default=2000, show_default=True, help="Of the bootstrap.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the bootstrap.")
@machine_options
@folder_option("--out", help="Folder for ablate.json, pictures, and records to resume from.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON instead of tables.")
def ablate(**given: Any) -> None:
    """What chunk size, K, memory size, shared rows, number format and gate are worth, one changed at a time.

    Perplexity under a sliding window and by segments, each value against the model's own settings, with paired 95 %
    intervals over documents. What needs training is compared between SideNets that were trained so: already (--also),
    or now (--recipe, --train-tokens), all with the same budget.
    """
    import torch
    from transformers.utils import logging

    from longmem.data.text import TextSource, read_documents
    from longmem.evaluation import ablation as evaluation
    from longmem.evaluation.ablation_plots import axis_figure
    from longmem.evaluation.bootstrap import Bootstrap
    from longmem.evaluation.documents import tokenize_documents
    from longmem.evaluation.loading import load_comparison, load_tokenizer
    from longmem.evaluation.perplexity import PerplexitySettings
    from longmem.evaluation.results import command_line, to_json, write_json
    from longmem.evaluation.themes import save

    logging.disable_progress_bar()
    out: Path | None = given["out"]
    source = TextSource(tuple(given["data"]), include=given["include"])
    texts = list(islice(read_documents(source), given["num_documents"]))
    runs = _train(given)
    path = given["model"] or (str(runs[0].model) if runs else None)
    if path is None:
        raise ConfigError("name a LongMem with --model, or train one with --recipe and --train-tokens")
    device = given["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = None if given["dtype"] == "auto" else getattr(torch, given["dtype"])
    loaded = load_comparison(path, backbone=given["backbone"], device=device, dtype=dtype)
    main = loaded.comparison.main
    if main is None:
        raise ConfigError(f"{path}: no LongMem checkpoint; ablations change the settings of one")
    settings = PerplexitySettings(
        window=given["window"] or loaded.default_window(),
        stride=given["stride"],
        protocols=tuple(name.strip() for name in given["protocol"].split(",")),
        rows=given["rows"],
        bootstrap=Bootstrap(resamples=given["resamples"], seed=given["seed"]),
    )
    names = ("data", "include", "num_documents", "max_tokens", "also", "recipe", "train_tokens", "dtype")
    if True:  # goes with this command
        result = evaluation.ablate(
            main,
            tokenize_documents(
                texts, load_tokenizer(loaded.tokenizer, loaded.comparison.model), max_tokens=given["max_tokens"]
            ),
            settings,
            _choices(given),
            axes=given["axes"],
            memory_size=given["memory_size"],
            trained=_trained(given["also"], runs, main),
            device=device,
            records=None if out is None else out / "records.jsonl",
            command=command_line(),
            config={"model": loaded.model, "tokenizer": loaded.tokenizer, "device": device}
            | {name: given[name] for name in names},
        )
    if out is not None:
        write_json(out / "ablate.json", result)
        click.echo(f"wrote {out / 'ablate.json'}", err=True)
        for axis in json.loads(to_json(result))["axes"]:
            save(lambda theme, axis=axis: axis_figure(axis, theme), out / f"ablate-{axis['name']}.png")  # type: ignore[misc]
    if given["as_json"]:
        click.echo(to_json(result))
    else:
        _show(result)


def _choices(given: dict[str, Any]) -> Any:
    from longmem.evaluation.ablation import Choices

    def numbers(name: str) -> tuple[int, ...] | None:
        return None if given[name] is None else tuple(given[name])

    return Choices(
        chunk_size=numbers("chunk_sizes"),
        num_retrieved=numbers("num_retrieved"),
        memory_size=numbers("memory_sizes"),
        memory_dtype=given["memory_dtypes"],
        gate_share=given["gate_shares"],
    )


def _train(given: dict[str, Any]) -> list[Any]:
    """Train what is asked for; the default of the same budget first."""
    values = {
        axis: given[option]
        for axis, option in (("memory_layer", "train_layers"), ("init", "train_inits"), ("fusion", "train_fusions"))
        if given[option]
    }
    if given["recipe"] is None:
        if values or given["train_tokens"]:
            raise ConfigError("--train-tokens, --train-layers, --train-inits and --train-fusions need a --recipe")
        return []
    if len(given["train_tokens"] or ()) != 1 or given["out"] is None:
        raise ConfigError("--recipe needs --train-tokens, one budget for every run, and --out, where the runs are kept")
    from longmem.evaluation.ablation_training import plan_runs, train_runs

    runs = plan_runs(given["recipe"], given["train_tokens"][0], values, given["out"] / "trained")
    train_runs(runs)
    return runs


def _trained(also: tuple[str, ...], runs: list[Any], main: Any) -> list[Trained]:
    from longmem.evaluation.ablation import Trained
    from longmem.evaluation.loading import checkpoint_folder
    from longmem.modeling.longmem import LongMem

    wrong = [one for one in also if not one.partition("=")[2]]
    if wrong:
        raise ConfigError(f"--also ({wrong[0]}) must be LABEL=FOLDER or AXIS:LABEL=FOLDER")

    def load(folder: str) -> Any:
        model: Any = LongMem.from_pretrained(checkpoint_folder(folder), backbone=main.backbone.model)
        return model.to(main.device).eval()

    found = []
    for one in also:
        name, _, folder = one.partition("=")
        axis, _, label = name.rpartition(":")
        found.append(Trained(axis or "other SideNets", label, load(folder)))
    if runs:
        default = load(str(runs[0].model))
        for axis in dict.fromkeys(run.axis for run in runs[1:]):
            own = str(default.memory_layer if axis == "memory_layer" else getattr(default.config, axis))
            found.append(Trained(axis, own, default, baseline=True))
            found += [Trained(axis, run.label, load(str(run.model))) for run in runs[1:] if run.axis == axis]
    return found


def _show(result: AblationResult) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    for axis in result.axes:
        console.print(_table(axis))
    for name, scores in result.without.items():
        said = ", ".join(f"{protocol} {_cell(score)}" for protocol, score in scores.items())
        console.print(f"{name.replace('_', ' ')} against the default: {said}", highlight=False, markup=False)
    for name, reason in result.left_out.items():
        console.print(f"{name} left out: {reason}", highlight=False, markup=False)


def _table(axis: Axis) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(axis.label, title=None if not axis.trained else "trained for each value", title_justify="left")
    protocols = list(axis.values[0].scores)
    for protocol in protocols:
        table.add_column(f"{protocol}: perplexity", justify="right")
        table.add_column("% against the default", justify="right")
    for value in axis.values:
        cells = [
            value.value + (" (default)" if value.default else "") + (f"\n{value.differs}" if value.differs else "")
        ]
        for protocol in protocols:
            score = value.scores[protocol]
            cells += [f"{score.perplexity:.3f}", "" if value.default else _cell(score)]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _cell(score: ValueScore) -> str:
    edges = score.documents or score.blocks
    return f"{score.percent:+.2f}" + ("" if edges is None else f" [{edges.low:+.2f}, {edges.high:+.2f}]")
