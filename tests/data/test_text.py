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


def put(folder: Path, files: dict[str, bytes]) -> Path:
    """Files in a folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def pack(path: Path, members: dict[str, bytes]) -> Path:
    """A tar or zip archive."""
    folder, kind = put(path.with_name(".members"), members), path.suffix.removeprefix(".").removeprefix("tar")
    with zipfile.ZipFile(path, "w") if kind == "zip" else tarfile.open(path, f"w:{kind}") as archive:
        for name in members:
            (archive.write if kind == "zip" else archive.add)(folder / name, name)
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


def test_a_folder_is_read_in_the_order_of_its_paths_and_patterns_choose_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("b/two.txt", "a/one.txt", "a/deep/three.md", "a/.hidden.txt", "a/pic.png")
    folder = put(tmp_path / "texts", {name: Path(name).stem.encode() for name in names})
    monkeypatch.chdir(tmp_path)
    later = read_documents([folder.name])
    monkeypatch.chdir(folder)
    assert [(d.id, d.text, d.source) for d in later] == [
        (name, Path(name).stem, f"{folder}/{name}") for name in ("a/deep/three.md", "a/one.txt", "b/two.txt")
    ]
    assert [d.id for d in read_documents([f"{folder}/*/*.txt"])] == ["one.txt", "two.txt"]
    assert [name for name, _ in pairs(folder, include=("a/*",))] == ["a/deep/three.md", "a/one.txt"]
    assert pairs(folder, include=("a/*",), exclude=("*.md",)) == [("a/one.txt", "one")]
    assert pairs(folder, include=("b/*", "c/*")) == [("b/two.txt", "two")]
    assert failure(folder, include=("*.tex", "c/*")) == (
        f"{folder}: no document matches *.tex, c/*; there are a/deep/three.md, a/one.txt, b/two.txt; check the pattern"
    )


def test_json_lines_give_one_document_a_line_named_by_their_id(tmp_path: Path) -> None:
    put(tmp_path, {"dos.txt": b"\xef\xbb\xbfa\r\nb", "dos.jsonl": b'\xef\xbb\xbf{"text": "c"}\r\n'})
    assert [text for _, text in pairs(tmp_path / "dos.txt", tmp_path / "dos.jsonl")] == ["a\nb", "c"]
    path = tmp_path / "texts.jsonl"
    path.write_text('{"id": "x", "body": "first", "year": 1999}\n\n{"body": "second"}\n')
    found = read(path, field="body")
    assert found == [Document("x", "first", str(path), line=1), Document("texts.jsonl:3", "second", str(path), line=3)]
    assert [d.record for d in found] == [{"id": "x", "year": 1999}, {}]
    assert found[1].place == f"{path}:3"
    piped = list(read_stream(io.BytesIO(path.read_bytes()), "-", lines=True, field="body"))
    assert [(d.id, d.text, d.place) for d in piped] == [("x", "first", "-:1"), ("-:3", "second", "-:3")]
    (piped_text,) = read_stream(io.BytesIO(b"one\r\ntext\n"), "said")
    assert (piped_text.id, piped_text.text) == ("said", "one\ntext\n")


def test_equal_text_has_an_equal_fingerprint_wherever_it_is(tmp_path: Path) -> None:
    here, there = (TextSource((str(put(tmp_path / name, {"a.txt": b"same"})),)) for name in ("here", "there"))
    assert here.fingerprint() == there.fingerprint()
    assert here.fingerprint() == replace(here, option="set data.{} = {}").fingerprint()
    put(tmp_path / "there", {"a.txt": b"other"})
    assert here.fingerprint() != there.fingerprint()


# archives and compressed files


@pytest.mark.parametrize("name", ["books.tar", "books.tar.gz", "books.tar.xz", "books.tar.bz2", "books.zip"])
def test_an_archive_is_read_without_unpacking(tmp_path: Path, name: str) -> None:
    lines = b'{"text": "first"}\n{"text": "second", "id": "two"}\n'
    members = {
        "train/b.txt": b"B", "train/a.tex": b"A", "train/c.bin": b"C", "__MACOSX/._b.txt": b"\xff", "l.jsonl": lines,
        "more.txt.gz": gzip.compress(b"D"), "inner.zip": pack(tmp_path / "x.zip", {"e.md": b"E"}).read_bytes(),
    }  # fmt: skip
    expected = [
        ("train/b.txt", "B"), ("train/a.tex", "A"), ("l.jsonl:1", "first"), ("two", "second"), ("more.txt.gz", "D"),
        ("e.md", "E"),
    ]  # fmt: skip
    path = pack(tmp_path / "in" / name, members)
    assert pairs(path) == pairs(path.parent) == expected
    put(tmp_path, {"twice.zip.gz": gzip.compress(pack(tmp_path / "twice.zip", members).read_bytes())})
    assert pairs(tmp_path / "twice.zip.gz") == expected


def test_compressed_files_are_read_also_inside_of_folders(tmp_path: Path) -> None:
    files = {"D.TXT.bz2": b"four", "a.txt.gz": b"one", "b.jsonl.xz": b'{"text": "two"}\n', "c.csv.gz": b"3"}
    put(tmp_path, {name: PACK[Path(name).suffix](data) for name, data in files.items()})
    assert pairs(tmp_path) == [("D.TXT.bz2", "four"), ("a.txt.gz", "one"), ("b.jsonl.xz:1", "two")]
    assert pairs(tmp_path / "c.csv.gz") == [("c.csv.gz", "3")], "named itself"


@pytest.mark.parametrize("kind", ["tar.gz", "tar.xz", "zip", "txt.gz", "jsonl.xz", "txt.bz2"])
def test_damage_in_the_middle_of_what_is_packed_is_noticed(tmp_path: Path, kind: str) -> None:
    random, path = Random(0), tmp_path / f"texts.{kind}"
    parts = {f"{name}.txt": "".join(random.choices("abcdefgh \n", k=60_000)).encode() for name in "abc"}
    if "tar" in kind or kind == "zip":
        pack(path, parts)
    else:
        lines = b"".join(json.dumps({"text": data.decode()}).encode() + b"\n" for data in parts.values())
        path.write_bytes(PACK[path.suffix](lines))
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
    "an object as id": (b'{"id": {"n": 1}, "text": "x"}', "the id is {'n': 1}, no text or number", None),
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
        _, replaced, _ = read(path, undecodable="replace")
        assert (replaced.id, replaced.text) == ("cut", mended)
        json.dumps(dict(replaced.record), ensure_ascii=False).encode()  # no half is left anywhere in it


def test_a_file_or_a_name_that_is_not_utf8_is_named_or_skipped_or_mended(tmp_path: Path) -> None:
    put(tmp_path, {"latin.txt": "café".encode("latin-1")})
    fault = "latin.txt: not UTF-8 text (byte 0xe9 at offset 3); convert it, exclude it"
    assert failure(tmp_path).endswith(fault)
    assert failure(tmp_path, option="pass --{} {}").endswith(f"{fault}, or pass --undecodable skip or replace")
    assert "no text is left" in failure(tmp_path, undecodable="skip")
    odd = b"caf\xe9.txt".decode(errors="surrogateescape")
    (tmp_path / odd).write_text("au lait")
    pack(tmp_path / "a.tar", {odd: b"au lait"})
    found = read(tmp_path, undecodable="replace")
    named = ("caf\ufffd.txt", "au lait")
    assert [(d.id, d.text) for d in found] == [named, named, ("latin.txt", "caf\ufffd")]
    assert all(d.source.encode() for d in found) and TextSource((str(tmp_path),)).fingerprint()


# what is missing


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.txt", b" \n", "empty.txt: no text, the file is empty"),
        ("in/picture.png", b"\x89PNG", "/in: no text in this folder; looked for .txt, .md, .rst, .tex, .py, .jsonl"),
        ("a.tar.gz", gzip.compress(bytes(10240)), "a.tar.gz: no text in this archive; looked for .txt"),
    ],
    ids=["empty", "folder", "archive"],
)
def test_what_holds_no_text_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    assert message in failure(put(tmp_path, {name: data}) / name.split("/")[0])
    with pytest.raises(DataError, match=rf"{tmp_path}/a\.b, '', {tmp_path}/b: no such file .*; check the path$"):
        read_documents(TextSource((f"{tmp_path}/a.b", "", f"{tmp_path}/b")))
    for as_lines in (False, True):
        with pytest.raises(DataError, match="no text came"):
            list(read_stream(io.BytesIO(b" \n"), "-", lines=as_lines))


# the hub


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
