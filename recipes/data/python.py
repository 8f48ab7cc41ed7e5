"""Python source that this machine has, as train.jsonl, valid.jsonl and test.jsonl.

Usage: python recipes/data/python.py --out data/python

Of the standard library and of the packages that longmem depends on. A document is a package; long ones are cut between
files. Whole packages are held out: nothing of those in test.jsonl is in the others. Ids are ``stdlib__NAME`` and
``packages__NAME``, so that ``longmem eval perplexity --group-by-prefix __`` reports the two apart.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from longmem.data.text import FILE_LINE, HELD_OUT, SHORTEST, package_text, packages
from longmem.errors import DataError, LongMemError
from longmem.files import write_whole

STDLIB = dict.fromkeys(HELD_OUT, "test") | dict.fromkeys(("asyncio", "unittest"), "valid")
"""Packages of the standard library that are not trained on."""
VALID, TEST = ("accelerate",), ("click", "networkx", "rich", "jinja2")
"""Other packages that are not trained on."""
TRAIN = (
    "torch transformers sympy numpy matplotlib huggingface_hub fontTools PIL mpmath "
    "pydantic fsspec packaging yaml httpx anyio regex tqdm markdown_it dateutil"
).split()
"""Packages beside the standard library: those that an installation of longmem brings along."""
LONGEST = 400_000
"""Characters of a document; a longer package becomes several."""
MOST = 4_000_000
"""Characters of a package; of a larger one, documents spread evenly over it are taken."""


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


def write_source(folder: Path, stdlib: Path | None = None, site: Path | None = None) -> dict[str, dict[str, str]]:
    """Write the three files, and return what is in each: name and text of every document.

    Args:
        folder: where to; made if it is not there.
        stdlib: folder of the standard library; None is this Python's.
        site: folder of installed packages; None is this Python's. Those of ``TRAIN`` that are not there are left out.

    Raises:
        DataError: one of the three would be empty.
    """
    paths = sysconfig.get_paths()
    library, installed = stdlib or Path(paths["stdlib"]), site or Path(paths["purelib"])
    found: dict[str, dict[str, str]] = {"train": {}, "valid": {}, "test": {}}
    for name, text in packages(library):
        found[STDLIB.get(name, "train")].update(documents_of(f"stdlib__{name}", text))
    for split, names in (("train", TRAIN), ("valid", VALID), ("test", TEST)):
        for name in names:
            text = package_text(installed / name, installed)
            if len(text) >= SHORTEST:
                found[split].update(documents_of(f"packages__{name}", text))
    if missing := [split for split, documents in found.items() if not documents]:
        raise DataError(
            f"{library}, {installed}: no Python source files for {', '.join(missing)}; use a Python whose standard "
            "library is there as .py files"
        )
    for split, documents in found.items():
        rows = ({"id": name, "text": text} for name, text in documents.items())
        write_whole(folder / f"{split}.jsonl", (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Folder for the three files.")
    out = parser.parse_args().out
    try:
        written = write_source(out)
    except LongMemError as error:
        sys.exit(f"error: {error}")
    for split, documents in written.items():
        characters = sum(map(len, documents.values())) / 1e6
        print(f"{out / split}.jsonl: {len(documents)} documents, {characters:.1f} million characters")


if __name__ == "__main__":
    main()
