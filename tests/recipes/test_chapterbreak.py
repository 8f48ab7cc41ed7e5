"""Chapters found in plain text, and the benchmark of chapter boundaries made from books."""

import hashlib
import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recipes.data.chapterbreak import (
    Chapter,
    ChapterBreakSettings,
    Heading,
    build_chapterbreak,
    chapters_of,
    find_chapters,
    main,
)

from longmem.data.text import read_documents
from longmem.errors import DataError

MakeText = Callable[..., str]
SMALL = ChapterBreakSettings(prefix=500, words=30, per_book=3)

# chapters


def chaptered(headings: list[str], made_text: MakeText, words: int = 600) -> str:
    return "\n\n".join(f"{heading}\n\n{made_text(words, seed)}" for seed, heading in enumerate(headings))


def begins(text: str, chapters: list[Chapter]) -> list[str]:
    """The first line of each chapter's headings."""
    return [text[chapter.boundary :].split("\n")[0] for chapter in chapters]


SIX = [f"CHAPTER {number}" for number in range(1, 7)]


@pytest.mark.parametrize(
    "headings",
    [
        ["CHAPTER I", "CHAPTER II.", "CHAPTER III - IN WHICH WE DINE", "CHAPTER IV", "Chapter V: Home", "CHAPTER VI"],
        ["Chapter One", "Chapter Two", "Chapter Three", "Chapter the Fourth", "CHAPTER TWENTY-ONE", "Epilogue"],
        ["# Begin", "## The Road", "## The Inn", "## Snow", "## A Letter", "# End"],
        ["I. THE LETTER", "II. The _Boat_", "III. Fog", "IV. Sand", "V. Wreck", "VI. Shore"],
        ["Prologue", "Stave One", "Stave Two", "Stave Three", "Letter 4", "PART THE SECOND"],
    ],
)
def test_headings_of_many_forms_are_found(headings: list[str], made_text: MakeText) -> None:
    text = chaptered(headings, made_text)
    found = find_chapters(text)
    assert begins(text, found) == headings
    assert [chapter.end for chapter in found] == [*(chapter.boundary for chapter in found[1:]), len(text)]


def test_what_only_looks_like_a_heading_is_none(made_text: MakeText) -> None:
    text = chaptered(SIX, made_text)
    burnt = text.replace("\n\nCHAPTER 3", "\n\nChapter two was burnt by her aunt.\n\nCHAPTER 3")
    assert begins(burnt, find_chapters(burnt)) == SIX
    contents = "\n\n".join(SIX)
    chapters = find_chapters(f"{contents}\n\n{'-' * 300}\n\n{text}")
    assert len(chapters) == 6 and chapters[0].boundary > len(contents)
    start, end = (f"*** {word} OF THE PROJECT GUTENBERG EBOOK X ***" for word in ("START", "END"))
    framed = f"CHAPTER 0\n\n{made_text(600)}\n\n{start}\n\n{text}\n\n{end}\n\nCHAPTER 7\n\n{made_text(600)}"
    chapters = find_chapters(framed)
    assert begins(framed, chapters) == SIX and chapters[-1].end == framed.index(end)


@pytest.mark.shared
def test_found_chapters_are_those_of_the_index(shared_dir: Any) -> None:
    lines = (shared_dir / "data" / "books" / "index.jsonl").read_text(encoding="utf-8").splitlines()
    index = {record["member"]: record["headings"] for record in map(json.loads, lines)}
    right = given = found = 0
    for document in read_documents([shared_dir / "data" / "books" / "test.tar.xz"]):
        headings = [Heading(start, start + len(words)) for start, _, words in index[document.id]]
        true = {chapter.boundary for chapter in chapters_of(document.text, headings)}
        mine = {chapter.boundary for chapter in find_chapters(document.text)}
        right, given, found = right + len(true & mine), given + len(true), found + len(mine)
    assert right > 0.97 * given and right > 0.99 * found


# examples


def words(count: int, seed: int, tag: str) -> str:
    """Sentences that no other chapter has."""
    return " ".join(f"{tag}{seed}w{number}{'.' if number % 7 == 6 else ''}" for number in range(count))


def book(chapters: int, tag: str = "a", heading: str = "CHAPTER {}") -> str:
    return "\n\n".join(f"{heading.format(n + 1)}\n\n{words(400, n, tag)}" for n in range(chapters)) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "long.txt").write_text(book(12))
    (tmp_path / "books" / "other.md").write_text(book(10, "b", "## Title {}"))
    (tmp_path / "books" / "short.txt").write_text(book(5, "c"))
    (tmp_path / "books" / "twice.jsonl").write_text(json.dumps({"text": book(12)}))
    return tmp_path / "books"


def test_examples_have_the_official_shape_and_gold_suffixes_follow_their_prefix(folder: Path, tmp_path: Path) -> None:
    works, books = build_chapterbreak([folder], SMALL)
    assert {name: len(examples) for name, examples in works.items()} == {"long.txt": 3, "other.md": 3}
    text = (folder / "long.txt").read_text()
    openings = [" ".join(words(400, number, "a").split()[:30]) for number in range(12)]  # no suffix tells its number
    for example in works["long.txt"]:
        assert set(example) == {"ctx", "pos", "negs"} and 2950 < len(example["ctx"]) <= 3000
        number = openings.index(example["pos"])
        assert text[text.index(example["ctx"]) + len(example["ctx"]) :].startswith(f"\n\nCHAPTER {number + 1}\n")
        assert len({openings.index(negative) for negative in example["negs"]} - {number}) == 5
        assert not any(negative in example["ctx"] for negative in example["negs"])
    skipped = {book["id"]: book["skipped"] for book in books if book["skipped"]}
    assert skipped == {
        "short.txt": "5 chapters of 2,000 characters; 6 are needed", "twice.jsonl:1": "the same text as long.txt"
    }  # fmt: skip
    # of equal seeds, whatever is beside
    assert build_chapterbreak([folder / "long.txt"], SMALL)[0]["long.txt"] == works["long.txt"]
    assert build_chapterbreak([folder], replace(SMALL, seed=1))[0] != works


def test_headings_of_an_index_beside_an_archive_are_used(tmp_path: Path) -> None:
    text = book(9, heading="the night of {}")  # nothing that could be found
    (tmp_path / "one.txt").write_text(text)
    with tarfile.open(tmp_path / "books.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "one.txt", "test/one.txt")
    (tmp_path / "one.txt").unlink()
    headings = [[found.start(), 1, found.group()] for found in re.finditer(r"the night of \d", text)]
    headings[0][2] = headings[0][2].replace(" ", "\u2028", 1)  # no line ends there
    record = {"id": "one", "sha256": hashlib.sha256(text.encode()).hexdigest(), "headings": headings}
    with pytest.raises(DataError, match=r"test/one\.txt: 0 chapters"):
        build_chapterbreak([tmp_path / "books.tar.xz"], SMALL)
    (tmp_path / "index.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    _, (made,) = build_chapterbreak([tmp_path], SMALL)
    assert (made["id"], made["headings"], made["chapters"]) == ("test/one.txt", "index", 9)


def test_the_script_writes_and_names_what_cannot_be_used(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(folder), "--out", str(tmp_path / "out"), "--prefix", "500", "--words", "30", "--per-book", "2"]
    main(arguments, standalone_mode=False)
    said = capsys.readouterr()
    assert said.out.strip().endswith("chapterbreak_ctx_500.json: 4 examples of 2 books (2 left out)")
    assert "left out: short.txt: 5 chapters" in said.err
    splits = json.loads((tmp_path / "out" / "chapterbreak_ctx_500.json").read_text())
    assert splits == {"books": build_chapterbreak([folder], replace(SMALL, per_book=2))[0]}
    assert len(json.loads((tmp_path / "out" / "sources.json").read_text())["books"]) == 4
