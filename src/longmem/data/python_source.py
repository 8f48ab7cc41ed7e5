"""Real long text that every machine has: Python source, of the standard library and of what this package depends on.

A document is a package: its files in the order of their paths, each behind a line that names it. Source refers back to
itself over long distances (names, signatures, whole idioms), which is what a memory is for.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from longmem.errors import DataError
from longmem.files import write_whole

STDLIB = "stdlib"
TEST = {STDLIB: ("email", "http", "logging", "xmlrpc"), "packages": ("click", "networkx", "rich", "jinja2")}
"""Held out to be measured on, and never trained on."""
VALID = {STDLIB: ("asyncio", "unittest"), "packages": ("accelerate",)}
"""Held out to be looked at while training."""
TRAIN = (
    *("torch", "transformers", "sympy", "numpy", "matplotlib", "huggingface_hub", "fontTools", "PIL", "mpmath"),
    *("pydantic", "fsspec", "packaging", "yaml", "httpx", "anyio", "regex", "tqdm", "markdown_it", "dateutil"),
)
"""Packages beside the standard library: those that an installation of this package brings along."""

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
LONGEST = 400_000
"""Characters of a document; a longer package becomes several, cut between files."""
MOST = 4_000_000
"""Characters of a package; of a larger one, documents spread evenly over it are taken."""
FILE_LINE = "# file: "


@dataclass(frozen=True)
class SourceSplit:
    """One JSON lines file that was written."""

    path: Path
    documents: int
    characters: int


def packages(library: Path) -> Iterator[tuple[str, str]]:
    """Every package of a folder by name: its files in the order of their paths, each behind a line that names it.

    A module outside any package is a package of one file.
    """
    for top in sorted(library.iterdir()):
        if top.name in LEFT_OUT or top.name.startswith((".", "_sysconfigdata")):
            continue
        text = package_text(top, library)
        if len(text) >= SHORTEST:
            yield top.name.removesuffix(".py"), text


def package_text(top: Path, library: Path) -> str:
    """One package, a folder or a module, of a folder of packages; empty where it has no source."""
    files = sorted(top.rglob("*.py")) if top.is_dir() else [top] if top.suffix == ".py" else []
    parts = []
    for file in files:
        path = file.relative_to(library)
        if LEFT_OUT.isdisjoint(path.parts):
            parts.append(f"{FILE_LINE}{path.as_posix()}\n{_text(file)}\n")
    return "".join(parts)


def file_at(text: str, position: int) -> str:
    """The file that a position of a package's text lies in."""
    start = text.rfind(FILE_LINE, 0, position + len(FILE_LINE))
    while start > 0 and text[start - 1] != "\n":
        start = text.rfind(FILE_LINE, 0, start)
    return text[start + len(FILE_LINE) : text.index("\n", start)] if start >= 0 else ""


def documents_of(name: str, text: str, longest: int = LONGEST, most: int = MOST) -> Iterator[tuple[str, str]]:
    """A package as documents: itself, or parts cut between files, ``name-00``, ``name-01``, ...

    Args:
        name: of the package.
        text: as ``package_text`` gives it.
        longest: characters of a part; a single longer file stays whole.
        most: characters in all; parts spread evenly over the package are taken.
    """
    files = [FILE_LINE + file for file in ("\n" + text).split("\n" + FILE_LINE)[1:]]
    parts = [""]
    for number, file in enumerate(files):
        file += "\n" if number < len(files) - 1 else ""
        if parts[-1] and len(parts[-1]) + len(file) > longest:
            parts.append("")
        parts[-1] += file
    if len(parts) == 1:
        yield name, text
        return
    wanted = min(len(parts), max(1, round(len(parts) * most / len(text))))
    for at in range(wanted):
        number = at * len(parts) // wanted
        yield f"{name}-{number:02d}", parts[number]


def write_source(
    folder: Path, *, stdlib: Path | None = None, site: Path | None = None, train: tuple[str, ...] = TRAIN
) -> dict[str, SourceSplit]:
    """Write ``train.jsonl``, ``valid.jsonl`` and ``test.jsonl``: one object a line, ``id`` and ``text``.

    Ids are ``stdlib__NAME`` and ``packages__NAME``, so that ``--group-by-prefix __`` reports the two apart.

    Args:
        folder: where to; made if it is not there.
        stdlib: folder of the standard library; None is this Python's.
        site: folder of installed packages; None is this Python's.
        train: packages of ``site`` to train on; those that are not installed are left out.

    Raises:
        DataError: a split has no source files.
    """
    paths = sysconfig.get_paths()
    library, installed = stdlib or Path(paths["stdlib"]), site or Path(paths["purelib"])
    split_of = dict.fromkeys(TEST[STDLIB], "test") | dict.fromkeys(VALID[STDLIB], "valid")
    found: dict[str, list[tuple[str, str]]] = {"train": [], "valid": [], "test": []}
    for name, text in packages(library):
        found[split_of.get(name, "train")] += documents_of(f"{STDLIB}__{name}", text)
    for split, names in (("train", train), ("valid", VALID["packages"]), ("test", TEST["packages"])):
        for name in names:
            text = package_text(installed / name, installed)
            if len(text) >= SHORTEST:
                found[split] += documents_of(f"packages__{name}", text)
    missing = [split for split, documents in found.items() if not documents]
    if missing:
        raise DataError(
            f"{library}, {installed}: no Python source files for {', '.join(missing)}; use a Python whose standard "
            "library is there as .py files"
        )
    return {split: _write_lines(folder / f"{split}.jsonl", dict(documents)) for split, documents in found.items()}


def _write_lines(path: Path, documents: Mapping[str, str]) -> SourceSplit:
    """Complete or absent."""
    rows = ({"id": name, "text": text} for name, text in documents.items())
    write_whole(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return SourceSplit(path, len(documents), sum(map(len, documents.values())))


def _text(file: Path) -> str:
    """A few test-like files of the library are deliberately not UTF-8; their odd bytes become the replacement sign."""
    return file.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
