"""``longmem convert``: checkpoints of the released code into ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from longmem.cli.common import print_json
from longmem.cli.options import FOLDER, options

DTYPES = ("keep", "float32", "float16", "bfloat16")


@click.command(epilog="Example: longmem convert checkpoint_last.pt --vocabulary gpt2_bpe --out models/longmem")
@click.argument("checkpoint", type=FOLDER)
@click.option("--out", required=True, type=FOLDER, help="Folder to write; new or empty.")
@click.option(
    "--backbone",
    type=FOLDER,
    help="The backbone's own checkpoint, or a folder it was converted to. Not needed where CHECKPOINT holds it.",
)
@click.option(
    "--settings",
    type=FOLDER,
    help="JSON with heads and memory settings, for a state dict in safetensors. Default: the JSON beside it.",
)
@click.option(
    "--vocabulary",
    type=FOLDER,
    help="Folder with the released encoder.json, vocab.bpe and dict.txt: the tokenizer is written too.",
)
@click.option("--dtype", type=click.Choice(DTYPES), default="keep", help="Of the weights written.")
@options("json")
def command(checkpoint: Path, out: Path, dtype: str, as_json: bool, **given: Any) -> None:
    """Convert a checkpoint of the released LongMem code.

    CHECKPOINT is a fairseq file of the backbone (newgpt) or of LongMem. Nothing in it is executed, and fairseq is not
    needed. A LongMem is written to OUT and its backbone to OUT/backbone.
    """
    import torch

    from longmem.convert.write import convert

    chosen = None if dtype == "keep" else getattr(torch, dtype)
    done = convert(checkpoint, out, dtype=chosen, **given)
    if done.ignored:
        click.echo(f"ignored {len(done.ignored)} unknown tensors: {', '.join(done.ignored)}", err=True)
    if as_json:
        print_json(done)
        return
    trained = f", {done.trained:,} of them in the SideNet" if done.trained else ""
    click.echo(f"{done.out}: {done.kind} of {done.parameters:,} parameters{trained}, {done.dtype}")
    if done.backbone != done.out:
        click.echo(f"{done.backbone}: its backbone")
