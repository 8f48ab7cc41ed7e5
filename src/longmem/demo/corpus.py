"""Real long text that every machine has: the source of Python's standard library, one document per package."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from longmem.data.python_source import STDLIB, TEST, packages
from longmem.errors import DataError

HELD_OUT = TEST[STDLIB]
"""Packages that are measured on and never trained on."""


@dataclass(frozen=True)
class Corpus:
    """Text files on disk, one per package.

    Attributes:
        train: folder of the documents to train on.
        held_out: folder of the documents to measure on.
        digest: hash of all names and texts.
        documents: how many there are to train on.
        characters: in the documents to train on.
        held_out_names: the packages held out.
    """

    train: Path
    held_out: Path
    digest: str
    documents: int
    characters: int
    held_out_names: tuple[str, ...]


def write_corpus(folder: Path, library: Path | None = None) -> Corpus:
    """Write every package as a text file, below ``train`` or ``held-out``.

    Args:
        folder: where to.
        library: folder of packages; None is this Python's standard library.

    Raises:
        DataError: there are no packages, or none of those to hold out.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    texts = dict(packages(library))
    held_out = tuple(name for name in HELD_OUT if name in texts)
    if not held_out or len(texts) == len(held_out):
        wanted = ", ".join(HELD_OUT)
        raise DataError(
            f"{library}: {len(texts)} packages with source files, {len(held_out)} of the held-out ones ({wanted}); "
            "run the demo with a Python whose standard library is there as .py files"
        )
    digest = hashlib.sha256()
    for part in ("train", "held-out"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for stale in (folder / part).glob("*.txt"):
            if (stale.stem in held_out) != (part == "held-out") or stale.stem not in texts:
                stale.unlink()
    for name, text in texts.items():
        file = folder / ("held-out" if name in held_out else "train") / f"{name}.txt"
        data = text.encode()
        digest.update(name.encode() + b"\0" + data)
        if not file.exists() or file.read_bytes() != data:
            file.write_bytes(data)
    trained = [text for name, text in texts.items() if name not in held_out]
    return Corpus(
        folder / "train", folder / "held-out", digest.hexdigest(), len(trained), sum(map(len, trained)), held_out
    )
