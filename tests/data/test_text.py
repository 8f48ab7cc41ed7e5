"""Readers: what counts as text, in which order, and one clear line for everything that is wrong."""

import bz2
import gzip
import io
import json
import logging
import lzma
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from longmem.data.text import Document, TextSource, read_documents, read_stream
from longmem.errors import DataError

PACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


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
    """A tar or zip archive."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return path
    with tarfile.open(path, f"w:{path.suffix[1:]}" if path.suffix != ".tar" else "w") as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def read(*paths: Path, **settings: Any) -> list[Document]:
    return list(read_documents(TextSource(tuple(map(str, paths)), **settings)))


def pairs(*paths: Path, **settings: Any) -> list[tuple[str, str]]:
    return [(document.id, document.text) for document in read(*paths, **settings)]


def failure(*paths: Path, **settings: Any) -> str:
    with pytest.raises(DataError) as raised:
        read(*paths, **settings)
    line = str(raised.value)
    assert "\n" not in line
    return line


# what is read, and in which order


def test_a_folder_is_read_recursively_in_the_order_of_its_paths_from_where_it_was_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    found = read_documents([folder.name])
    monkeypatch.chdir(folder)
    assert [(d.id, d.text, d.source) for d in found] == [
        (name, text, f"{folder}/{name}")
        for name, text in (("a/deep/three.md", "three"), ("a/one.txt", "one"), ("b/two.txt", "two"))
    ]


def test_patterns_choose_documents_and_a_star_crosses_folders(folder: Path) -> None:
    assert [d.id for d in read_documents([f"{folder}/*/*.txt"])] == ["one.txt", "two.txt"]
    assert [name for name, _ in pairs(folder, include=("a/*",))] == ["a/deep/three.md", "a/one.txt"]
    assert pairs(folder, include=("a/*",), exclude=("*.md",)) == [("a/one.txt", "one")]
    assert pairs(folder, include=("b/*", "c/*")) == [("b/two.txt", "two")]
    assert failure(folder, include=("*.tex", "c/*")) == (
        f"{folder}: no document matches *.tex, c/*; there are a/deep/three.md, a/one.txt, b/two.txt; check the pattern"
    )


def test_json_lines_give_one_document_a_line_named_by_their_id(tmp_path: Path) -> None:
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbfa\r\nb")
    (tmp_path / "dos.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "c"}\r\n')
    assert [text for _, text in pairs(tmp_path / "dos.txt", tmp_path / "dos.jsonl")] == ["a\nb", "c"]
    path = tmp_path / "texts.jsonl"
    path.write_text('{"id": "x", "body": "first"}\n\n{"body": "second"}\n')
    found = read(path, field="body")
    assert found == [Document("x", "first", str(path), line=1), Document("texts.jsonl:3", "second", str(path), line=3)]
    assert found[1].place == f"{path}:3"


def test_equal_text_has_an_equal_fingerprint_wherever_it_is(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("same")
    here, there = (TextSource((str(tmp_path / name),)) for name in ("here", "there"))
    assert here.fingerprint() == there.fingerprint()
    assert here.fingerprint() == replace(here, option="set data.{} = {}").fingerprint()
    (tmp_path / "there" / "a.txt").write_text("other")
    assert here.fingerprint() != there.fingerprint()


# archives and compressed files


@pytest.mark.parametrize("name", ["books.tar", "books.tar.gz", "books.tar.xz", "books.tar.bz2", "books.zip"])
def test_an_archive_is_read_without_unpacking(tmp_path: Path, name: str) -> None:
    lines = b'{"text": "first"}\n{"text": "second", "id": "two"}\n'
    members = {
        "train/b.txt": b"B", "train/a.tex": b"A", "train/c.bin": b"C", "__MACOSX/._b.txt": b"\xff", "l.jsonl": lines,
        "more.txt.gz": gzip.compress(b"D"), "inner.zip": pack(tmp_path / "inner.zip", {"e.md": b"E"}).read_bytes(),
    }  # fmt: skip
    path = pack(tmp_path / name, members)
    expected = [
        ("train/b.txt", "B"), ("train/a.tex", "A"), ("l.jsonl:1", "first"), ("two", "second"), ("more.txt.gz", "D"),
        ("e.md", "E"),
    ]  # fmt: skip
    assert pairs(path) == expected
    (tmp_path / "inner.zip").unlink()
    assert pairs(tmp_path) == expected, "in a folder"
    if name == "books.zip":
        (tmp_path / "twice.zip.gz").write_bytes(gzip.compress(path.read_bytes()))
        assert pairs(tmp_path / "twice.zip.gz") == expected


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_files_are_read_also_inside_of_folders(tmp_path: Path, suffix: str) -> None:
    for name, data in {"a.txt": b"one", "b.jsonl": b'{"text": "two"}\n', "c.csv": b"3", "D.TXT": b"four"}.items():
        (tmp_path / f"{name}{suffix}").write_bytes(PACK[suffix](data))
    expected = [(f"D.TXT{suffix}", "four"), (f"a.txt{suffix}", "one"), (f"b.jsonl{suffix}:1", "two")]
    assert pairs(tmp_path) == expected
    assert pairs(tmp_path / f"c.csv{suffix}") == [(f"c.csv{suffix}", "3")], "named itself"


@pytest.mark.parametrize("kind", ["tar.gz", "tar.xz", "tar.bz2", "zip", "txt.gz", "jsonl.xz", "txt.bz2"])
def test_damage_in_the_middle_of_what_is_packed_is_noticed(tmp_path: Path, kind: str) -> None:
    random = Random(0)
    parts = {f"{name}.txt": "".join(random.choices("abcdefgh \n", k=60_000)).encode() for name in "abc"}
    path = tmp_path / f"texts.{kind}"
    if "tar" in kind or kind == "zip":
        pack(path, parts)
    else:
        lines = b"".join(json.dumps({"text": data.decode()}).encode() + b"\n" for data in parts.values())
        path.write_bytes(PACK[path.suffix](lines if "jsonl" in kind else b"".join(parts.values())))
    whole = path.read_bytes()
    assert list(read_documents([path]))
    for place in (len(whole) * tenth // 10 for tenth in range(1, 10)):  # not the very end, which may be padding
        path.write_bytes(whole[:place] + bytes(8) + whole[place + 8 :])
        assert f"{path}: not a readable" in failure(path)
    path.write_bytes(whole[: len(whole) // 2])
    assert failure(path).startswith(f"{path}: not a readable")


# what cannot be decoded: error, skip or replace

HALF = r'{"id": "cut", "text": "a cut emoji \ud83d here", "metadata": {"mood": ["\ude00"]}}'
LINES: dict[str, tuple[bytes, str, str | None]] = {
    "byte": (b'{"id": "cut", "text": "caf\xe9"}', "not UTF-8 text (byte 0xe9 at offset 26)", "caf\ufffd"),
    "half": (HALF.encode(), r"not UTF-8 text (half of a character, \ud83d)", "a cut emoji \ufffd here"),
    "no json": (b'{"text": ', "not JSON (Expecting value), every line must be one JSON object", None),
    "deep": (b"[" * 100_000, "not JSON (", None),
    "a list": (b'["text"]', "['text'] is no object with a text field", None),
    "no field": (b'{"body": "x"}', "no text in the field 'text' (fields: body)", None),
    "null": (b'{"id": "b", "text": null}', "no text in the field 'text' (fields: id, text)", None),
    "a number": (b'{"text": 5}', "no text in the field 'text' (it holds 5; fields: text)", None),
}


@pytest.mark.parametrize("kind", LINES)
def test_a_line_that_cannot_be_read_is_named_or_skipped_or_mended(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    line, fault, mended = LINES[kind]
    path = tmp_path / "texts.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + line + b'\n{"id": "\xf0\x9f\x98\x80", "text": "\\ud83d\\ude00 after"}\n')
    assert failure(path).startswith(f"{path}:2: {fault}")
    with caplog.at_level(logging.WARNING):
        found = pairs(path, undecodable="skip")
    assert found == [("texts.jsonl:1", "before"), ("😀", "😀 after")]
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith(f"{path}:2: {fault}") and said.endswith("; skipped")
    if mended is None:
        assert failure(path, undecodable="replace").startswith(f"{path}:2: {fault}")
    else:
        replaced = read(path, undecodable="replace")
        assert (replaced[1].id, replaced[1].text) == ("cut", mended)
        json.dumps(dict(replaced[1].record), ensure_ascii=False).encode()  # no half is left anywhere in it
        assert len(replaced) == 3


def test_a_file_that_is_not_utf8_is_named_or_skipped_or_mended(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    fault = "latin.txt: not UTF-8 text (byte 0xe9 at offset 3); convert it, exclude it"
    assert failure(tmp_path).endswith(fault)
    assert failure(tmp_path, option="pass --{} {}").endswith(f"{fault}, or pass --undecodable skip or replace")
    assert [text for _, text in pairs(tmp_path, undecodable="replace")] == ["caf\ufffd"]
    assert "no text is left" in failure(tmp_path / "latin.txt", undecodable="skip")


@pytest.mark.parametrize("packed", [False, True])
def test_bytes_of_a_name_that_are_not_utf8_are_replaced(tmp_path: Path, packed: bool) -> None:
    odd = b"caf\xe9.txt".decode(errors="surrogateescape")
    if packed:
        pack(tmp_path / "a.tar", {odd: b"au lait"})
    else:
        (tmp_path / odd).write_text("au lait")
    (found,) = read_documents([tmp_path])
    assert (found.id, found.text) == ("caf\ufffd.txt", "au lait") and found.source.encode()
    assert TextSource((str(tmp_path),)).fingerprint()


# what is missing


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ({}, "nowhere.txt", "nowhere.txt: no such file or folder (looked from "),
        ({"empty.txt": b" \n"}, "empty.txt", "empty.txt: no text, the file is empty"),
        ({"picture.png": b"\x89PNG"}, ".", ": no text in this folder; looked for .txt, .md, .rst, .tex, .py, .jsonl"),
        ({"a.tar.gz": gzip.compress(bytes(10240))}, "a.tar.gz", "a.tar.gz: no text in this archive; looked for .txt"),
    ],
)
def test_what_holds_no_text_is_named(tmp_path: Path, files: dict[str, bytes], path: str, message: str) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert message in failure(tmp_path / path)
    with pytest.raises(DataError, match=rf"{tmp_path}/a\.b, '', {tmp_path}/b: no such file .*; check the path$"):
        read_documents(TextSource((f"{tmp_path}/a.b", "", f"{tmp_path}/b")))


# the hub, and standard input


def test_a_hub_data_set_is_read_by_name_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(name: str, config: str | None, split: str) -> list[dict[str, str]]:
        if name == "x":
            raise RuntimeError("no such data set\nand a long story")
        asked.append((name, config, split))
        return [{"text": "first"}, {"text": "second"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    found = list(read_documents(["hub:owner/books", "hub:owner/books:small:test"]))
    assert asked == [("owner/books", None, "train"), ("owner/books", "small", "test")]
    assert [d.id for d in found[:2]] == ["owner/books:0", "owner/books:1"]
    with pytest.raises(DataError, match=r"^hub:x: the hub data set cannot be loaded \(no such data set\); write hub:N"):
        list(read_documents(["hub:x"]))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"reading the hub needs `datasets`; pip install"):
        list(read_documents(["hub:owner/books"]))


def test_a_stream_is_one_text_or_json_lines() -> None:
    assert [(d.id, d.text) for d in read_stream(io.BytesIO(b"one\r\ntext\n"), "said")] == [("said", "one\ntext\n")]
    lines = b'{"text": "a", "id": "first", "year": 1999}\n\n{"text": "b"}\n'
    found = list(read_stream(io.BytesIO(lines), "-", lines=True))
    assert [(d.id, d.text, d.place) for d in found] == [("first", "a", "-:1"), ("-:3", "b", "-:3")]
    assert [d.record for d in found] == [{"id": "first", "year": 1999}, {}]
    for as_lines in (False, True):
        with pytest.raises(DataError, match="no text came"):
            list(read_stream(io.BytesIO(b" \n"), "-", lines=as_lines))
