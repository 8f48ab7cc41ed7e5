"""A SideNet's weights on disk: one safetensors file, or several and an index where they are large."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "sidenet.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARD_SIZE = "5GB"
"""Files larger than that are hard to move; the hub's own limit."""
_PATTERN = "sidenet{suffix}.safetensors"
TRAINER_INDEX = "model.safetensors.index.json"
"""Where ``transformers.Trainer`` looks for what it can resume from."""


def write_weights(
    tensors: Mapping[str, Tensor], folder: Path, *, max_shard_size: int | str, metadata: Mapping[str, str]
) -> None:
    """Write tensors and remove what an earlier save left; the bytes are on the disk when this returns.

    Whoever reads the folder meanwhile finds it incomplete: no weights, or an index whose files are missing.

    Args:
        tensors: by name, on any device; each file is brought to the CPU by itself.
        folder: that exists.
        max_shard_size: bytes of a file, or text such as ``"5GB"``.
        metadata: goes into every file's header.
    """
    plan = split_torch_state_dict_into_shards(dict(tensors), filename_pattern=_PATTERN, max_shard_size=max_shard_size)
    partials = {}
    for name, keys in plan.filename_to_tensors.items():
        partials[name] = folder / f".{name}.partial"
        some = {key: tensors[key].detach().to("cpu").contiguous() for key in keys}
        save_file(some, partials[name], metadata={"format": "pt", **metadata})
        _to_disk(partials[name])
    for old in (folder / INDEX, folder / WEIGHTS, *folder.glob("sidenet-*-of-*.safetensors")):
        old.unlink(missing_ok=True)
    for name, partial in partials.items():
        partial.replace(folder / name)
    if plan.is_sharded:
        index = {"metadata": {**plan.metadata, **metadata}, "weight_map": plan.tensor_to_filename}
        partial = folder / f".{INDEX}.partial"
        partial.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _to_disk(partial)
        partial.replace(folder / INDEX)
    write_trainer_index(folder, {f"sidenet.{name}": file for name, file in plan.tensor_to_filename.items()})
    _to_disk(folder)


def write_trainer_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    """Say which file has which weight of the model, so that a plain ``transformers.Trainer`` can resume."""
    index = {"metadata": {}, "weight_map": dict(weight_map)}
    (folder / TRAINER_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors in a folder, whether in one file or several."""
    if not (folder / INDEX).is_file():
        return load_file(folder / WEIGHTS)
    tensors: dict[str, Tensor] = {}
    weight_map = _weight_map(folder)
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{INDEX} names {name}, which is missing")
        tensors |= load_file(folder / name)
    if tensors.keys() != weight_map.keys():
        differing = ", ".join(sorted(tensors.keys() ^ weight_map.keys())[:3])
        raise ValueError(f"the files hold other tensors than {INDEX} says: {differing}")
    return tensors


def missing_weights(folder: Path) -> list[str]:
    """Names of the files that are not there; none where the weights are complete.

    Raises:
        ValueError: the index is damaged.
    """
    wanted = sorted(set(_weight_map(folder).values())) if (folder / INDEX).is_file() else [WEIGHTS]
    return [name for name in wanted if not (folder / name).is_file()]


def _weight_map(folder: Path) -> dict[str, str]:
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"{INDEX} cannot be read: {problem!r}") from problem
    strange = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if strange:  # an index decides which files are opened
        raise ValueError(f"{INDEX} names {strange[0]!r}, which is no file of this folder")
    return dict(weight_map)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
