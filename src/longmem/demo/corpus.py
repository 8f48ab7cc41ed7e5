"""Real long text that every machine has: the source of Python's standard library, one document per package."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from longmem.errors import DataError

HELD_OUT = ("email", "http", "logging", "xmlrpc")
"""Packages that are measured on and never trained on."""

# Tests and other people's packages differ from machine to machine; the rest are tables, not text that refers back.
LEFT_OUT = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "lib2to3",
        "encodings",
        "pydoc_data",
        "__pycache__",
    }
)
SHORTEST = 2_000
"""Packages of fewer characters are left out."""
FILE_LINE = "# file: "


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


def packages(library: Path) -> Iterator[tuple[str, str]]:
    """Every package by name: its files in the order of their paths, each behind a line that names it.

    A module outside any package is a package of one file.
    """
    for top in sorted(library.iterdir()):
        if top.name in LEFT_OUT or top.name.startswith((".", "_sysconfigdata")):
            continue
        files = sorted(top.rglob("*.py")) if top.is_dir() else [top] if top.suffix == ".py" else []
        parts = []
        for file in files:
            path = file.relative_to(library)
            if LEFT_OUT.isdisjoint(path.parts):
                parts.append(f"{FILE_LINE}{path.as_posix()}\n{_text(file)}\n")
        text = "".join(parts)
        if len(text) >= SHORTEST:
            yield top.name.removesuffix(".py"), text


def file_at(text: str, position: int) -> str:
    """The file that a position of a package's text lies in."""
    start = text.rfind(FILE_LINE, 0, position + len(FILE_LINE))
    while start > 0 and text[start - 1] != "\n":
        start = text.rfind(FILE_LINE, 0, start)
    return text[start + len(FILE_LINE) : text.index("\n", start)] if start >= 0 else ""


def _text(file: Path) -> str:
    """A few test-like files of the library are deliberately not UTF-8; their odd bytes become the replacement sign."""
    return file.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
