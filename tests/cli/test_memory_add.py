"""``longmem memory add``: every kind of source, whole or not at all, and on where it stopped."""

import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.calling import Command, names

from longmem import LongMem, MemoryStore
from longmem.cli import common
from longmem.data.tokens import load_tokenizer, train_tokenizer
from longmem.errors import DataError


def test_a_folder_is_added_once_and_a_text_replaced_where_this_is_said(
    memory: Command, notes: Path, models: Path
) -> None:
    done = memory("add", notes, "--model", models / "backbone")
    assert (done.status, done.out.count("added ")) == (0, 3)
    assert "3 documents (3 added): " in done.err  # from now on the store names its model
    again = memory("add", notes, "--json")
    assert [each["status"] for each in again.json["documents"]] == ["unchanged"] * 3
    assert again.json["complete"] is True
    listed = memory("list", "--json")
    assert names(listed) == ["inner/three.txt", "one.txt", "two.md"]
    assert {each["namespace"] for each in listed.json["documents"]} == {"default"}
    assert listed.json["documents"][1]["source"] == str(notes / "one.txt")
    (notes / "one.txt").write_text("something else")
    assert "`--replace`" in memory("add", notes / "one.txt").error
    assert memory("add", notes / "one.txt", "--replace", "--json").json["documents"][0]["status"] == "replaced"
    assert memory("show", "one.txt", "--text").out == "something else"
    assert memory("show", "one.txt", "--text", "--json").json["text"] == "something else"
    (notes / "main.js").write_text("one")
    (notes / "inner/main.js").write_text("two")
    assert names(memory("add", notes, "--suffix", "js", "--json")) == ["inner/main.js", "main.js"]


@pytest.mark.usefixtures("model")
def test_files_archives_json_lines_and_standard_input(
    memory: Command, notes: Path, piped: Callable[[bytes], None]
) -> None:
    with tarfile.open("old.tar.gz", "w:gz") as archive:
        archive.add(notes / "one.txt", "packed/one.txt")
    Path("chat.jsonl").write_text(
        '{"text": "said first", "id": "a", "metadata": {"who": "Ada"}, "time": "2001-02-03", "mood": "good"}\n'
        '{"text": "said later", "expires": 4102444800, "source": "the phone"}\n'
    )
    piped(b"through the pipe\r\n")
    done = memory("add", notes / "two.md", "old.tar.gz", "chat.jsonl", "-", "--name", "p", "--json")
    assert done.error == "--name (p) is for one text, and more came; leave it out, or add them one by one"
    assert memory("add", "-", "--name", "p").status == 0
    done = memory("add", notes / "two.md", "old.tar.gz", "chat.jsonl", "--keep", "mood", "--prefix", "in/")
    assert done.status == 0
    found = {each["name"]: each for each in memory("list", "--json").json["documents"]}
    assert set(found) == {"p", "in/two.md", "in/packed/one.txt", "in/a", "in/chat.jsonl:2"}
    assert found["in/a"]["metadata"] == {"who": "Ada", "mood": "good"}
    assert found["in/a"]["added"] == time.mktime((2001, 2, 3, 0, 0, 0, 0, 0, -1))
    assert found["in/chat.jsonl:2"]["expires"] == 4102444800
    assert found["in/chat.jsonl:2"]["source"] == "the phone"
    assert memory("show", "p", "--text").out == "through the pipe\n"
    piped(b'{"body": "one", "id": "x"}\n{"body": "two"}\n')
    assert memory("add", "-", "--jsonl", "--field", "body", "--metadata", '{"n": [1]}', "--metadata", "k=v").status == 0
    assert names(memory("list", "--where", "k=v", "--where", "n=[1]", "--json")) == ["x", "-:2"]


@pytest.mark.usefixtures("model")
def test_expired_documents_are_not_there(memory: Command, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    assert "has passed, 'one.txt' would never" in memory("add", notes / "one.txt", "--expires", "2001-01-01").error
    memory("add", notes / "one.txt", "--expires", "12h")
    memory("add", notes / "two.md", "--expires", "30d")
    monkeypatch.setattr(time, "time", lambda: now + 86400)
    (found,) = memory("list", "--json").json["documents"]
    assert found["name"] == "two.md" and found["expires"] == pytest.approx(now + 30 * 86400, abs=60)
    assert memory("stats", "--json").json["expired"] == memory("compact", "--json").json["documents"] == 1


@pytest.mark.usefixtures("notes")
def test_a_new_store_has_the_settings_that_it_is_given(memory: Command, models: Path) -> None:
    assert memory("add", "notes", "--model", models / "side", "--dtype", "int8").status == 0
    layout = memory("stats", "--json").json["layout"]
    assert (layout["dtype"], layout["chunk_size"], layout["segment_tokens"]) == ("int8", 4, 32)
    assert layout["backbone"] == str(models / "backbone")


@pytest.mark.usefixtures("model")
def test_an_interrupted_add_goes_on_where_it_stopped(
    memory: Command, made_text: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("short.txt").write_text("short")
    Path("long.txt").write_text(made_text(400))  # several pieces of 16 segments of 32 tokens
    told: list[int] = []

    def tell(self: object, progress: Any) -> None:
        told.append(progress.done)
        if len(told) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common.ShownProgress, "__call__", tell)
        done = memory("add", "short.txt", "long.txt", "--json")
    assert done.status == 130
    assert done.json["complete"] is False and names(done) == ["short.txt"]
    assert "1 document stored whole before this; the same command again goes on from there" in done.err
    assert names(memory("list", "--json")) == ["short.txt"]
    assert memory("stats", "--json").json["dead_tokens"] >= 2 * 16 * 32  # what the next call finds
    done = memory("add", "short.txt", "long.txt", "--json")
    assert [each["status"] for each in done.json["documents"]] == ["unchanged", "added"]
    assert memory("stats", "--json").json["dead_tokens"] == 0


# lines and files that cannot be read

NO_DATES = "metadata must be an object, time and expires dates"
FAULTS = {  # tests/data has what is wrong with texts; here is what a memory cannot take
    b'{"id":"d","text":"good","metadata":"none"}': NO_DATES,
    b'{"id":"e","text":"good","time":"yesterday"}': NO_DATES,
    b'{"id":"g","text":"good","time":NaN}': NO_DATES,
    b'{"id":"two\\nlines","text":"good"}': "",
}


@pytest.mark.usefixtures("model")
def test_bad_lines_are_named_or_skipped_and_the_others_added(memory: Command, caplog: pytest.LogCaptureFixture) -> None:
    Path("l.jsonl").write_bytes(b"\n".join([b'{"id":"first","text":"one"}', *FAULTS, b'{"id":null,"text":"last"}']))
    places = [f"{Path.cwd()}/l.jsonl:{number}: " for number in range(2, 2 + len(FAULTS))]
    for data, fault in FAULTS.items():
        Path("one.jsonl").write_bytes(data)
        line = memory("add", "one.jsonl").error
        assert line.startswith(f"{Path.cwd()}/one.jsonl:1: {fault}") and "; " in line
    done = memory("add", "l.jsonl", "--undecodable", "skip", "--json")
    assert (done.status, names(done)) == (0, ["first", "l.jsonl:6"])
    said = [record.getMessage() for record in caplog.records]
    for place, fault, line in zip(places, FAULTS.values(), said, strict=True):
        assert line.startswith(place + fault) and line.endswith("; skipped")


ODD = b"caf\xe9".decode(errors="surrogateescape")  # what Python makes of bytes that are not UTF-8


@pytest.mark.usefixtures("notes", "model")
def test_arguments_that_mean_nothing_are_named(memory: Command, piped: Callable[[bytes], None]) -> None:
    assert memory("add", "nothing.txt").error.endswith(
        f"nothing.txt: no such file or folder (looked from {Path.cwd()}); check the path"
    )
    assert "no document matches *.none; there are inner" in memory("add", "notes", "--include", "*.none").error
    assert "needs a --name (or --jsonl" in memory("add", "-").error
    Path("odd.jsonl").write_text('{"text": "said", "time": "never"}\n')
    done = memory("add", "odd.jsonl", "--undecodable", "skip")
    assert done.error == "no text was left to add; see --exclude and --undecodable"
    piped(b"")
    assert memory("add", "-", "--name", "x").error.startswith("x: no text came")
    assert memory("search", " ").error == "the text to search for is empty; say something"
    for option in ("--name", "-n"):
        assert memory("add", "notes/two.md", option, ODD).error
    for arguments, line in (
        (["search", ODD], "'caf\\udce9' is not UTF-8 text; convert it"),
        (["add", "notes", "--metadata", f"a={ODD}"], "'a=caf\\udce9' is not UTF-8 text"),
        (["add", "notes", "--expires", "soon"], "'soon' is no when; try 30d, 12h or 2026-01-31"),
        (["add", "notes", "--time", "30d"], "'30d' is no date; try 2026-01-31"),
        (["add", "notes", "--metadata", "author"], "'author' is neither KEY=VALUE nor a JSON object"),
        (["add", "notes", "--metadata", "{author"], "'{author' is neither KEY=VALUE nor a JSON object"),
    ):
        done = memory(*arguments)
        assert (done.status, done.out) == (2, "") and line in " ".join(done.err.split())


def test_another_models_tokenizer_is_refused_wherever_text_is_read(
    command: Command, memory: Command, models: Path, filled: Path, tmp_path: Path, made_text: Callable[..., str]
) -> None:
    train_tokenizer([made_text(500)], 300).save_pretrained(str(tmp_path / "wrong"))
    said = "wrong: a tokenizer of 300 tokens, the model knows 260: it is another model's; "
    for arguments in (["add", "notes"], ["search", "the old map", "-n", "ada"]):
        assert memory(*arguments, "--tokenizer", "wrong").error == f"{said}name the right one with --tokenizer"
    model: Any = LongMem.from_pretrained(models / "side" / "final")
    with pytest.raises(DataError, match="the model knows 260: it is another model's; open the store with the model's"):
        MemoryStore.open(filled, model=model, tokenizer=load_tokenizer(tmp_path / "wrong"))
    (tmp_path / "notes" / "long.txt").write_text(made_text(500))  # the others are too short to validate on
    for name, sizes in (("layers", ""), ("calibrate", " --memory 8 --window 8")):
        done = command(name, models / "backbone", *f"--data notes --tokenizer wrong --out out{sizes}".split())
        assert done.error == f"{said}name the right one with --tokenizer"
