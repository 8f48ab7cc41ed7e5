"""The paragraph "Imports point one way" of CONTRIBUTING.md, compared with the imports in the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "longmem"

# `get_text_config` asks for the cache view when transformers sizes a cache, long after both modules are imported.
LATE = {("config", "modeling")}
# The public names, the command `python -m longmem` and the hook for the Auto classes stand outside of the layers.
OUTSIDE = {"__init__", "__main__", "_auto"}


def layers() -> list[set[str]]:
    """The levels of the paragraph, lowest first."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    line = next(line for line in text.splitlines() if "<-" in line)
    return [set(re.findall(r"\w+", level)) for level in line.strip("`").split("<-")]


def imports(path: Path) -> Iterator[str]:
    """First component below ``longmem`` of everything that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            assert node.level == 0, f"{path}: relative import; write longmem.{base}"
            names = [f"{base}.{alias.name}" if base == "longmem" else base for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == "longmem" and rest:
                yield rest.split(".")[0]


def edges() -> Iterator[tuple[str, str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part in OUTSIDE:
            continue
        for target in imports(path):
            if target != part and (PACKAGE / target).exists() | (PACKAGE / f"{target}.py").exists():
                yield part, target, path


def test_every_part_of_the_package_has_a_place_in_the_paragraph() -> None:
    placed = set().union(*layers())
    parts = {
        path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))
    }
    assert parts - OUTSIDE <= placed


def test_imports_point_one_way() -> None:
    level = {part: number for number, parts in enumerate(layers()) for part in parts}
    wrong = {
        f"{path.relative_to(ROOT)}: {part} imports {target}"
        for part, target, path in edges()
        if target not in OUTSIDE and (part, target) not in LATE and level[part] < level[target]
    }
    assert not wrong


def test_modeling_and_memory_never_import_each_other() -> None:
    between = {(part, target) for part, target, _ in edges()}
    assert not between & {("modeling", "memory"), ("memory", "modeling")}


def test_no_two_parts_import_each_other() -> None:
    between = {(part, target) for part, target, _ in edges()} - LATE
    assert not {pair for pair in between if pair[::-1] in between}


@pytest.mark.parametrize("heavy", ["torch", "transformers", "matplotlib"])
def test_the_command_line_imports_heavy_packages_only_inside_functions(heavy: str) -> None:
    for path in (PACKAGE / "cli").rglob("*.py"):
        at_top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {name for node in at_top for name in _imported(node)}
        assert heavy not in {name.split(".")[0] for name in names}, path


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]


def test_help_is_given_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys\nfrom longmem.cli.main import cli\n"
        "cli.main(['--help'], standalone_mode=False)\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
