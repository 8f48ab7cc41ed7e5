"""``longmem memory add``: every kind of source, whole or not at all, and on where it stopped."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import tarfile
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.calling import Memory, names


@pytest.mark.usefixtures("model")
def test_a_folder_is_added_and_the_same_call_again_changes_nothing(memory: Memory, notes: Path) -> None:
    done = memory("add", notes)
    assert (done.status, done.out.count("added ")) == (0, 3)
    assert "3 documents (3 added): " in done.err
    again = memory("add", notes, "--json")
    assert [each["status"] for each in again.json["documents"]] == ["unchanged"] * 3
    assert again.json["complete"] is True
    listed = memory("list", "--json")
    assert names(listed) == ["inner/three.txt", "one.txt", "two.md"]
    assert {each["namespace"] for each in listed.json["documents"]} == {"default"}
    assert listed.json["documents"][1]["source"] == str(notes / "one.txt")


@pytest.mark.usefixtures("model")
def test_files_archives_json_lines_and_standard_input(
    memory: Memory, notes: Path, piped: Callable[[bytes], None]
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


@pytest.mark.usefixtures("model")
def test_json_lines_come_through_a_pipe(memory: Memory, piped: Callable[[bytes], None]) -> None:
    piped(b'{"body": "one", "id": "x"}\n{"body": "two"}\n')
    assert memory("add", "-", "--jsonl", "--field", "body", "--metadata", '{"n": [1]}', "--metadata", "k=v").status == 0
    listed = memory("list", "--where", "k=v", "--where", "n=[1]", "--json")
    assert names(listed) == ["x", "-:2"]


@pytest.mark.usefixtures("model")
def test_replace_and_append(memory: Memory, notes: Path) -> None:
    memory("add", notes / "one.txt")
    before = (notes / "one.txt").read_text()
    (notes / "one.txt").write_text("something else")
    assert "`--replace`" in memory("add", notes / "one.txt").error
    assert memory("add", notes / "one.txt", "--replace", "--json").json["documents"][0]["status"] == "replaced"
    assert memory("show", "one.txt", "--text").out == "something else"
    (notes / "one.txt").write_text(before)
    (notes / "new.txt").write_text("new")
    done = memory("add", notes / "one.txt", notes / "new.txt", "--append", "--json")
    assert [each["status"] for each in done.json["documents"]] == ["appended", "added"]
    assert memory("show", "one.txt", "--text").out == f"something else{before}"
    done = memory("append", notes / "new.txt", "--json")
    assert [each["status"] for each in done.json["documents"]] == ["appended"]
    assert memory("show", "new.txt", "--text").out == "newnew"
    assert memory("add", notes, "--append", "--replace").error.startswith("--replace and --append contradict")
    assert "leave --metadata, --expires out" in (
        memory("add", notes, "--append", "--metadata", "a=1", "--expires", "30d").error
    )
    Path("two.jsonl").write_text('{"id": "one.txt", "text": "more"}\n{"text": \n')
    assert "1 document stored whole before this; append the others" in memory("append", "two.jsonl").err


@pytest.mark.usefixtures("model")
def test_expired_documents_are_not_there(memory: Memory, notes: Path) -> None:
    memory("add", notes / "one.txt", "--expires", "2001-01-01")
    memory("add", notes / "two.md", "--expires", "30d")
    (found,) = memory("list", "--json").json["documents"]
    assert found["name"] == "two.md"
    assert found["expires"] == pytest.approx(time.time() + 30 * 86400, abs=60)
    assert memory("stats", "--json").json["expired"] == 1
    assert memory("compact", "--json").json["documents"] == 1


@pytest.mark.usefixtures("notes")
def test_a_new_store_has_the_settings_that_it_is_given(memory: Memory, models: Path) -> None:
    settings = ["--dtype", "int8", "--chunk-size", 8, "--segment", 16, "--batch-tokens", 64]
    assert memory("add", "notes", "--model", models / "side", *settings).status == 0
    layout = memory("stats", "--json").json["layout"]
    assert (layout["dtype"], layout["chunk_size"], layout["segment_tokens"]) == ("int8", 8, 16)
    assert layout["backbone"] == str(models / "backbone")
    line = memory("add", "notes", "--model", models / "side", "--dtype", "float16").error
    assert "made with dtype=int8, not float16" in line


def test_the_store_names_its_model_so_that_nothing_else_has_to(memory: Memory, models: Path, notes: Path) -> None:
    assert memory("add", notes / "one.txt", "--model", models / "backbone").status == 0
    for arguments in (["add", notes / "two.md"], ["search", "old map"], ["list"], ["forget", "--everything"],
                      ["compact"], ["verify"]):  # fmt: skip
        assert memory(*arguments).status == 0, arguments


@pytest.mark.usefixtures("model")
def test_an_interrupted_add_goes_on_where_it_stopped(
    memory: Memory, made_text: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from longmem.cli import common
    from longmem.store import adding

    Path("short.txt").write_text("short")
    Path("long.txt").write_text(made_text(400))  # several pieces of 16 segments of 32 tokens
    monkeypatch.setattr(adding, "COMMIT_SECONDS", 0.0)
    told: list[int] = []

    def tell(self: object, progress: Any) -> None:
        told.append(progress.done)
        if len(told) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common.ShownProgress, "__call__", tell)
        done = memory("add", "short.txt", "long.txt", "--json")
    assert done.status == 130
    assert done.json["complete"] is False
    assert names(done) == ["short.txt"]
    assert "1 document stored whole before this; the same command again goes on from there" in done.err
    assert "Traceback" not in done.err
    assert names(memory("list", "--json")) == ["short.txt"]
    assert memory("verify").status == 0
    assert memory("stats", "--json").json["dead_tokens"] >= 2 * 16 * 32  # what the next call finds
    done = memory("add", "short.txt", "long.txt", "--json")
    assert [each["status"] for each in done.json["documents"]] == ["unchanged", "added"]
    assert memory("stats", "--json").json["dead_tokens"] == 0
    assert memory("show", "long.txt", "--text").out == Path("long.txt").read_text()


def test_control_c_leaves_a_clean_store(memory: Memory, model: Path) -> None:
    command = [sys.executable, "-m", "longmem", "memory", "add", "-", "--jsonl"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "LONGMEM_MODEL": str(model)},
        # where the suite runs in the background of a shell, a child would ignore Ctrl-C as it does
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write('{"text": "one"}\n')
    process.stdin.flush()
    deadline = time.monotonic() + 300
    while not Path("memory/catalog.sqlite").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    time.sleep(1)  # it waits for the second line now
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, (out, err)
    assert "the same command again goes on from there" in err
    assert err.strip().endswith("interrupted")
    assert "Traceback" not in err
    report = memory("verify", "--json").json
    assert (report["clean"], report["problems"]) == (True, [])


# lines and files that cannot be read

BAD = [
    b'{"id":"a","text":"caf\xe9 au lait"}',
    b'{"id":"b","text":"a cut emoji \\ud83d here"}',
    b'{"id":"c","text":null}',
    b'{"id":"d","text":"good","metadata":"none"}',
    b'{"id":"e","text":"good","time":"yesterday"}',
    b'{"id":"f","text":',
    b'{"id":"g","text":"good","time":NaN}',
    b'{"id":"h","text":"good","metadata":[]}',
    b'{"id":"two\\nlines","text":"good"}',
]


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize("packed", [False, True])
def test_bad_lines_are_skipped_and_named_and_the_others_added(
    memory: Memory, packed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    data = b"\n".join([b'{"id":"first","text":"one"}', *BAD, b'{"id":null,"text":"last"}'])
    name = "l.jsonl.gz" if packed else "l.jsonl"
    Path(name).write_bytes(gzip.compress(data) if packed else data)
    done = memory("add", name, "--undecodable", "skip", "--json")
    assert (done.status, names(done)) == (0, ["first", f"{name}:11"])
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(": ")[0] for line in said] == [f"{Path.cwd()}/{name}:{number}" for number in range(2, 11)]
    assert all(line.endswith("; skipped") for line in said)


@pytest.mark.usefixtures("model")
def test_bytes_and_halves_can_be_replaced(memory: Memory) -> None:
    Path("l.jsonl").write_bytes(b"\n".join(BAD[:2]))
    assert "l.jsonl:1: not UTF-8 text (byte 0xe9 at offset 21); convert it, exclude it, or pass --undecodable" in (
        memory("add", "l.jsonl").error
    )
    assert names(memory("add", "l.jsonl", "--undecodable", "replace", "--json")) == ["a", "b"]
    assert memory("show", "a", "--text").out == "caf\ufffd au lait"
    assert memory("show", "b", "--text").out == "a cut emoji \ufffd here"


@pytest.mark.usefixtures("model")
def test_lines_without_a_name_are_called_by_file_and_line(memory: Memory) -> None:
    Path("n.jsonl").write_text('{"id":null,"text":"the first text"}\n{"id":null,"text":"the second text"}\n')
    assert names(memory("add", "n.jsonl", "--json")) == ["n.jsonl:1", "n.jsonl:2"]
    Path("t.jsonl").write_text('{"id":"b","text":null}\n')
    line = memory("add", "t.jsonl").error
    assert "t.jsonl:1: the field 'text' holds null, not text (it has: id, text); name it with --field" in line


def test_another_models_tokenizer_is_refused_wherever_text_is_read(
    memory: Memory,
    models: Path,
    filled: Path,
    tmp_path: Path,
    made_text: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    from longmem import LongMem, MemoryStore
    from longmem.cli.main import main
    from longmem.data.tokenizer import load_tokenizer, train_tokenizer
    from longmem.errors import DataError

    def run(*arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main([*map(str, arguments)])
        return capsys.readouterr().err.splitlines()[-1]

    train_tokenizer([made_text(500)], 300).save_pretrained(str(tmp_path / "wrong"))
    for arguments in (["add", "notes"], ["append", "notes"], ["search", "the old map", "-n", "ada"]):
        assert memory(*arguments, "--tokenizer", "wrong").error == (
            "wrong: a tokenizer of 300 tokens, the model knows 260: it is another model's; name the right one with "
            "--tokenizer"
        )
    model: Any = LongMem.from_pretrained(models / "side" / "final")
    with pytest.raises(DataError, match="the model knows 260: it is another model's; open the store with the model's"):
        MemoryStore.open(filled, model=model, tokenizer=load_tokenizer(tmp_path / "wrong"))
    for command in ("layers", "calibrate"):
        assert run(command, models / "backbone", "--data", "notes", "--tokenizer", "wrong", "--out", "out") == (
            "error: wrong: a tokenizer of 300 tokens, the model knows 260: it is another model's; name the right one "
            "with --tokenizer"
        )


@pytest.mark.usefixtures("model")
def test_a_name_may_be_composed_or_not(memory: Memory) -> None:
    written, typed = unicodedata.normalize("NFD", "Zoë.txt"), unicodedata.normalize("NFC", "Zoë.txt")
    Path(written).write_text("hello there")
    assert memory("add", typed, "-n", typed).status == 0
    assert memory("show", typed, "-n", written, "--text").out == "hello there"
    assert memory("search", "hello", "-n", written, "--document", written).status == 0
    assert memory("forget", "-n", written, "--name", written).status == 0
