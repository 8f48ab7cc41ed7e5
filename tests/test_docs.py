"""The documentation runs: its Python is executed, its commands are parsed or run, its files exist."""

import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from tests.calling import Command

from longmem.__main__ import COMMANDS, cli

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
GENERATED = ("recipe.md",)
WRITTEN = [page for page in PAGES if page.name not in GENERATED]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"))


EXAMPLES = [(page, block) for page in WRITTEN for block in blocks(page, "python")]
SHELL = [line for page in WRITTEN for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]
LONGMEM = [shlex.split(line, comments=True)[1:] for line in SHELL if line.startswith("longmem ")]


def demo_commands() -> Iterator[list[list[str]]]:
    """Of every block, the lines that need the demo's texts or the shipped pair, and nothing else.

    Those on a store build on each other; of the others, what differs in ``--out`` alone is there once.
    """
    known = set[str]()
    for block in (block for page in WRITTEN for block in blocks(page, "bash")):
        wanted = []
        for line in (line for line in block.splitlines() if line.startswith("longmem ")):
            elsewhere = any(each in line for each in ("../shared", "data/", "models/small/needle", "squad/"))
            if line.startswith("longmem memory ") and "runs/demo" in block:
                wanted.append(line)
            elif "runs/demo" in line or ("models/small" in line and not elsewhere):
                plain = re.sub(r" --out \S+", "", line)
                wanted += [] if plain in known else [line]
                known.add(plain)
        if wanted:
            yield [shlex.split(line, comments=True)[1:] for line in wanted]


@pytest.fixture
def at_the_demo(demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work where ``models/small`` is a pair, a tiny one, and ``runs/demo/text`` what ``make demo`` would have left."""
    monkeypatch.chdir(demo_folder)


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"{page.name}-{i}" for i, (page, _) in enumerate(EXAMPLES)])
@pytest.mark.usefixtures("at_the_demo")
def test_python_examples_run(example: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    page, code = example
    exec(compile(code, str(page), "exec"), {"__name__": "example"})
    assert capsys.readouterr().out


def commands(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    """All commands that do something, by what is typed for them."""
    if not isinstance(command, click.Group):
        yield name, command
        return
    for each, below in command.commands.items():
        yield from commands(f"{name} {each}".strip(), below)


HELP = dict(commands("", cli))


def parse(arguments: list[str]) -> None:
    """Let click read the arguments of a command without running it."""
    words = next(words for words in (1, 2) if " ".join(arguments[:words]) in HELP)
    name = " ".join(arguments[:words])
    HELP[name].make_context(name, arguments[words:], parent=click.Context(cli, info_name="longmem"))


@pytest.mark.parametrize("arguments", LONGMEM, ids=" ".join)
def test_commands_of_the_documentation_are_understood(arguments: list[str]) -> None:
    parse(arguments)


@pytest.mark.parametrize("name", HELP)
def test_the_help_of_every_command_has_examples_that_are_understood(name: str) -> None:
    command = HELP[name]
    said = f"{command.help}\n{command.epilog or ''}"
    examples = re.findall(rf"(?m)^ *(?:Example: (?:.*\| )?)?longmem ({name} .+)$", said)
    assert examples, f"{name} --help has no example"
    for example in examples:
        parse(shlex.split(example.partition(" > ")[0], comments=True))
    assert command.get_short_help_str()


@pytest.mark.parametrize(
    "block", list(demo_commands()), ids=lambda block: " · ".join(" ".join(line[:2]) for line in block)
)
@pytest.mark.usefixtures("at_the_demo")
def test_commands_on_the_demo_run(block: list[list[str]], command: Command) -> None:
    for arguments in block:
        done = command(*arguments)
        assert done.status == 0 and done.out, (arguments, done.err)


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "examples").glob("*.py"))], ids=lambda page: page.name)
def test_recipes_examples_make_targets_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"(?<![\w/])(?:recipes/[\w-]+\.toml|examples/[\w-]+\.\w+)", text):
        assert (ROOT / name).exists(), name
    targets = re.findall(r"(?m)^([a-z-]+):.*##", (ROOT / "Makefile").read_text())
    for target in re.findall(r"(?m)(?:`|^)make (?:PYTHON=\S+ )?([a-z-]+)", text):
        assert target in targets, target
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link


def test_a_card_says_that_its_model_reads_by_age() -> None:
    for config in sorted((ROOT / "models").rglob("config.json")):
        recency = json.loads(config.read_text(encoding="utf-8")).get("recency", 0)
        card = next(folder / "README.md" for folder in config.parents if (folder / "README.md").exists())
        assert not recency or f"`recency` {recency:g}" in card.read_text(encoding="utf-8"), card


def test_the_readme_shows_the_tree_and_links_every_page_and_the_quickstart_has_every_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = next(block for block in re.findall(r"(?s)```\n(src/longmem/.*?)```", readme))
    for name in re.findall(r"(?m)^  (\w+)/", tree):
        assert (ROOT / "src" / "longmem" / name).is_dir(), name
    for name in re.findall(r"(?m)(?:^|  )(\w+)/  ", tree):
        assert (ROOT / name).is_dir() or (ROOT / "src" / "longmem" / name).is_dir(), name
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in readme, page.name
    quickstart = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    for command in COMMANDS:
        assert f"`longmem {command}" in quickstart and command in tree, command


def test_pages_are_what_source_and_results_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    assert not list(importlib.import_module("make_pages").stale()), "run make docs"


def test_shares_and_gains_stand_only_in_tables_made_from_results() -> None:
    for page in (ROOT / "README.md", ROOT / "models" / "small" / "README.md"):
        text = page.read_text(encoding="utf-8")
        text = re.sub(r"(?ms)^<!-- (results|gains): .*?^<!-- /\1 -->$|^```.*?^```$", "", text)
        shares = re.findall(r"[\d.,]+ ?%|\b\d+\.\d+ (?:times|x)\b", text)
        assert not shares, f"{page}: say it in a table of results, or not at all"
