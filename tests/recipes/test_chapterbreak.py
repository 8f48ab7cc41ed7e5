"""The benchmark of chapter boundaries made from books."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tarfile
from pathlib import Path

import pytest
from recipes.data.chapterbreak import ChapterBreakSettings, build_chapterbreak, main, write_chapterbreak

from longmem.errors import ConfigError, DataError

SMALL = ChapterBreakSettings(prefix=500, words=30, per_book=3)


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
    return tmp_path / "books"


def test_examples_have_the_official_shape(folder: Path, tmp_path: Path) -> None:
    made = build_chapterbreak([folder], SMALL)
    data, sources = write_chapterbreak(made, tmp_path / "out")
    assert data.name == "chapterbreak_ctx_500.json"
    splits = json.loads(data.read_text())
    assert list(splits) == ["books"]
    assert set(splits["books"]) == {"long.txt", "other.md"}
    for examples in splits["books"].values():
        assert 0 < len(examples) <= 3
        for example in examples:
            assert set(example) == {"ctx", "pos", "negs"}
            assert len(example["negs"]) == 5
            assert [len(text.split()) for text in (example["pos"], *example["negs"])] == [30] * 6
    said = json.loads(sources.read_text())
    assert [(b["id"], b["skipped"]) for b in said["books"] if b["skipped"]] == [
        ("short.txt", "5 chapters of 2,000 characters; 6 are needed")
    ]
    assert said["settings"]["seed"] == 0


def test_the_gold_suffix_follows_the_prefix_and_negatives_begin_other_chapters(folder: Path) -> None:
    text = (folder / "long.txt").read_text()
    openings = [" ".join(words(400, number, "a").split()[:30]) for number in range(12)]
    for example in build_chapterbreak([folder / "long.txt"], SMALL).works["long.txt"]:
        number = openings.index(example["pos"])
        assert 2950 < len(example["ctx"]) <= 3000
        assert text[text.index(example["ctx"]) + len(example["ctx"]) :].startswith(f"\n\nCHAPTER {number + 1}\n")
        assert len({openings.index(negative) for negative in example["negs"]} - {number}) == 5
        assert not any(negative in example["ctx"] for negative in example["negs"])


def test_no_suffix_tells_its_number(folder: Path) -> None:
    for examples in build_chapterbreak([folder], SMALL).works.values():
        for example in examples:
            assert not any(re.search("CHAPTER|##", text) for text in (example["pos"], *example["negs"]))


def test_equal_seeds_make_equal_files_whatever_stands_beside(folder: Path) -> None:
    whole, alone = build_chapterbreak([folder], SMALL), build_chapterbreak([folder / "long.txt"], SMALL)
    assert whole.works["long.txt"] == alone.works["long.txt"]
    other = build_chapterbreak([folder], ChapterBreakSettings(prefix=500, words=30, per_book=3, seed=1))
    assert other.works != whole.works


def test_chapters_that_begin_alike_are_not_held_against_each_other(tmp_path: Path) -> None:
    same = words(60, 99, "z")
    parts = [f"CHAPTER {n + 1}\n\n{same if n % 2 else ''} {words(400, n, 'a')}" for n in range(14)]
    (tmp_path / "twin.txt").write_text("\n\n".join(parts))
    made = build_chapterbreak([tmp_path / "twin.txt"], ChapterBreakSettings(prefix=500, words=30, per_book=14))
    for example in made.works["twin.txt"]:
        assert sum(text.startswith("z99w0") for text in (example["pos"], *example["negs"])) <= 1


def test_a_book_that_comes_twice_counts_once(folder: Path) -> None:
    (folder / "again.txt").write_text((folder / "long.txt").read_text())
    made = build_chapterbreak([folder], SMALL)
    assert {"again.txt", "other.md"} == set(made.works)
    assert [b.skipped for b in made.books if b.id == "long.txt"] == ["the same text as again.txt"]


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
    made = build_chapterbreak([tmp_path], SMALL)
    assert [(b.id, b.headings, b.chapters) for b in made.books] == [("test/one.txt", "index", 9)]
    (tmp_path / "index.jsonl").write_text('{"id": "one"}\n')
    with pytest.raises(DataError, match=r"index\.jsonl, line 1: no headings"):
        build_chapterbreak([tmp_path], SMALL)


def test_books_come_as_json_lines_too(tmp_path: Path) -> None:
    lines = [json.dumps({"id": name, "text": book(9, name)}) for name in ("x", "y")]
    (tmp_path / "books.jsonl").write_text("\n".join(lines))
    assert set(build_chapterbreak([tmp_path / "books.jsonl"], SMALL).works) == {"x", "y"}


def test_what_cannot_be_used_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no chapter begins after 60,000 characters"):
        build_chapterbreak([folder / "long.txt"], ChapterBreakSettings(prefix=10_000))
    with pytest.raises(DataError, match="no books in this folder"):
        build_chapterbreak([(tmp_path / "empty").mkdir() or tmp_path / "empty"])
    with pytest.raises(ConfigError, match=r"words \(0\) must be at least 1.*per_book \(0\)"):
        ChapterBreakSettings(words=0, per_book=0)


def test_the_script_writes_and_names_what_it_left_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(folder), "--out", str(tmp_path / "out"), "--prefix", "500", "--words", "30", "--per-book", "2"]
    monkeypatch.setattr(sys, "argv", ["chapterbreak.py", *arguments])
    main()
    said = capsys.readouterr()
    assert said.out.strip().endswith("chapterbreak_ctx_500.json: 4 examples of 2 books (1 left out)")
    assert "left out: short.txt: 5 chapters" in said.err
    monkeypatch.setattr(sys, "argv", ["chapterbreak.py", *arguments, "--words", "0"])
    with pytest.raises(SystemExit, match="error: words \\(0\\) must be at least 1"):
        main()
