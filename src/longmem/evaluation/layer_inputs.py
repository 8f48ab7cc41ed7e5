"""What ``longmem layers`` measures on: a backbone by itself, and rows of text."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longmem.errors import CheckpointError, DataError
from longmem.evaluation.loading import checked_device, checkpoint_folder

STANDARD_TEXT = ("argparse.py", "difflib.py", "doctest.py", "inspect.py", "subprocess.py", "typing.py")
"""Standard library sources that stand in for ``--data``: text that every machine has."""


def load_backbone(path: str, *, device: str = "auto", dtype: str = "auto") -> tuple[Any, str]:
    """A causal language model, or the backbone that a LongMem names; and where its tokenizer should be.

    Args:
        path: folder, run folder or hub id.
        device: ``auto`` takes a GPU where there is one.
        dtype: of the weights; ``auto`` is as saved.

    Raises:
        CheckpointError, BackboneError: there is no such model, or it cannot be loaded.
        ConfigError: no such device.
    """
    from longmem.modeling import loading

    where, revision = checkpoint_folder(path), "main"
    file = Path(where) / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if config.get("model_type") == "longmem":
        named, revision = config.get("backbone_name_or_path"), config.get("backbone_revision") or "main"
        if named is None:
            raise CheckpointError(f"{path}: does not say where its backbone is; give the backbone itself")
        where = str(Path(where) / named) if (Path(where) / named).is_dir() else str(named)
    place = checked_device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    model: Any = loading.load_backbone(where, revision, None if dtype == "auto" else getattr(torch, dtype))
    return model.to(place).eval(), where


def text_rows(documents: Sequence[str], tokenizer: Any, rows: int, length: int) -> Tensor:
    """(rows, length) token ids, from the middle of as many documents as there are long enough ones.

    Raises:
        DataError: there is not enough text for one row.
    """
    encoded = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in documents]
    stock = sorted((ids for ids in encoded if len(ids) >= length), key=len, reverse=True)
    if not stock:
        stock = [[token for ids in encoded for token in ids]]
    if len(stock[0]) < length:
        raise DataError(
            f"--data has {len(stock[0]):,} tokens, {length:,} are needed; give more text, or smaller --distances"
        )
    stock = stock[:rows]
    chosen = []
    for row in range(rows):
        ids, turn, turns = stock[row % len(stock)], row // len(stock), -(-rows // len(stock))
        # rows of one document are spread over it, and its first lines are left out where there is room
        start = (len(ids) - length) * (2 * turn + 1) // (2 * turns)
        chosen.append(ids[start : start + length])
    return torch.tensor(chosen)


def standard_text() -> list[str]:
    """Sources of this Python's own standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [(folder / name).read_text(encoding="utf-8") for name in STANDARD_TEXT if (folder / name).is_file()]
