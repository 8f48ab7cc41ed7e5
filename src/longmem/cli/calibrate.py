"""``longmem calibrate``: a reader without a SideNet for any backbone."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from longmem.cli.common import folder_option, options
from longmem.errors import ConfigError

HELD = 8  # without --valid every eighth text is validated on


@click.command(epilog="Example: longmem calibrate model.gguf --data books/ --data python=src/ --out models/reader")
@click.argument("model")
@click.option("--data", multiple=True, required=True, metavar="[KIND=]PATH", help="Text to calibrate on; repeatable.")
@click.option(
    "--valid", multiple=True, metavar="[KIND=]PATH", help="Text to validate on; default: an eighth of --data."
)
@click.option("--layers", default="auto", help="Layers that read memory, as 18,20,23.")
@options("tokenizer")
@click.option("--updates", type=click.IntRange(min=1), default=400)
@click.option("--passages", type=click.IntRange(min=1), default=24, help="Of each kind of text.")
@click.option("--validation-windows", type=click.IntRange(min=1), default=16, help="Of each kind of text.")
@click.option("--window", type=click.IntRange(min=8), default=1024, help="Tokens seen at once.")
@click.option("--memory", type=click.IntRange(min=1), default=4096, help="Tokens remembered.")
@click.option("--facts", type=click.FloatRange(min=0), default=0.2, help="Weight of asked facts.")
@click.option("--chunk-size", type=click.IntRange(min=1), default=4)
@click.option("--num-retrieved", type=click.IntRange(min=1), default=64)
@options("seed", "device", "dtype")
@folder_option("--out", required=True, help="Folder for config.json, gates.safetensors and calibration.json.")
def command(model: str, data: tuple[str, ...], valid: tuple[str, ...], layers: str, out: Path, **chosen: Any) -> None:
    """Let MODEL, any causal language model, read memory at some of its own layers.

    Only gates are trained, a few kilobytes: every token learns how much of each head to give to memory. On validation
    text the result is never above the model alone. Texts may be of several kinds, which then take turns:
    --data books=books/ --data latex=latex/.
    """
    import torch
    from transformers.utils import logging

    from longmem.data import check_tokenizer, load_tokenizer
    from longmem.evaluation.layers import best_layers
    from longmem.evaluation.results import header, write_json
    from longmem.modeling.baselines import TrainingFree
    from longmem.modeling.checkpoints import checked_device
    from longmem.modeling.gguf import gguf_folder, is_gguf
    from longmem.training.calibrate import CalibrationSettings, calibrate, passages_of

    logging.disable_progress_bar()
    sizes = {name: chosen.pop(name) for name in ("chunk_size", "num_retrieved")}
    counts = {name: chosen.pop(name) for name in ("passages", "validation_windows")}
    tokenizer, device, dtype = (chosen.pop(name) for name in ("tokenizer", "device", "dtype"))
    settings = CalibrationSettings(**chosen)
    # a .gguf file holds its tokenizer too
    reader = load_tokenizer(tokenizer or (gguf_folder(model) if is_gguf(model) else model))
    texts = _by_kind(data)
    held = _by_kind(valid) if valid else {kind: some[::HELD] for kind, some in texts.items()}
    if not valid:
        texts = {kind: [text for n, text in enumerate(some) if n % HELD] or some for kind, some in texts.items()}
    train = {kind: passages_of(some, reader, settings, counts["passages"]) for kind, some in texts.items()}
    check = {kind: passages_of(some, reader, settings, counts["validation_windows"]) for kind, some in held.items()}

    loaded = None if dtype == "auto" else getattr(torch, dtype)
    place = checked_device(device)
    text = [ids for some in check.values() for ids in some[:1]]
    wanted = (
        best_layers(text, reader, device=place, seed=settings.seed, **sizes) if layers == "auto" else _numbers(layers)
    )
    made = TrainingFree.from_backbone(model, memory_layers=wanted, dtype=loaded, fusion="token", **sizes)
    check_tokenizer(reader, made)
    torch.nn.Module.to(made, place)
    done = calibrate(made, train, check, reader, settings)
    made.save_pretrained(out)
    reader.save_pretrained(out)
    about = header(
        "calibrate",
        {**chosen, **counts, "memory_layers": made.memory_layers, "dtype": dtype, **sizes},
        {"backbone": model, "fingerprint": made.fingerprint},
        {kind: len(some) for kind, some in train.items()},
        [settings.seed],
        done.validations[-1].seconds,
    )
    write_json(out / "calibration.json", {"header": about, **asdict(done)})
    click.echo(_said(done))


def _by_kind(options: tuple[str, ...]) -> dict[str, list[str]]:
    """Texts of every ``[KIND=]PATH``; a path without a kind is ``text``."""
    from longmem.data import read_documents

    paths = defaultdict(list)
    for option in options:
        kind, equals, path = option.partition("=")
        paths[kind if equals else "text"].append(path if equals else option)
    return {kind: [document.text for document in read_documents(some)] for kind, some in paths.items()}


def _numbers(layers: str) -> tuple[int, ...]:
    try:
        return tuple(sorted(int(word) for word in layers.split(",")))
    except ValueError:
        raise ConfigError(f'--layers ({layers}) must be "auto" or numbers such as 18,20,23') from None


def _said(done: Any) -> str:
    if done.best is None:
        return "nothing was better than the backbone alone: its gates are closed"
    changes = ", ".join(f"{kind} {change:+.3f}" for kind, change in done.best.change.items())
    return f"nats per token against the backbone alone, after {done.best.update} updates: {changes}"
