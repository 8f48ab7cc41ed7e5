"""A SideNet's weights on disk: one safetensors file, or several and an index where they are large."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor

from longmem.files import to_disk

WEIGHTS = "sidenet.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARD_SIZE = "5GB"
"""Files larger than that are hard to move; the hub's own limit."""
TRAINER_INDEX = "model.safetensors.index.json"
"""Where ``transformers.Trainer`` looks for what it can resume from."""


def write_weights(
    tensors: Mapping[str, Tensor], folder: Path, *, max_shard_size: int | str, metadata: Mapping[str, str]
) -> None:
    """Write tensors in place of what an earlier save left; the bytes are on the disk when this returns."""
    save_torch_state_dict(
        dict(tensors),
        folder,
        filename_pattern="sidenet{suffix}.safetensors",
        max_shard_size=max_shard_size,
        metadata=dict(metadata),
    )
    files = _weight_map(folder) if (folder / INDEX).is_file() else dict.fromkeys(tensors, WEIGHTS)
    write_trainer_index(folder, {f"sidenet.{name}": file for name, file in files.items()})
    for path in (*folder.glob("sidenet*"), folder):
        to_disk(path)


def write_trainer_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    """Say which file has which weight of the model, so that a plain ``transformers.Trainer`` can resume."""
    index = {"metadata": {}, "weight_map": dict(weight_map)}
    (folder / TRAINER_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors in a folder, whether in one file or several.

    Raises:
        OSError: a file is missing.
        SafetensorError: a file is damaged.
        ValueError: the index is damaged, or a file does not hold what the index says.
    """
    if not (folder / INDEX).is_file():
        return load_file(folder / WEIGHTS)
    tensors: dict[str, Tensor] = {}
    weight_map = _weight_map(folder)
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:  # an index decides which files are opened
            raise ValueError(f"{INDEX} names {name!r}, which is no file of this folder")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{INDEX} names {name}, which is missing")
        tensors |= load_file(folder / name)
    if tensors.keys() != weight_map.keys():
        differing = ", ".join(sorted(tensors.keys() ^ weight_map.keys())[:3])
        raise ValueError(f"the files hold other tensors than {INDEX} says: {differing}")
    return tensors


def _weight_map(folder: Path) -> dict[str, str]:
    try:
        weight_map: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"{INDEX} cannot be read: {problem!r}") from problem
    return weight_map
