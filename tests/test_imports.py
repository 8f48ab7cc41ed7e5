"""Files import one another in one direction, and the paragraph of CONTRIBUTING.md says which."""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
FILES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((SOURCE / "longmem").rglob("*.py"))
}
# The public names, and the command `python -m longmem`, stand outside of the levels.
OUTSIDE = {"longmem", "longmem.__main__"}
MOST_LINES = 450


@cache
def imported(name: str) -> frozenset[str]:
    """The files of ours that a file imports, inside functions and for type checkers too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(), filename=str(FILES[name]))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{FILES[name]}: relative import; write longmem.{node.module}"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in FILES else str(node.module))
    return frozenset(found & FILES.keys() - OUTSIDE - {name})


def test_no_file_imports_itself_by_way_of_others_not_even_late() -> None:
    try:
        TopologicalSorter({name: imported(name) for name in FILES}).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_imports_point_one_way_and_modeling_and_memory_never_import_each_other() -> None:
    line = next(line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if "<-" in line)
    level = {name: at for at, each in enumerate(line.strip("`").split("<-")) for name in re.findall(r"\w+", each)}
    pairs = [(name, other) for name in FILES.keys() - OUTSIDE for other in imported(name)]
    between = {(name.split(".")[1], other.split(".")[1]): f"{name} imports {other}" for name, other in pairs}
    assert not [said for (part, other), said in between.items() if level[part] < level[other]]
    assert not between.keys() & {("modeling", "memory"), ("memory", "modeling")}


def test_no_file_is_too_long_to_be_read_at_once() -> None:
    long = {name: count for name, path in FILES.items() if (count := len(path.read_text().splitlines())) > MOST_LINES}
    assert not long
    assert len(FILES) < 80


def test_help_of_every_command_is_given_before_anything_heavy_is_imported_and_warns_of_nothing() -> None:
    code = (
        "import sys\nfrom longmem.__main__ import COMMANDS, cli\n"
        "for command in ([], *([name] for name in COMMANDS)):\n"
        "    cli.main([*command, '--help'], standalone_mode=False)\n"
        "print({'torch', 'transformers', 'numpy', 'matplotlib', 'fastapi'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.splitlines()[-1], done.stderr) == ("set()", "")
