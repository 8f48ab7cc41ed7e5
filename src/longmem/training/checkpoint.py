"""Checkpoints: complete or absent, and found to be damaged before anything is read from them.

A folder is written under another name, made durable and renamed; a crash leaves the checkpoint before or the one
after. Not promised: that a disk which lies about ``fsync`` keeps it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from longmem.errors import CheckpointError
from longmem.files import to_disk

MANIFEST = "complete.json"


def list_checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def publish(written: Path, final: Path) -> None:
    """Name a folder once all its bytes are on the disk; ``complete.json`` has size and SHA-256 of each file."""
    files = sorted(path for path in written.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(written)): [path.stat().st_size, _hash(path)] for path in files}
    (written / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*files, written / MANIFEST, written]:
        to_disk(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(written, final)
    to_disk(final.parent)


def verify(folder: Path) -> None:
    """Read a checkpoint through."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint; train without resuming")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{folder}: {MANIFEST} is missing or damaged; {way_out(folder)}") from problem
    for name, (size, digest) in manifest.items():
        found = (folder / name).stat().st_size if (folder / name).exists() else 0
        if found != size:
            raise CheckpointError(f"{folder / name}: {found} bytes of {size}, it was cut; {way_out(folder)}")
        if _hash(folder / name) != digest:
            raise CheckpointError(f"{folder / name}: its bytes have changed since it was written; {way_out(folder)}")


def saved_weights(folder: Path) -> dict[str, Tensor]:
    """All weights in a checkpoint, by their names in the model."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return load_file(folder / "model.safetensors")
    weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    files = {name: load_file(folder / name) for name in set(weight_map.values())}
    # a SideNet's files, and a backbone's in a folder of its own, leave the first part of the names away
    return {
        name: files[file][name.removeprefix("sidenet.").removeprefix("backbone.model.")]
        for name, file in weight_map.items()
    }


def way_out(folder: Path) -> str:
    others = [other.name for other in list_checkpoints(folder.parent) if other != folder]
    return f"delete {folder.name} to resume from {others[-1]}" if others else f"delete {folder.name} to begin anew"


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
