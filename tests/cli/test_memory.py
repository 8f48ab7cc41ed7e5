"""``longmem memory``: every command on a real store, as a person would call it."""

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.calling import Command, names

from longmem import LongMem, MemoryStore


@pytest.mark.usefixtures("filled")
def test_list_and_show_say_what_is_known_of_documents_of_all_or_of_one(memory: Command) -> None:
    lines = memory("list").out.splitlines()
    assert lines[0].split() == ["namespace", "name", "tokens", "added", "expires", "metadata"]
    assert [line.split()[:2] for line in lines[1:]] == [
        ["ada", "inner/three.txt"], ["ada", "one.txt"], ["ada", "two.md"],
        ["bob", "inner/three.txt"], ["bob", "one.txt"],
    ]  # fmt: skip
    assert lines[4].endswith("kind=note, year=1843")
    shown = memory("show", "one.txt", "-n", "bob").out
    assert "kind=note, year=1843" in shown and "tokens" in shown
    assert names(memory("list", "-n", "ada", "--json")) == ["inner/three.txt", "one.txt", "two.md"]
    assert memory("list", "--where", "year=1843", "--where", "kind=other", "--json").json == {"documents": []}
    assert memory("list", "--older-than", "1d", "--json").json == {"documents": []}
    assert len(names(memory("list", "--before", "2999-01-01", "--json"))) == 5
    assert memory("list", "--namespaces").out.splitlines()[1].split()[:2] == ["ada", "3"]
    for condition in ("--where", "year=1843"), ("--older-than", "1d"), ("--before", "2999-01-01"):
        assert "--namespaces lists whole namespaces; leave out" in memory("list", "--namespaces", *condition).err


def test_token_ids_are_counted_and_read_with_a_tokenizer(memory: Command, models: Path, filled: Path) -> None:
    model: Any = LongMem.from_pretrained(models / "side" / "final")
    with MemoryStore.open(filled, model=model) as store:
        store.add_document("ada", ids=[70, 71, 72], name="ids")
    whole, bob = memory("stats", "--json").json, memory("stats", "-n", "bob", "--json").json
    assert (whole["documents"], bob["documents"], whole["layout"]["heads_kv"]) == (6, 2, 4)
    assert "open the store with tokenizer=" in memory("show", "ids", "-n", "ada", "--text").error
    assert len(memory("show", "ids", "-n", "ada", "--text", "--tokenizer", models / "backbone").out) == 3


@pytest.mark.usefixtures("filled")
def test_search_shows_chunks_and_stays_where_it_is_told(
    memory: Command, notes: Path, piped: Callable[[bytes], None]
) -> None:
    lines = memory("search", "finds the old map", "-n", "ada", "--top", 3).out.splitlines()
    assert lines[2].split() == ["share", "score", "document", "start_token", "time", "passage"]
    assert len(lines) == 6 and all("[[" in line for line in lines[3:])
    hits = memory("search", "finds the old map", "-n", "ada", "--top", 3, "--around", 4, "--json").json["hits"]
    assert [hit["share"] for hit in hits] == sorted((hit["share"] for hit in hits), reverse=True)
    for hit in hits:
        begin = hit["start_token"] - len(hit["before"])  # a token is a byte here
        around = hit["before"] + hit["text"] + hit["after"]
        assert (notes / hit["document"]).read_text()[begin : begin + len(around)] == around and len(hit["after"]) <= 4
    piped(b"the old map")
    hits = memory("search", "-", "-n", "ada", "--document", "two.md", "--top", 40, "--json").json["hits"]
    assert {hit["document"] for hit in hits} == {"two.md"}
    hits = memory("search", "old", "-n", "bob", "--where", "year=1843", "--json").json["hits"]
    assert hits and {hit["namespace"] for hit in hits} == {"bob"}
    assert memory("search", "old", "-n", "bob", "--after", "2999-01-01", "--json").json["hits"] == []
    assert "no document 'two.md'" in memory("search", "old", "-n", "bob", "--document", "two.md").error


def test_size_says_what_a_token_of_a_backbone_takes(memory: Command) -> None:
    shape = ("--heads-kv", 2, "--head-dim", 8, "--layers", 3, "--tokens", "1000,2M")
    half, small = memory("size", *shape, "--json").json["sizes"]
    assert (half["keys_values"], small["keys_values"], half["chunk_keys"], half["cache"]) == (64, 32, 16, 192)
    assert (half["1,000"], half["2,000,000"]) == (92_000, 184_000_000)  # 64 + 16 + 12
    assert memory("size", *shape).out.splitlines()[1].split()[:2] == ["float16", "64"]
    assert "'1e999' is not a list of counts; try" in memory("size", *shape, "--tokens", "1e999").err


def test_forget_and_compact_leave_no_byte_and_touch_no_other_namespace(
    memory: Command, filled: Path, notes: Path
) -> None:
    done = memory("forget", "-n", "ada", "--name", "two.md")
    assert done.out.splitlines()[-1].split() == ["two.md", str(len((notes / "two.md").read_text()))]
    assert "`longmem memory compact` removes the bytes" in done.err
    compacted = memory("compact", "--json").json
    assert compacted["tokens"] == len((notes / "two.md").read_text())
    assert compacted["bytes_after"] < compacted["bytes_before"]
    assert names(memory("list", "-n", "ada", "--json")) == ["inner/three.txt", "one.txt"]
    raw = b"".join(path.read_bytes() for path in filled.rglob("*") if path.is_file())
    assert (notes / "two.md").read_bytes()[40:90] not in raw
    done = memory("forget", "-n", "bob", "--where", "kind=note", "--json")
    assert names(done) == ["inner/three.txt", "one.txt"]
    memory("compact")
    assert memory("verify").out.splitlines()[-1].split() == ["clean", "True"]
    assert [each["namespace"] for each in memory("list", "--namespaces", "--json").json["namespaces"]] == ["ada"]
    assert memory("search", "old map", "-n", "ada", "--json").json["hits"]
    assert "forget needs to know what: a name, where" in memory("forget", "-n", "ada").error
    assert "no document 'nothing.txt'" in memory("forget", "-n", "ada", "--name", "nothing.txt").error
    done = memory("forget", "-n", "ada", "--older-than", "1d")
    assert done.status == 0 and "0 documents of 'ada' forgotten" in done.err


def test_verify_finds_a_flipped_byte_and_repair_mends_it(memory: Command, filled: Path) -> None:
    path = max(filled.glob("*.bin"), key=lambda each: each.stat().st_size)
    whole = path.read_bytes()
    path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    done = memory("verify")
    assert done.status == 1 and "kind" in done.out and path.name in done.out
    assert memory("verify", "--json").json["clean"] is False
    healed = memory("verify", "--repair", "--json")
    assert healed.status == 0 and healed.json["rebuilt_tokens"] > 0
    assert memory("verify", "--json").json["problems"] == []


@pytest.mark.usefixtures("filled")
def test_export_and_import_move_documents(memory: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "one.txt" in memory("export", "bob.tar", "-n", "bob", "--name", "one.txt").out
    assert names(memory("export", "ada.tar", "-n", "ada", "--json")) == ["inner/three.txt", "one.txt", "two.md"]
    monkeypatch.setenv("LONGMEM_STORE", "other")
    assert names(memory("import", "ada.tar", "--json")) == ["inner/three.txt", "one.txt", "two.md"]
    assert memory("import", "bob.tar", "-n", "carl").out.splitlines()[1].split()[0] == "added"
    assert memory("verify").status == 0
    Path("cut.tar").write_bytes(Path("ada.tar").read_bytes()[:3000])
    assert "cut.tar: no whole export" in memory("import", "cut.tar").error
    assert "no.tar: No such file" in memory("import", "no.tar").error
    assert "namespace 'eve' has no documents to export" in memory("export", "eve.tar", "-n", "eve").error


# what docs/operations.md says of backups


def test_a_backup_beside_a_writer_is_a_store(memory: Command, filled: Path) -> None:
    Path("copy").mkdir()
    with MemoryStore.open(filled) as store:
        store.forget("ada", name="one.txt")  # in the write-ahead log
        source, target = sqlite3.connect(filled / "catalog.sqlite"), sqlite3.connect("copy/catalog.sqlite")
        with target:
            source.backup(target)
        source.close()
        target.close()
        for path in filled.glob("*.bin"):
            shutil.copy(path, "copy")
    assert memory("verify", "--store", "copy", "--json").json["problems"] == []
    assert names(memory("list", "--store", "copy", "-n", "ada", "--json")) == ["inner/three.txt", "two.md"]
    assert memory("search", "the old map", "-n", "ada", "--store", "copy").status == 0
    assert memory("compact", "--store", "copy").status == 0


# what goes wrong is one line: the value, the rule, the way out


@pytest.mark.parametrize("verb", ["list", "forget --everything", "verify"])
@pytest.mark.usefixtures("model")
def test_a_store_that_is_not_there_is_named(memory: Command, verb: str) -> None:
    assert memory(*verb.split()).error.startswith(f"{Path.cwd()}/memory: no memory store here; check the path")
    assert not Path("memory").exists()


@pytest.mark.usefixtures("filled")
def test_an_unknown_namespace_is_named_with_those_there_are(memory: Command, notes: Path) -> None:
    for verb in ("list", "search x", "stats", "forget --everything"):
        assert memory(*verb.split(), "-n", "eve").error == (
            f"{Path.cwd()}/memory: no namespace 'eve'; there are: ada, bob"
        )
    assert "holds other files" in memory("add", notes, "--store", notes).error
    assert "one.txt: Not a directory" in memory("list", "--store", notes / "one.txt").error


@pytest.mark.usefixtures("notes")
def test_a_wrong_model_is_named(memory: Command, models: Path) -> None:
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
        assert "written by backbone" in line and "keys of one mean nothing to the other" in line
    assert "layers 3), this model is" in memory("search", "x", "--model", models / "low").error
    assert "try --device cpu" in memory("search", "x", "--model", models / "side", "--device", "cuda:99").error


def test_a_second_writer_is_told_who_writes(memory: Command, filled: Path) -> None:
    with MemoryStore.open(filled):
        for arguments in (["add", "notes"], ["compact"]):
            line = memory(*arguments).error
            assert f"process {os.getpid()} on " in line and "has been writing since" in line
        assert len(names(memory("list", "--json"))) == 5  # reading goes on beside it
        assert memory("verify").status == 0
