"""``longmem memory``: every command on a real store, as a person would call it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.calling import Memory, names

from longmem.store.store import MemoryStore

# -- looking ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("filled")
def test_list_shows_documents_of_all_or_of_one(memory: Memory) -> None:
    lines = memory("list").out.splitlines()
    assert lines[0].split() == ["namespace", "name", "tokens", "added", "expires", "metadata"]
    assert [line.split()[:2] for line in lines[1:]] == [
        ["ada", "inner/three.txt"], ["ada", "one.txt"], ["ada", "two.md"],
        ["bob", "inner/three.txt"], ["bob", "one.txt"],
    ]  # fmt: skip
    assert lines[4].endswith("kind=note, year=1843")
    assert names(memory("list", "-n", "ada", "--json")) == ["inner/three.txt", "one.txt", "two.md"]
    assert memory("list", "--where", "year=1843", "--where", "kind=other", "--json").json == {"documents": []}
    assert memory("list", "--older-than", "1d", "--json").json == {"documents": []}
    assert len(names(memory("list", "--before", "2999-01-01", "--json"))) == 5
    counts = memory("list", "--namespaces", "--json").json["namespaces"]
    assert {name: each["documents"] for name, each in counts.items()} == {"ada": 3, "bob": 2}
    assert memory("list", "--namespaces").out.splitlines()[1].split()[:2] == ["ada", "3"]


@pytest.mark.usefixtures("filled")
def test_show_says_what_is_known_and_gives_the_text_back(memory: Memory, notes: Path) -> None:
    shown = memory("show", "one.txt", "-n", "bob").out
    assert "kind" in shown
    assert "tokens" in shown
    text = (notes / "one.txt").read_text()
    assert memory("show", "one.txt", "-n", "bob", "--text").out == text
    found = memory("show", "one.txt", "-n", "bob", "--text", "--json").json
    assert (found["text"], found["metadata"]) == (text, {"kind": "note", "year": 1843})


def test_token_ids_are_read_with_a_tokenizer(memory: Memory, models: Path, filled: Path) -> None:
    from longmem import LongMem

    model: Any = LongMem.from_pretrained(models / "side" / "final")
    with MemoryStore.open(filled, model=model) as store:
        store.add_document("ada", ids=[70, 71, 72], name="ids")
    assert "open the store with tokenizer=" in memory("show", "ids", "-n", "ada", "--text").error
    assert len(memory("show", "ids", "-n", "ada", "--text", "--tokenizer", models / "backbone").out) == 3


@pytest.mark.usefixtures("filled")
def test_stats_of_the_store_and_of_a_namespace(memory: Memory) -> None:
    whole, bob = memory("stats", "--json").json, memory("stats", "-n", "bob", "--json").json
    assert (whole["namespaces"], whole["documents"]) == (2, 5)
    assert (bob["documents"], bob["file_bytes"]) == (2, None)
    assert whole["stored_bytes"] > whole["file_bytes"]  # what both have is there once
    lines = memory("stats").out.splitlines()
    assert lines[0].split() == ["namespaces", "2"]
    assert "4 heads of 8, float16, chunks of 4, segments of 32 tokens" in lines[-1]


@pytest.mark.usefixtures("filled")
def test_search_shows_chunks_with_share_score_place_text_and_heads(memory: Memory, notes: Path) -> None:
    done = memory("search", "finds the old map", "-n", "ada", "--top", 3)
    assert done.status == 0
    lines = done.out.splitlines()
    assert len(lines) == 6
    for words in ("share ", "score ", ", token ", "heads "):
        assert words in lines[0]
    assert "[[" in lines[1]
    hits = memory("search", "finds the old map", "-n", "ada", "--top", 3, "--around", 4, "--json").json["hits"]
    assert [hit["share"] for hit in hits] == sorted((hit["share"] for hit in hits), reverse=True)
    for hit in hits:
        text = (notes / hit["document"]).read_text()
        begin = hit["start_token"]  # a token is a byte here
        assert text[begin : begin + hit["length"]] == hit["text"]
        assert text[:begin].endswith(hit["before"])
        assert text[begin + hit["length"] :].startswith(hit["after"])
        assert len(hit["after"]) <= 4
        assert sum(hit["heads"].values()) / 4 == pytest.approx(hit["share"], abs=1e-5)


@pytest.mark.usefixtures("filled")
def test_search_stays_where_it_is_told(memory: Memory, piped: Callable[[bytes], None]) -> None:
    piped(b"the old map")
    hits = memory("search", "-", "-n", "ada", "--document", "two.md", "--top", 40, "--json").json["hits"]
    assert {hit["document"] for hit in hits} == {"two.md"}
    hits = memory("search", "old", "-n", "bob", "--where", "year=1843", "--max-tokens", 8, "--json").json["hits"]
    assert 0 < len(hits) <= 2
    assert memory("search", "old", "-n", "bob", "--after", "2999-01-01", "--json").json["hits"] == []
    assert "no document 'two.md'" in memory("search", "old", "-n", "bob", "--document", "two.md").error


def test_size_prints_the_table_or_a_backbone_of_ones_own(memory: Memory) -> None:
    assert "GPT-2* of the paper (407M)" in memory("size").out
    done = memory("size", "--heads-kv", 2, "--head-dim", 8, "--layers", 3, "--tokens", "1000,2M", "--json")
    half, small = done.json["sizes"]
    assert (half["keys_values"], small["keys_values"], half["chunk_keys"], half["cache"]) == (64, 32, 16, 192)
    assert half["disk_bytes"] == {"1000": 92_000, "2000000": 184_000_000}  # 64 + 16 + 12
    assert memory("size", "--heads-kv", 2).error.startswith("--heads-kv and --head-dim go together")


# -- forgetting ------------------------------------------------------------------------------------------------------


def test_forget_and_compact_leave_no_byte(memory: Memory, filled: Path, notes: Path) -> None:
    done = memory("forget", "-n", "ada", "--name", "two.md")
    assert done.out.split() == ["forgotten", str(len((notes / "two.md").read_text())), "tokens", "two.md"]
    assert "`longmem memory compact` removes the bytes" in done.err
    assert memory("compact").out.startswith(f"{len((notes / 'two.md').read_text())} tokens removed")
    assert names(memory("list", "-n", "ada", "--json")) == ["inner/three.txt", "one.txt"]
    raw = b"".join(path.read_bytes() for path in filled.rglob("*") if path.is_file())
    assert (notes / "two.md").read_bytes()[40:90] not in raw
    assert memory("verify").out.endswith("all is as it was written\n")


@pytest.mark.usefixtures("filled")
def test_forgetting_in_one_namespace_leaves_the_others(memory: Memory) -> None:
    done = memory("forget", "-n", "bob", "--where", "kind=note", "--json")
    assert [name for name, _ in done.json["documents"]] == ["inner/three.txt", "one.txt"]
    memory("compact")
    assert memory("verify").status == 0
    assert memory("list", "--namespaces", "--json").json["namespaces"].keys() == {"ada"}
    assert memory("search", "old map", "-n", "ada", "--json").json["hits"]


@pytest.mark.usefixtures("filled")
def test_forget_needs_a_condition(memory: Memory) -> None:
    assert memory("forget", "-n", "ada").error == (
        "say what to forget: --name, --where, --older-than, --before, or --everything; nothing was forgotten"
    )
    assert "no document 'nothing.txt' to forget" in memory("forget", "-n", "ada", "--name", "nothing.txt").error
    done = memory("forget", "-n", "ada", "--older-than", "1d")
    assert (done.status, done.out) == (0, "")
    assert "0 documents of 'ada' forgotten" in done.err
    assert len(names(memory("list", "--json"))) == 5


# -- keeping ---------------------------------------------------------------------------------------------------------


def test_verify_finds_a_flipped_byte_and_repair_mends_it(
    memory: Memory, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = max(filled.glob("*.bin"), key=lambda each: each.stat().st_size)
    whole = path.read_bytes()
    path.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    done = memory("verify")
    assert done.status == 1
    assert "1 of 1 problem left" in done.out
    assert memory("verify", "--json").json["clean"] is False
    with monkeypatch.context() as patch:
        patch.setenv("LONGMEM_MODEL", "./no/such/folder")
        assert "no such folder" in memory("verify", "--repair").error
    healed = memory("verify", "--repair")
    assert healed.status == 0, healed
    assert "tokens encoded again, with the same bits as before" in healed.out
    assert memory("verify", "--json").json["problems"] == []


def test_export_and_import_move_documents_with_their_keys_and_values(
    memory: Memory, filled: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = memory("export", "bob.tar", "-n", "bob", "--name", "one.txt")
    assert done.out.startswith("bob.tar: 1 document, ")
    assert names(memory("export", "ada.tar", "-n", "ada", "--json")) == ["inner/three.txt", "one.txt", "two.md"]
    monkeypatch.setenv("LONGMEM_STORE", "other")
    assert names(memory("import", "ada.tar", "--json")) == ["inner/three.txt", "one.txt", "two.md"]
    assert memory("import", "bob.tar", "-n", "carl").out.split()[0] == "added"
    assert memory("list", "--namespaces", "--json").json["namespaces"].keys() == {"ada", "carl"}
    assert memory("verify").status == 0
    ours = memory("search", "old map", "-n", "ada", "--json").json["hits"]
    theirs = memory("search", "old map", "-n", "ada", "--store", filled, "--json").json["hits"]
    assert [(hit["text"], hit["share"]) for hit in ours] == [(hit["text"], hit["share"]) for hit in theirs]
    Path("cut.tar").write_bytes(Path("ada.tar").read_bytes()[:3000])
    assert "cut.tar: no whole export" in memory("import", "cut.tar").error
    assert "no.tar: No such file" in memory("import", "no.tar").error
    assert "no namespace 'eve'; there are: ada, carl" in memory("export", "eve.tar", "-n", "eve").error


@pytest.mark.usefixtures("filled")
def test_everything_prints_one_json_document(memory: Memory, notes: Path) -> None:
    for arguments in (["add", notes, "-n", "ada"], ["list"], ["show", "one.txt", "-n", "ada"],
                      ["search", "x", "-n", "ada"], ["stats"], ["export", "a.tar", "-n", "ada"],
                      ["import", "a.tar", "-n", "zoe"], ["forget", "-n", "bob", "--everything"], ["compact"],
                      ["verify"], ["size"]):  # fmt: skip
        done = memory(*arguments, "--json")
        assert done.status == 0, done
        json.loads(done.out)
