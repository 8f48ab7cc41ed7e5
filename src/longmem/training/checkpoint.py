"""Resumable states of a run: complete or absent.

``checkpoints/step-00001000/`` holds ``model.safetensors`` (the trained weights), ``trainer.pt`` (optimiser, counters),
``rank-N.pt`` (stream position, random states, memory bank of process N) and ``checkpoint.json`` (the size and SHA-256
of the others). The folder is written under another name, made durable and renamed; a crash leaves the checkpoint
before or the one after. Not promised: that a disk which lies about ``fsync`` keeps it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from longmem.errors import CheckpointError

FORMAT = 1
MANIFEST = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds for one process.

    Attributes:
        step: when it was written.
        weights: of the model.
        trainer: what all processes have in common.
        ranks: the part of this process alone; where it was written by another number of processes, the parts of all.
        processes: how many wrote it.
    """

    step: int
    weights: dict[str, Tensor]
    trainer: dict[str, Any]
    ranks: list[dict[str, Any]]
    processes: int


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    weights: Mapping[str, Tensor],
    trainer: dict[str, Any],
    rank: dict[str, Any],
    keep_last: int,
    accelerator: Accelerator,
) -> Path:
    """Write ``folder/step-N`` with every process's part and remove all but the newest ``keep_last``."""
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.writing"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tensors = {name: weight.detach().contiguous() for name, weight in weights.items()}
        save_file(tensors, temporary / "model.safetensors")
        torch.save(trainer, temporary / "trainer.pt")
    accelerator.wait_for_everyone()
    torch.save(rank, temporary / f"rank-{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _publish(temporary, final, step, accelerator.num_processes)
        for old in list_checkpoints(folder)[:-keep_last]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(path: Path, process: int = 0, world: int = 1) -> Checkpoint:
    """Read what one process needs of a checkpoint.

    Raises:
        CheckpointError: it is not whole.
    """
    manifest = _verified(path)
    processes = int(manifest["processes"])
    parts = [process] if processes == world else range(processes)
    try:
        return Checkpoint(
            step=manifest["step"],
            weights=load_file(path / "model.safetensors"),
            trainer=_read(path / "trainer.pt"),
            ranks=[_read(path / f"rank-{part}.pt") for part in parts],
            processes=processes,
        )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {_way_out(path)}") from error


def _read(file: Path) -> dict[str, Any]:
    # mapped: of other processes' memories only a few rows are wanted
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return state


def list_checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def random_state() -> dict[str, Any]:
    """States of all generators, in types that ``torch.load(weights_only=True)`` reads."""
    version, numbers, gauss = random.getstate()
    kind, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(numbers), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), int(place), int(has_gauss), float(cached)],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Undo ``random_state``."""
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _publish(temporary: Path, final: Path, step: int, processes: int) -> None:
    files = sorted(path for path in temporary.iterdir() if path.name != MANIFEST)
    parts = sum(path.name.startswith("rank-") for path in files)
    if parts != processes:
        raise CheckpointError(
            f"{temporary}: {parts} of {processes} processes wrote their part here; put run.out_dir on a disk that all "
            "machines share"
        )
    manifest = {
        "format": FORMAT,
        "step": step,
        "processes": processes,
        "files": {path.name: {"size": path.stat().st_size, "sha256": _hash(path)} for path in files},
    }
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*files, temporary / MANIFEST, temporary]:
        _sync(path)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    _sync(final.parent)


def _verified(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint; leave --resume away to begin anew")
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: {MANIFEST} is missing or damaged ({error}); {_way_out(path)}") from error
    if manifest["format"] != FORMAT:
        theirs = manifest["format"]
        raise CheckpointError(f"{path}: format {theirs}, this version reads {FORMAT}; resume with the other version")
    for name, expected in files.items():
        size = (path / name).stat().st_size if (path / name).exists() else 0
        if size != expected["size"]:
            raise CheckpointError(f"{path / name}: {size} bytes of {expected['size']}, it was cut; {_way_out(path)}")
        if _hash(path / name) != expected["sha256"]:
            raise CheckpointError(f"{path / name}: its bytes have changed since it was written; {_way_out(path)}")
    return manifest


def _way_out(path: Path) -> str:
    others = [other.name for other in list_checkpoints(path.parent) if other.name < path.name]
    return f"delete {path.name} to resume from {others[-1]}" if others else f"delete {path.name} to begin anew"


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
