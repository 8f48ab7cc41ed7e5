"""``longmem layers``: which layer of a backbone to remember."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from longmem.cli.common import folder_option, options, token_counts
from longmem.cli.tasks import save_and_show

if TYPE_CHECKING:
    from torch import Tensor

EFFECT_WINDOW = 512
"""Tokens of text that are predicted behind as many in memory."""


@click.command(epilog="Example: longmem layers models/small/backbone --data latex/valid.tar.xz --out runs/layers")
@click.argument("model")
@click.option("--data", multiple=True, help="Text: file, folder, .jsonl or archive; default: Python's own sources.")
@options("tokenizer")
@click.option(
    "--distances",
    callback=token_counts,
    default="128,256,512,1024",
    help="Tokens between occurrences.",
)
@click.option("--segment", type=int, help="Tokens encoded at once; default: the model's window, at most 1024.")
@click.option("--rows", type=click.IntRange(min=1), default=4, help="Passages per source.")
@click.option("--stride", type=click.IntRange(min=1), default=2, help="Of the SideNet to be.")
@click.option("--chunk-size", type=int, default=4)
@click.option("--num-retrieved", type=int, default=64, help="Tokens that a query may retrieve.")
@options("seed")
@click.option("--effect", is_flag=True, help="Measure what reading memory is worth, at each layer and at sets of four.")
@options("device", "dtype", "json")
@folder_option("--out", help="Folder for layers.json and the heat map layers.png.")
def command(
    model: str,
    data: tuple[str, ...],
    tokenizer: str | None,
    distances: list[int],
    rows: int,
    effect: bool,
    **shared: Any,
) -> None:
    """Find the layer whose keys are worth remembering.

    For every layer and head of MODEL (a causal language model, or the backbone of a LongMem): how well its
    position-free queries find the token that followed an earlier occurrence of the current one. Keys can be remembered
    to advantage only where a backbone can copy, so its loss on text that it has just read is shown as well.

    A key that is found is not yet a memory that helps. --effect measures what is predicted better when a layer, or a
    set of layers, reads memory: facts told in an earlier conversation, and text. It takes minutes.
    """
    import torch
    from transformers.utils import logging

    from longmem.evaluation.layers import conclusion, load_backbone, measure_layers
    from longmem.evaluation.loading import checked_device
    from longmem.evaluation.results import command_line

    logging.disable_progress_bar()
    dtype = None if shared["dtype"] == "auto" else getattr(torch, shared["dtype"])
    backbone, beside = load_backbone(model, device=checked_device(shared["device"]), dtype=dtype)
    if effect:
        texts = _text(backbone, data, tokenizer or beside, rows, 2 * EFFECT_WINDOW + 1, given=True) if data else None
        return _effect(backbone, texts, tokenizer or beside, model, shared)
    report = measure_layers(
        backbone,
        _text(backbone, data, tokenizer or beside, rows, max(distances), given=bool(data or tokenizer)),
        distances=tuple(distances),
        rows=rows,
        name=model,
        command=command_line(),
        **{name: shared[name] for name in ("segment", "chunk_size", "num_retrieved", "stride", "seed")},
    )
    save_and_show(report, shared)
    if not shared["as_json"]:
        click.echo(f"\n{conclusion(report)}")


def _effect(backbone: Any, texts: Tensor | None, tokenizer: str, name: str, shared: dict[str, Any]) -> None:
    """Measure, save and print the effect of layers."""
    from dataclasses import asdict

    from longmem.data import load_tokenizer
    from longmem.evaluation.layers import measure_effect
    from longmem.evaluation.results import RunHeader, command_line, to_json, write_json

    settings = {key: shared[key] for key in ("chunk_size", "num_retrieved", "seed")}
    report = measure_effect(
        backbone,
        [] if texts is None else list(texts),
        load_tokenizer(tokenizer, backbone),
        window=EFFECT_WINDOW,
        **settings,
    )
    samples = {"texts": 0 if texts is None else len(texts)}
    header = RunHeader("effect", command_line(), settings, {"backbone": name}, samples, [shared["seed"]])
    result = {"header": asdict(header), **report.as_dict()}
    if shared["out"] is not None:
        write_json(shared["out"] / "effect.json", result)
    if shared["as_json"]:
        click.echo(to_json(result))
        return
    rows = [("none", report.alone), ("context in the window", report.context)]
    rows += [(", ".join(map(str, found.layers)), found) for found in [*report.single, *report.sets[1:]]]
    click.echo(f"{'layers that read':<24}{'facts':>8}{'text':>8}{'recovered':>11}")
    for layers, found in rows:
        numbers = "".join("       -" if value is None else f"{value:8.3f}" for value in (found.facts, found.text))
        click.echo(f"{layers:<24}{numbers}{report.recovered(found):11.0%}")
    click.echo(f"\nread memory at {', '.join(map(str, report.best))}")


def _text(
    backbone: Any, data: tuple[str, ...], tokenizer: str, rows: int, length: int, *, given: bool
) -> Tensor | None:
    """Rows of text; without ``--data`` and without a tokenizer, none."""
    from longmem.data import load_tokenizer, read_documents
    from longmem.errors import DataError
    from longmem.evaluation.layers import standard_text, text_rows

    try:
        reader = load_tokenizer(tokenizer, backbone)
    except DataError:
        if given:
            raise
        click.echo(f"{tokenizer}: no tokenizer, measuring random tokens only; --tokenizer names one", err=True)
        return None
    documents = [document.text for document in read_documents(list(data))] if data else standard_text()
    return text_rows(documents, reader, rows, length)
