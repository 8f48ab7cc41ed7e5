"""Readers: what counts as text, in which order, and one clear line for everything that is wrong."""

from __future__ import annotations

import io
import json
import sys
import tarfile
import types
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from longmem.data.text import Document, TextSource, WaysOut, read_documents, read_stream
from longmem.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {
        "b/two.txt": "two",
        "a/one.txt": "one",
        "a/deep/three.md": "three",
        "a/.hidden.txt": "no",
        "a/pic.png": "no",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def pack(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:xz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def failure(*paths: Path, **settings: object) -> str:
    with pytest.raises(DataError) as raised:
        list(read_documents(paths, **settings))
    line = str(raised.value)
    assert "\n" not in line
    return line


def test_a_folder_is_read_recursively_in_the_order_of_its_paths(folder: Path) -> None:
    found = list(read_documents([folder]))
    assert [(d.id, d.text) for d in found] == [("a/deep/three.md", "three"), ("a/one.txt", "one"), ("b/two.txt", "two")]
    assert found[1].source == str(folder / "a/one.txt")


def test_patterns_choose_documents_and_a_star_crosses_folders(folder: Path) -> None:
    assert [d.id for d in read_documents([folder], include=("a/*",))] == ["a/deep/three.md", "a/one.txt"]
    assert [d.id for d in read_documents([folder], include=("a/*",), exclude=("*.md",))] == ["a/one.txt"]


def test_the_files_of_a_top_folder_can_be_one_document(folder: Path) -> None:
    found = list(read_documents([folder], group="folder"))
    assert [(d.id, d.text) for d in found] == [("a", "three\n\none"), ("b", "two")]


def test_an_archive_is_read_without_unpacking(tmp_path: Path) -> None:
    path = pack(tmp_path / "books.tar.xz", {"train/b.txt": b"B", "train/a.tex": b"A", "train/c.bin": b"C"})
    assert [(d.id, d.text) for d in read_documents([path])] == [("train/b.txt", "B"), ("train/a.tex", "A")]


def test_json_lines_give_one_document_a_line_named_by_their_id(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"id": "x", "body": "first"}\n\n{"body": "second"}\n')
    assert list(read_documents([path], field="body")) == [
        Document("x", "first", f"{path}, line 1"),
        Document("texts.jsonl:3", "second", f"{path}, line 3"),
    ]


def test_a_pattern_stands_for_the_files_it_matches(folder: Path) -> None:
    assert [d.id for d in read_documents([f"{folder}/*/*.txt"])] == ["one.txt", "two.txt"]


def test_windows_line_ends_and_byte_order_marks_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert next(iter(read_documents([tmp_path / "dos.txt"]))).text == "a\nb"


def test_equal_text_has_an_equal_fingerprint_wherever_it_lies(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("same")
    here, there = (TextSource((str(tmp_path / name),)) for name in ("here", "there"))
    assert here.fingerprint() == there.fingerprint()
    (tmp_path / "there" / "a.txt").write_text("other")
    assert here.fingerprint() != there.fingerprint()


def test_errors_propose_what_a_source_says_and_its_fingerprint_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    plain, other = TextSource((str(tmp_path),)), TextSource((str(tmp_path),), ways_out=WaysOut(missing="ask Ann"))
    assert plain.fingerprint() == other.fingerprint()
    with pytest.raises(DataError, match=r"; ask Ann$"):
        list(read_documents(replace(other, paths=(f"{tmp_path}/b.txt",))))


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path}/nowhere.txt, {tmp_path}/no: no such file" in failure(tmp_path / "nowhere.txt", tmp_path / "no")


def test_an_empty_name_is_not_the_folder_one_is_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(DataError, match="'': no such file or folder"):
        list(read_documents([""]))


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    assert failure(tmp_path / "empty.txt").startswith(f"{tmp_path}/empty.txt: no text, the file is empty")


def test_a_folder_without_text_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    line = failure(tmp_path)
    assert "no text in this folder" in line
    assert ".txt" in line
    assert line.endswith("name other files by themselves")


def test_text_that_is_not_utf8_names_the_byte_and_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    line = failure(tmp_path / "latin.txt")
    assert "latin.txt: not UTF-8 text (byte 0xe9 at offset 3)" in line
    assert line.endswith("convert it, or name other files")
    (tmp_path / "good.txt").write_text("good")
    assert [d.id for d in read_documents([tmp_path], undecodable="skip")] == ["good.txt"]
    assert [d.text for d in read_documents([tmp_path], undecodable="replace")] == ["good", "caf\ufffd"]


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    whole = pack(tmp_path / "whole.tar.xz", {"a.txt": json.dumps(list(range(5000))).encode()})
    cut = tmp_path / "cut.tar.xz"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert failure(cut).startswith(f"{cut}: not a readable tar archive")


@pytest.mark.parametrize("kind", ["gz", "xz", "bz2"])
def test_damage_in_the_middle_of_an_archive_is_noticed(tmp_path: Path, kind: str) -> None:
    random = Random(0)
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("".join(random.choices("abcdefgh \n", k=60_000)))
    path = tmp_path / f"texts.tar.{kind}"
    with tarfile.open(path, f"w:{kind}") as archive:  # type: ignore[call-overload]
        for name in "abc":
            archive.add(tmp_path / f"{name}.txt", f"{name}.txt")
    assert len(list(read_documents([path]))) == 3
    whole = path.read_bytes()
    for place in (len(whole) * tenth // 10 for tenth in range(1, 10)):  # not the very end, which may be padding
        path.write_bytes(whole[:place] + bytes(8) + whole[place + 8 :])
        with pytest.raises(DataError, match=r"not a readable tar archive|not UTF-8"):
            list(read_documents([path]))


def test_a_line_that_is_no_json_is_numbered(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    assert "texts.jsonl, line 2: not JSON" in failure(tmp_path / "texts.jsonl")


def test_a_record_without_the_field_lists_those_it_has(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"body": "fine"}\n')
    assert "no text field 'text' (it has: body)" in failure(tmp_path / "texts.jsonl")


def test_a_hub_data_set_is_read_by_name_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(name: str, config: str | None, split: str) -> list[dict[str, str]]:
        asked.append((name, config, split))
        return [{"text": "first"}, {"text": "second"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    found = list(read_documents(["hub:owner/books", "hub:owner/books:small:test"]))
    assert asked == [("owner/books", None, "train"), ("owner/books", "small", "test")]
    assert [d.id for d in found[:2]] == ["owner/books:0", "owner/books:1"]


def test_a_hub_data_set_that_cannot_be_loaded_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise RuntimeError("no such data set\nand a long story")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        DataError, match=r"^hub:x: the hub data set cannot be loaded \(no such data set\); write hub:NAME"
    ):
        list(read_documents(["hub:x"]))


def test_a_stream_is_one_text_or_json_lines() -> None:
    assert [(d.id, d.text) for d in read_stream(io.BytesIO(b"one\r\ntext\n"), "said")] == [("said", "one\ntext\n")]
    lines = b'{"text": "a", "id": "first", "year": 1999}\n\n{"text": "b"}\n'
    found = list(read_stream(io.BytesIO(lines), "-", lines=True))
    assert [(d.id, d.text, d.source) for d in found] == [("first", "a", "-, line 1"), ("-:3", "b", "-, line 3")]
    assert [d.record for d in found] == [{"id": "first", "year": 1999}, {}]


def test_a_stream_without_text_is_refused() -> None:
    for lines in (False, True):
        with pytest.raises(DataError, match="no text came"):
            list(read_stream(io.BytesIO(b" \n"), "-", lines=lines))


def test_a_stream_gives_each_line_as_it_comes() -> None:
    class Lines(io.BytesIO):
        def __next__(self) -> bytes:
            line = super().__next__()
            asked.append(line)
            return line

    asked: list[bytes] = []
    found = read_stream(Lines(b'{"text": "a"}\n{"text": "b"}\n'), "-", lines=True)
    assert next(found).text == "a"
    assert len(asked) == 1
