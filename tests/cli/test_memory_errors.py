"""What goes wrong with ``longmem memory`` is one line: the value, the rule, the way out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.calling import Memory, names

from longmem.store.store import MemoryStore


@pytest.mark.parametrize(
    "arguments",
    [["list"], ["show", "x"], ["search", "x"], ["stats"], ["forget", "--everything"], ["compact"], ["verify"],
     ["export", "x.tar"]],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
@pytest.mark.usefixtures("model")
def test_a_store_that_is_not_there_is_named(memory: Memory, arguments: list[str]) -> None:
    assert memory(*arguments).error.startswith(f"{Path.cwd()}/memory: no memory store here; check the path")
    assert not Path("memory").exists()


@pytest.mark.parametrize(
    "arguments", [["list"], ["show", "one.txt"], ["search", "x"], ["stats"], ["forget", "--everything"]]
)
@pytest.mark.usefixtures("filled")
def test_an_unknown_namespace_is_named_with_those_there_are(memory: Memory, arguments: list[str]) -> None:
    assert memory(*arguments, "-n", "eve").error == (f"{Path.cwd()}/memory: no namespace 'eve'; there are: ada, bob")


@pytest.mark.usefixtures("notes", "model")
def test_text_that_cannot_be_added_is_named(memory: Memory, piped: Callable[[bytes], None]) -> None:
    assert memory("add", "nothing.txt").error.endswith("nothing.txt: no such file or folder (looked from "
                                                       f"{Path.cwd()}); check the path")  # fmt: skip
    Path("blank.txt").write_text(" \n")
    assert "blank.txt: no text, the file is empty" in memory("add", "blank.txt").error
    Path("latin.txt").write_bytes(b"caf\xe9")
    assert "pass --undecodable skip or replace" in memory("add", "latin.txt").error
    assert memory("add", "latin.txt", "--undecodable", "replace").status == 0
    Path("broken.jsonl").write_text('{"text": "good"}\n{"text": \n')
    done = memory("add", "broken.jsonl")
    assert "broken.jsonl:2: not JSON" in done.error
    Path("other.jsonl").write_text('{"body": "good"}\n')
    assert "name it with --field" in memory("add", "other.jsonl").error
    Path("odd.jsonl").write_text('{"text": "good", "time": "yesterday"}\n')
    assert "odd.jsonl:1: metadata must be an object, time and expires dates" in memory("add", "odd.jsonl").error
    assert "no document matches *.none; there are inner" in memory("add", "notes", "--include", "*.none").error
    assert "needs a --name (or --jsonl" in memory("add", "-").error
    piped(b"")
    assert memory("add", "-", "--name", "x").error.startswith("x: no text came")
    assert memory("search", " ").error == "the text to search for is empty; say something"
    odd = b"caf\xe9".decode(errors="surrogateescape")
    assert memory("search", odd).error == "the text to search for is not UTF-8 text (byte 0xe9 at offset 3); convert it"
    assert "--metadata ('a=caf\\udce9') is not UTF-8" in memory("add", "notes", "--metadata", f"a={odd}").error
    for option in (["--name", odd], ["-n", odd], ["--source", odd]):
        assert memory("add", "notes/two.md", *option).error


@pytest.mark.usefixtures("notes")
def test_a_wrong_model_is_named(memory: Memory, models: Path) -> None:
    assert memory("add", "notes").error == (
        "a new store needs the model whose memory it is to hold; name it with --model"
    )
    assert "no such folder; name a checkpoint folder" in memory("add", "notes", "--model", "./none").error
    assert not Path("memory").exists()
    line = memory("add", "notes", "--model", models / "backbone", "--backbone", models / "other").error
    assert line.endswith("backbone is a causal language model by itself")
    assert memory("add", "notes", "--model", models / "side", "--backbone", models / "backbone").status == 0
    for other in ("other", "low"):
        line = memory("add", "notes", "--model", models / other).error
        assert "written by backbone" in line
        assert "keys of one mean nothing to the other" in line
    line = memory("search", "x", "--model", models / "low").error
    assert "layer 3), this model is" in line
    assert "try --device cpu" in memory("search", "x", "--model", models / "side", "--device", "cuda:99").error


def test_a_second_writer_is_told_who_writes(memory: Memory, filled: Path) -> None:
    with MemoryStore.open(filled):
        for arguments in (["add", "notes"], ["forget", "-n", "ada", "--everything"], ["compact"], ["import", "x.tar"]):
            line = memory(*arguments).error
            assert f"process {os.getpid()} on " in line
            assert "has been writing since" in line
        assert len(names(memory("list", "--json"))) == 5  # reading goes on beside it
        assert memory("verify").status == 0


@pytest.mark.usefixtures("filled")
def test_other_folders_are_refused(memory: Memory, notes: Path) -> None:
    assert "holds other files" in memory("add", notes, "--store", notes).error
    assert "a file, not a store's folder" in memory("list", "--store", notes / "one.txt").error


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["--expires", "soon"], "'soon' is no when; try 30d, 12h or 2026-01-31"),
        (["--time", "30d"], "'30d' is no date; try 2026-01-31"),
        (["--metadata", "author"], "'author' is neither KEY=VALUE nor a JSON object"),
        (["--metadata", "{author"], "is not JSON"),
    ],
)
@pytest.mark.usefixtures("notes")
def test_values_that_mean_nothing_are_refused_with_an_example(memory: Memory, option: list[str], expected: str) -> None:
    done = memory("add", "notes", *option)
    assert (done.status, done.out) == (2, "")
    assert expected in " ".join(done.err.split())
