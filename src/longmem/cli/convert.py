"""``longmem convert``: checkpoints of the released code into ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from longmem.cli.common import FOLDER, options, show


@click.command(epilog="Example: longmem convert checkpoint_last.pt --vocabulary gpt2_bpe --out models/longmem")
@click.argument("checkpoint", type=FOLDER)
@click.option("--out", required=True, type=FOLDER, help="Folder to write; new or empty.")
@click.option("--backbone", type=FOLDER, help="Checkpoint of the backbone, where CHECKPOINT holds a SideNet alone.")
@click.option("--settings", type=FOLDER, help="JSON with heads and memory settings, for a state dict in safetensors. "
              "Default: the JSON beside it.")  # fmt: skip
@click.option("--vocabulary", type=FOLDER, help="Folder with the released encoder.json, vocab.bpe and dict.txt: the "
              "tokenizer is written too.")  # fmt: skip
@options("dtype", "json")
def command(checkpoint: Path, out: Path, dtype: str, as_json: bool, **given: Any) -> None:
    """Convert a checkpoint of the released LongMem code.

    CHECKPOINT is a fairseq file of the backbone (newgpt) or of LongMem. Nothing in it is executed, and fairseq is not
    needed. A LongMem is written to OUT and its backbone to OUT/backbone.
    """
    import torch

    from longmem.convert import convert

    show(as_json, convert(checkpoint, out, dtype=None if dtype == "auto" else getattr(torch, dtype), **given))
