"""Real long text that every machine has: the source of Python packages, of the standard library first of all.

Source refers back to itself over long distances (names, signatures, whole idioms), which is what a memory is for.
``recipes/data/python.py`` makes texts to train and to measure with of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

STDLIB = "stdlib"
TEST = {STDLIB: ("email", "http", "logging", "xmlrpc"), "packages": ("click", "networkx", "rich", "jinja2")}
"""Held out to be measured on, and never trained on."""
# Tests and other people's packages differ from machine to machine; the rest are tables, not text that refers back.
LEFT_OUT = frozenset(
    "test tests idle_test site-packages dist-packages lib2to3 encodings pydoc_data __pycache__".split()
)
SHORTEST = 2_000
"""Packages of fewer characters are left out."""
FILE_LINE = "# file: "


def packages(library: Path) -> Iterator[tuple[str, str]]:
    """Name and text of every package of a folder; a module outside any package is a package of one file."""
    for top in sorted(library.iterdir()):
        if top.name in LEFT_OUT or top.name.startswith((".", "_sysconfigdata")):
            continue
        text = package_text(top, library)
        if len(text) >= SHORTEST:
            yield top.name.removesuffix(".py"), text


def package_text(top: Path, library: Path) -> str:
    """The text of a package or module: its files in the order of their paths, each after a line that names it."""
    files = sorted(top.rglob("*.py")) if top.is_dir() else [top] if top.suffix == ".py" else []
    parts = []
    for file in files:
        path = file.relative_to(library)
        if LEFT_OUT.isdisjoint(path.parts):
            # a few test-like files of the library are not UTF-8 on purpose
            text = file.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
            parts.append(f"{FILE_LINE}{path.as_posix()}\n{text}\n")
    return "".join(parts)
