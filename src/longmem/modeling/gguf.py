"""Any ``.gguf`` file is a backbone: converted once into a folder of safetensors in the user's cache.

transformers turns the quantised tensors of a GGUF file back into plain floats, half a minute for 135 million
parameters. So it is read once and kept as an ordinary model folder, named by the file's SHA-256.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longmem.errors import BackboneError, first_line
from longmem.progress import Progress


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
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise BackboneError(f"reading {path.name} needs the package gguf; install it with: pip install gguf")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".part-"))
    try:
        _convert(path, part)
        part.chmod(0o755)
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first; its folder is the same
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
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
            loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        except Exception as problem:  # a file cut short, or of an unknown kind, fails in many ways in there
            raise BackboneError(
                f"{path} cannot be read as a GGUF model ({first_line(problem)}); give a causal language model of an "
                "architecture that transformers converts from GGUF"
            ) from problem
        progress.advance(note=f"{path.name}: weights")
        fields = {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
        model = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(fields), dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        if loaded.generation_config is not None:
            model.generation_config = loaded.generation_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        progress.advance(note=f"{path.name}: written")
