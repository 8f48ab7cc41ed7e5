"""``longmem memory``: every command on a real store, as a person would call it."""

import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.calling import Command, names

from longmem import MemoryStore
from longmem.cli import common

# adding: every kind of source, whole or not at all, and on where it stopped


def test_a_folder_is_added_once_and_a_text_replaced_where_this_is_said(
    memory: Command, notes: Path, models: Path
) -> None:
    needed = "a new store needs the model whose memory it is to hold; name it with --model"
    assert memory("add", notes).error == needed and not Path("memory").exists()
    done = memory("add", notes, "--model", models / "backbone", "--dtype", "int8")
    assert (done.status, done.out.count("added ")) == (0, 3)
    assert "3 documents (3 added): " in done.err  # from now on the store names its model
    layout = memory("stats", "--json").json["layout"]
    assert (layout["dtype"], layout["backbone"]) == ("int8", str(models / "backbone"))
    again = memory("add", notes, "--json")
    assert [each["status"] for each in again.json["documents"]] == ["unchanged"] * 3
    assert again.json["complete"] is True
    assert names(memory("list", "-n", "default", "--json")) == ["inner/three.txt", "one.txt", "two.md"]
    (notes / "one.txt").write_text("something else")
    assert "or replace it (replace=True, `--replace`)" in memory("add", notes / "one.txt").error
    assert memory("add", notes / "one.txt", "--replace", "--json").json["documents"][0]["status"] == "replaced"
    assert memory("show", "one.txt", "--text").out == "something else"
    assert memory("show", "one.txt", "--text", "--json").json["text"] == "something else"
    (notes / "main.js").write_text("one")
    assert names(memory("add", notes, "--suffix", "js", "--json")) == ["main.js"]


@pytest.mark.usefixtures("model")
def test_files_json_lines_and_standard_input_are_remembered_until_they_expire(
    memory: Command, notes: Path, piped: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("chat.jsonl").write_text(
        '{"text": "said first", "id": "a", "metadata": {"who": "Ada"}, "time": "2001-02-03", "mood": "good"}\n'
        '{"text": "said later", "expires": 4102444800, "source": "the phone"}\n'
    )
    piped(b"through the pipe\r\n")
    assert memory("add", "-", "--name", "p", "--expires", "12h").status == 0
    assert memory("add", notes / "two.md", "chat.jsonl", "--keep", "mood", "--prefix", "in/").status == 0
    found = {each["name"]: each for each in memory("list", "--json").json["documents"]}
    assert set(found) == {"p", "in/two.md", "in/a", "in/chat.jsonl:2"}
    assert found["in/a"]["metadata"] == {"who": "Ada", "mood": "good"}
    assert found["in/a"]["added"] == time.mktime((2001, 2, 3, 0, 0, 0, 0, 0, -1))
    assert [found["in/chat.jsonl:2"][key] for key in ("expires", "source")] == [4102444800, "the phone"]
    assert memory("show", "p", "--text").out == "through the pipe\n"
    assert found["p"]["expires"] == pytest.approx(time.time() + 12 * 3600, abs=60)
    piped(b'{"body": "one", "id": "x"}\n{"body": "two"}\n')
    assert memory("add", "-", "--jsonl", "--field", "body", "--metadata", '{"n": [1]}', "--metadata", "k=v").status == 0
    assert names(memory("list", "--where", "k=v", "--where", "n=[1]", "--json")) == ["x", "-:2"]
    tomorrow = time.time() + 86400
    monkeypatch.setattr(time, "time", lambda: tomorrow)
    assert len(names(memory("list", "--json"))) == 5
    assert memory("stats", "--json").json["expired"] == memory("compact", "--json").json["documents"] == 1


@pytest.mark.usefixtures("model")
def test_an_interrupted_add_goes_on_where_it_stopped(
    memory: Command, made_text: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("short.txt").write_text("short")
    Path("long.txt").write_text(made_text(400))

    def tell(self: object, progress: Any) -> None:
        if progress.name == "long.txt" and progress.done > 1000:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common.ShownProgress, "__call__", tell)
        done = memory("add", "short.txt", "long.txt", "--json")
    assert done.status == 130
    assert done.json["complete"] is False and names(done) == ["short.txt"]
    assert "1 document stored whole before this; the same command again goes on from there" in done.err
    assert memory("stats", "--json").json["dead_tokens"] > 0  # what the next call finds
    done = memory("add", "short.txt", "long.txt", "--json")
    assert [each["status"] for each in done.json["documents"]] == ["unchanged", "added"]
    assert memory("stats", "--json").json["dead_tokens"] == 0


NO_DATES = "metadata must be an object, time and expires dates"
FAULTS = {  # tests/data has what is wrong with texts; here is what a memory cannot take
    '{"id": "d", "text": "good", "metadata": "none"}': NO_DATES,
    '{"id": "g", "text": "good", "time": NaN}': NO_DATES,
    '{"id": "two\\nlines", "text": "good"}': "",
}


@pytest.mark.usefixtures("model")
def test_bad_lines_are_named_or_skipped_and_the_others_added(memory: Command, caplog: pytest.LogCaptureFixture) -> None:
    Path("bad.jsonl").write_text("\n".join(FAULTS))
    line = memory("add", "bad.jsonl").error
    assert line.startswith(f"{Path.cwd()}/bad.jsonl:1: {NO_DATES}") and line.endswith("or pass --undecodable skip")
    done = memory("add", "bad.jsonl", "--undecodable", "skip")
    assert done.error == "no text was left to add; see --exclude and --undecodable"
    for number, (fault, record) in enumerate(zip(FAULTS.values(), caplog.records, strict=True), 1):
        assert record.getMessage().startswith(f"{Path.cwd()}/bad.jsonl:{number}: {fault}")
        assert record.getMessage().endswith("; skipped")
    Path("some.jsonl").write_text("\n".join(['{"id": "a", "text": "one"}', *FAULTS, '{"id": null, "text": "last"}']))
    assert names(memory("add", "some.jsonl", "--undecodable", "skip", "--json")) == ["a", "some.jsonl:5"]


# looking


@pytest.mark.usefixtures("filled")
def test_list_stats_and_show_say_what_is_known_of_documents_of_all_or_of_one(memory: Command) -> None:
    lines = memory("list").out.splitlines()
    assert lines[0].split() == ["namespace", "name", "tokens", "added", "expires", "metadata"]
    assert [line.split()[:2] for line in lines[1:]] == [
        ["ada", "inner/three.txt"], ["ada", "one.txt"], ["ada", "two.md"],
        ["bob", "inner/three.txt"], ["bob", "one.txt"],
    ]  # fmt: skip
    assert lines[4].endswith("kind=note, year=1843")
    assert memory("list", "--where", "year=1843", "--where", "kind=other", "--json").json == {"documents": []}
    assert len(names(memory("list", "--before", "2999-01-01", "--json"))) == 5
    assert memory("list", "--before", "2999-01-01", "--older-than", "1d", "--json").json == {"documents": []}
    assert memory("list", "--namespaces").out.splitlines()[1].split()[:2] == ["ada", "3"]
    whole, bob = memory("stats", "--json").json, memory("stats", "-n", "bob", "--json").json
    assert (whole["documents"], bob["documents"], whole["layout"]["heads_kv"]) == (5, 2, 4)
    assert "heads_kv        4" in memory("stats").out.splitlines()
    assert "metadata        kind=note, year=1843" in memory("show", "one.txt", "-n", "bob").out.splitlines()


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
    for condition, found in {("--where", "year=1843"): {"bob"}, ("--after", "2999-01-01"): set()}.items():
        hits = memory("search", "old", "-n", "bob", *condition, "--json").json["hits"]
        assert {hit["namespace"] for hit in hits} == found


def test_size_says_what_a_token_of_a_backbone_takes(memory: Command) -> None:
    shape = ("--heads-kv", 2, "--head-dim", 8, "--layers", 3, "--tokens", "1000,2M")
    half, small = memory("size", *shape, "--json").json["sizes"]
    assert (half["keys_values"], small["keys_values"], half["chunk_keys"], half["cache"]) == (64, 32, 16, 192)
    assert (half["1,000"], half["2,000,000"]) == (92_000, 184_000_000)  # 64 + 16 + 12
    assert memory("size", *shape).out.splitlines()[1].split()[:2] == ["float16", "64"]


# forgetting and keeping


def test_forget_and_compact_leave_no_byte_and_touch_no_other_namespace(
    memory: Command, filled: Path, notes: Path
) -> None:
    done = memory("forget", "-n", "ada", "--name", "two.md")
    assert done.out.splitlines()[-1].split() == ["two.md", str(len((notes / "two.md").read_text()))]
    assert "`longmem memory compact` removes the bytes" in done.err
    assert memory("compact", "--json").json["tokens"] == len((notes / "two.md").read_text())
    assert names(memory("list", "-n", "ada", "--json")) == ["inner/three.txt", "one.txt"]
    raw = b"".join(path.read_bytes() for path in filled.rglob("*") if path.is_file())
    assert (notes / "two.md").read_bytes()[40:90] not in raw
    assert names(memory("forget", "-n", "bob", "--where", "kind=note", "--json")) == ["inner/three.txt", "one.txt"]
    assert memory("verify").out.splitlines()[-1].split() == ["clean", "True"]
    assert [each["namespace"] for each in memory("list", "--namespaces", "--json").json["namespaces"]] == ["ada"]
    assert "0 documents of 'ada' forgotten" in memory("forget", "-n", "ada", "--older-than", "1d").err


def test_verify_finds_a_flipped_byte_and_repair_mends_it(memory: Command, filled: Path) -> None:
    path = max(filled.glob("*.bin"), key=lambda each: each.stat().st_size)
    whole = path.read_bytes()
    path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    done = memory("verify")
    assert done.status == 1 and "kind" in done.out and path.name in done.out
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


def test_a_backup_beside_a_writer_is_a_store_and_a_second_writer_is_told_who_writes(
    memory: Command, filled: Path
) -> None:
    Path("copy").mkdir()
    with MemoryStore.open(filled) as store:
        for arguments in (["add", "notes"], ["compact"]):
            line = memory(*arguments).error
            assert f"process {os.getpid()} on " in line and "has been writing since" in line
        assert memory("verify").status == 0  # reading goes on beside it
        # what docs/operations.md says of backups
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
    assert memory("compact", "--store", "copy").status == 0
