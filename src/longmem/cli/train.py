"""Commands that make models: ``longmem train`` runs a recipe, ``calibrate`` makes a reader without a SideNet for any
backbone, ``convert`` takes checkpoints of the released code."""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from longmem.cli.common import AT_LEAST_1, FOLDER, Parsed, folder_option, options, print_json, show

HELD = 8  # without --valid every eighth text is validated on


@click.command()
@click.argument("recipe", type=FOLDER)
@click.option("--set", "overrides", multiple=True, metavar="SECTION.NAME=VALUE", help="Change one setting; repeatable.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of the run, if there is one.")
@click.option("--overwrite", is_flag=True, help="Remove an earlier run of the same name first.")
@click.option("--check", is_flag=True, help="Read the recipe, report every problem, train nothing.")
@click.option("--estimate", metavar="HARDWARE", help="Print memory, hours and cost on a machine, e.g. h100-80gb.")
@click.option("--quiet", is_flag=True, help="No lines on stderr.")
@options("json")
def train(
    recipe: Path, overrides: tuple[str, ...], check: bool, estimate: str | None, as_json: bool, **given: Any
) -> None:
    """Train what RECIPE describes: a TOML file, or the name of one that comes with the package.

    \b
    longmem train tiny-cpu
    longmem train gpt2-small --set run.seed=2 --set optim.rows=4
    longmem train gpt2-small --resume
    longmem train gpt2-small --estimate a100-80gb
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that nothing here uses
    from longmem.training.recipe import Recipe

    settings = Recipe.load(recipe, overrides)
    if check:
        click.echo(settings.model_dump_json(indent=2) if as_json else f"{recipe}: {settings.task}, no problems found")
        return
    if estimate is not None:
        from longmem.training.estimate import estimate as estimated

        click.echo("\n".join(estimated(settings, estimate).lines()))
        return
    from accelerate import PartialState

    from longmem.training import run

    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    if not given["quiet"]:
        logging.getLogger("longmem").setLevel(logging.INFO)
    result = run.train(settings, **given)
    PartialState().destroy_process_group()  # its threads may not outlive main: the process would abort
    if not result.main:
        return
    if as_json:
        names = ("out_dir", "model_dir", "step", "tokens", "seconds", "evaluation")
        fields = {name: getattr(result, name) for name in names}
        print_json({**fields, "seconds": round(result.seconds, 1)})
    else:
        click.echo(result.model_dir or result.out_dir)


def _layers(word: str) -> str | tuple[int, ...]:
    return word if word == "auto" else tuple(sorted(map(int, word.split(","))))


@click.command(epilog="Example: longmem calibrate model.gguf --data books/ --data python=src/ --out models/reader")
@click.argument("model")
@click.option("--data", multiple=True, required=True, metavar="[KIND=]PATH", help="Text to calibrate on; repeatable.")
@click.option(
    "--valid", multiple=True, metavar="[KIND=]PATH", help="Text to validate on; default: an eighth of --data."
)
@click.option(
    "--layers",
    type=Parsed("LAYERS", _layers, 'neither "auto" nor numbers such as 18,20,23'),
    default="auto",
    help="Layers that read memory, as 18,20,23.",
)
@options("tokenizer")
@click.option("--updates", type=AT_LEAST_1, default=400)
@click.option("--passages", type=AT_LEAST_1, default=24, help="Of each kind of text.")
@click.option("--validation-windows", type=AT_LEAST_1, default=16, help="Of each kind of text.")
@click.option("--window", type=click.IntRange(min=8), default=1024, help="Tokens seen at once.")
@click.option("--memory", type=AT_LEAST_1, default=4096, help="Tokens remembered.")
@click.option("--facts", type=click.FloatRange(min=0), default=0.2, help="Weight of asked facts.")
@click.option("--chunk-size", type=AT_LEAST_1, default=4)
@click.option("--num-retrieved", type=AT_LEAST_1, default=64)
@options("seed", "device", "dtype")
@folder_option("--out", required=True, help="Folder for config.json, gates.safetensors and calibration.json.")
def calibrate(model: str, data: tuple[str, ...], valid: tuple[str, ...], layers: Any, out: Path, **chosen: Any) -> None:
    """Let MODEL, any causal language model, read memory at some of its own layers.

    Only gates are trained, a few kilobytes: every token learns how much of each head to give to memory. On validation
    text the result is never above the model alone. Texts may be of several kinds, which then take turns:
    --data books=books/ --data latex=latex/.
    """
    import torch

    from longmem.data.tokens import check_tokenizer, load_tokenizer
    from longmem.evaluation.layers import best_layers
    from longmem.evaluation.results import header, write_json
    from longmem.modeling.baselines import TrainingFree
    from longmem.modeling.checkpoints import checked_device
    from longmem.modeling.loading import gguf_folder, is_gguf
    from longmem.training import calibrate as calibrating

    sizes = {name: chosen.pop(name) for name in ("chunk_size", "num_retrieved")}
    counts = {name: chosen.pop(name) for name in ("passages", "validation_windows")}
    tokenizer, device, dtype = (chosen.pop(name) for name in ("tokenizer", "device", "dtype"))
    settings = calibrating.CalibrationSettings(**chosen)
    # a .gguf file holds its tokenizer too
    reader = load_tokenizer(tokenizer or (gguf_folder(model) if is_gguf(model) else model))
    texts = _by_kind(data)
    if valid:
        held = _by_kind(valid)
    else:  # of those that are long enough: short ones alone would validate nothing
        texts = {kind: [each for each in some if len(each) >= 2 * settings.passage] for kind, some in texts.items()}
        held = {kind: some[::HELD] for kind, some in texts.items()}
        texts = {kind: [text for n, text in enumerate(some) if n % HELD] or some for kind, some in texts.items()}
    training, check = (
        {kind: calibrating.passages_of(some, reader, settings, counts[count]) for kind, some in of.items()}
        for of, count in ((texts, "passages"), (held, "validation_windows"))
    )
    place = checked_device(device)
    if layers == "auto":
        text = [ids for some in check.values() for ids in some[:1]]
        layers = partial(best_layers, texts=text, tokenizer=reader, device=place, seed=settings.seed, **sizes)
    made = TrainingFree.from_backbone(model, memory_layers=layers, dtype=dtype, fusion="token", **sizes)
    check_tokenizer(reader, made)
    torch.nn.Module.to(made, place)
    done = calibrating.calibrate(made, training, check, reader, settings)
    made.save_pretrained(out)
    reader.save_pretrained(out)
    about = header(
        "calibrate",
        config={**chosen, **counts, "memory_layers": made.memory_layers, "dtype": dtype, **sizes},
        models={"backbone": model, "fingerprint": made.fingerprint},
        samples={kind: len(some) for kind, some in training.items()},
        seeds=[settings.seed],
        seconds=done.validations[-1].seconds,
    )
    write_json(out / "calibration.json", {"header": about, **asdict(done)})
    if done.best is None:
        click.echo("nothing was better than the backbone alone: its gates are closed")
    else:
        changes = ", ".join(f"{kind} {change:+.3f}" for kind, change in done.best.change.items())
        click.echo(f"nats per token against the backbone alone, after {done.best.update} updates: {changes}")


def _by_kind(options: tuple[str, ...]) -> dict[str, list[str]]:
    """Texts of every ``[KIND=]PATH``; a path without a kind is ``text``."""
    from longmem.data.text import read_documents

    paths = defaultdict(list)
    for option in options:
        kind, equals, path = option.partition("=")
        paths[kind if equals else "text"].append(path if equals else option)
    return {kind: [document.text for document in read_documents(some)] for kind, some in paths.items()}


@click.command(epilog="Example: longmem convert checkpoint_last.pt --vocabulary gpt2_bpe --out models/longmem")
@click.argument("checkpoint", type=FOLDER)
@click.option("--out", required=True, type=FOLDER, help="Folder to write; new or empty.")
@click.option("--backbone", type=FOLDER, help="Checkpoint of the backbone, where CHECKPOINT holds a SideNet alone.")
@click.option("--settings", type=FOLDER, help="JSON with heads and memory settings, for a state dict in safetensors. "
              "Default: the JSON beside it.")  # fmt: skip
@click.option("--vocabulary", type=FOLDER, help="Folder with the released encoder.json, vocab.bpe and dict.txt: the "
              "tokenizer is written too.")  # fmt: skip
@options("dtype", "json")
def convert(checkpoint: Path, out: Path, dtype: str, as_json: bool, **given: Any) -> None:
    """Convert a checkpoint of the released LongMem code.

    CHECKPOINT is a fairseq file of the backbone (newgpt) or of LongMem. Nothing in it is executed, and fairseq is not
    needed. A LongMem is written to OUT and its backbone to OUT/backbone.
    """
    from longmem.convert import convert as converted
    from longmem.modeling.loading import named_dtype

    show(as_json, converted(checkpoint, out, dtype=named_dtype(dtype), **given))
