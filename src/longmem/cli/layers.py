"""``longmem layers``: which layers of a backbone to remember."""

from __future__ import annotations

from itertools import islice
from typing import Any

import click

from longmem.cli.common import folder_option, options, token_counts
from longmem.cli.tasks import save_and_show


@click.command(epilog="Example: longmem layers models/small/backbone --data latex/valid.tar.xz --out runs/layers")
@click.argument("model")
@click.option("--data", multiple=True, help="Text: file, folder, .jsonl or archive; default: Python's own sources.")
@options("tokenizer")
@click.option(
    "--distances", callback=token_counts, default="128,256,512,1024", help="Tokens between occurrences that keys find."
)
@click.option("--rows", type=click.IntRange(min=1), default=4, help="Passages of text.")
@click.option("--stride", type=click.IntRange(min=1), help="Of the SideNet to be: take only layers that it copies.")
@click.option("--chunk-size", type=int, default=4)
@click.option("--num-retrieved", type=int, default=64, help="Tokens that a query may retrieve.")
@options("seed")
@options("device", "dtype", "json")
@folder_option("--out", help="Folder for layers.json and the heat map layers.png.")
def command(model: str, data: tuple[str, ...], tokenizer: str | None, **given: Any) -> None:
    """Find the layers whose memory is worth most.

    For every layer of MODEL (a causal language model, or the backbone of a LongMem): what is predicted better when it
    reads memory, of facts told in an earlier conversation and of text. Then for sets of up to four layers: the best
    one, and the one that adds most to it, and so on. It takes minutes.

    That is explained by the keys: for every layer and head, how well position-free queries find the token that followed
    an earlier occurrence of the current one. Keys can be remembered to advantage only where a backbone can copy, so its
    loss on text that it has just read is shown as well.
    """
    import torch
    from transformers.utils import logging

    from longmem.data import load_tokenizer, read_documents
    from longmem.evaluation.layers import conclusion, layers_report, text_rows
    from longmem.evaluation.results import header
    from longmem.evaluation.tasks.hidden import standard_library
    from longmem.modeling.checkpoints import backbone_of, checked_device, checkpoint_folder
    from longmem.modeling.loading import load_backbone

    logging.disable_progress_bar()
    dtype = None if given["dtype"] == "auto" else getattr(torch, given["dtype"])
    device, (where, revision) = checked_device(given["device"]), backbone_of(checkpoint_folder(model))
    backbone: Any = load_backbone(where, revision, dtype)
    backbone.to(device).eval()
    reader = load_tokenizer(tokenizer or where, backbone)
    texts = (document.text for document in read_documents(list(data))) if data else islice(standard_library(), 4)
    text = text_rows(texts, reader, given["rows"], max(given["distances"]))
    names = ("distances", "rows", "stride", "chunk_size", "num_retrieved", "seed")
    settings = {name: given[name] for name in names}
    models = {"backbone": model, "class": type(backbone).__name__}
    about = header("layers", settings, models, {"text": len(text), "random": given["rows"]}, [given["seed"]])
    result = {"header": about, **layers_report(backbone, text, reader, **settings)}
    save_and_show(result, given)
    if not given["as_json"]:
        click.echo(f"\n{conclusion(result)}")
