"""Read ``torch.save`` files without running anything that is in them.

A pickle names classes and functions to call. Those on a short list are what a checkpoint is made of (tensors, plain
containers, ``argparse.Namespace``); every other name becomes a ``Foreign``, an inert record of what was pickled, so
that a checkpoint with a stray settings object or meter in it can still be read, and a hostile one does nothing.
"""

from __future__ import annotations

import argparse
import collections
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from longmem.errors import CheckpointError

_ALLOWED: dict[tuple[str, str], Any] = {
    ("argparse", "Namespace"): argparse.Namespace,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    **{
        ("builtins", kind.__name__): kind
        for kind in (set, frozenset, slice, complex, bytearray, list, dict, tuple, int, float, str, bool)
    },
    **{
        ("torch", str(dtype).removeprefix("torch.")): dtype
        for dtype in (
            torch.float16,
            torch.bfloat16,
            torch.float32,
            torch.float64,
            torch.int32,
            torch.int64,
            torch.uint8,
            torch.bool,
        )
    },
}


class Foreign:
    """What is left of a pickled object whose class is not on the list: its name and its raw contents."""

    pickled_name = "?"

    def __new__(cls, *args: Any, **kwargs: Any) -> Foreign:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.arguments = args
        self.contents: Any = None

    def __setstate__(self, state: Any) -> None:
        self.contents = state

    # a pickle may fill a list or a dict subclass item by item
    def append(self, item: Any) -> None:
        self.contents = [*(self.contents or []), item]

    def extend(self, items: Any) -> None:
        self.contents = [*(self.contents or []), *items]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.contents = {**(self.contents or {}), key: value}

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"<{self.pickled_name}>"


class Unpickler(pickle.Unpickler):
    """``pickle.Unpickler`` that can only reach the names above; ``torch.load`` adds the storages itself."""

    def find_class(self, module: str, name: str) -> Any:
        found = _ALLOWED.get((module, name))
        if found is not None:
            return found
        return type("Foreign", (Foreign,), {"pickled_name": f"{module}.{name}"})


def load(file: Any, **kwargs: Any) -> Any:
    """``pickle.load`` with the restricted unpickler; ``torch.load`` calls this for files older than torch 1.6."""
    return Unpickler(file, **kwargs).load()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The dict of a ``torch.save`` file, on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, or does not hold a dict.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the path of a checkpoint")
    if _is_torchscript(path):
        raise CheckpointError(
            f"{path}: is a TorchScript program, not a checkpoint; give the file that torch.save wrote"
        )
    try:
        # weights_only=False hands the reading to our own unpickler, which is stricter about calls than torch's
        loaded = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_this_module())
    except MemoryError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({_why(path, error)}); copy it again") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{path}: holds a {type(loaded).__name__} where a checkpoint is a dict with a 'model' entry"
        )
    return cast("dict[str, Any]", loaded)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the path of a checkpoint")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({_first_line(error)}); copy it again") from error


def plain(value: Any) -> Any:
    """Namespaces and settings objects as plain dicts and lists, recursively.

    A pickled omegaconf node keeps its children under ``_content`` and a leaf under ``_val``.
    """
    if isinstance(value, argparse.Namespace):
        return plain(vars(value))
    if isinstance(value, Foreign):
        contents = value.contents
        if isinstance(contents, tuple) and len(contents) == 2:
            contents = {**(contents[0] or {}), **(contents[1] or {})}
        if isinstance(contents, dict):
            for inner in ("_content", "_val"):
                if inner in contents:
                    return plain(contents[inner])
            return plain(contents)
        return None
    if isinstance(value, dict):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


def _is_torchscript(path: Path) -> bool:
    # torch.load would hand such a file to torch.jit.load, past our unpickler
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") or name == "constants.pkl" for name in archive.namelist())


def _why(path: Path, error: Exception) -> str:
    if not path.stat().st_size:
        return "the file is empty"
    with path.open("rb") as file:
        begins_as_zip = file.read(4) == b"PK\x03\x04"
    if begins_as_zip and not zipfile.is_zipfile(path):
        return f"the file ends before its table of contents, after {path.stat().st_size:,} bytes: it was cut off"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def _this_module() -> Any:
    return sys.modules[__name__]
