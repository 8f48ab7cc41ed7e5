"""Chapters found in plain text, and text between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from recipes.data.chapterbreak import Chapter, Heading, chapters_of, find_chapters

MakeText = Callable[..., str]


def book(headings: list[str], made_text: MakeText, words: int = 600) -> str:
    return "\n\n".join(f"{heading}\n\n{made_text(words, seed)}" for seed, heading in enumerate(headings))


def begins(text: str, chapters: list[Chapter]) -> list[str]:
    """The first line of each chapter's headings."""
    return [text[chapter.boundary :].split("\n")[0] for chapter in chapters]


@pytest.mark.parametrize(
    "headings",
    [
        ["CHAPTER I", "CHAPTER II.", "CHAPTER III - IN WHICH WE DINE", "CHAPTER IV", "Chapter V: Home", "CHAPTER VI"],
        ["Chapter One", "Chapter Two", "Chapter Three", "Chapter the Fourth", "CHAPTER TWENTY-ONE", "Epilogue"],
        ["# Begin", "## The Road", "## The Inn", "## Snow", "## A Letter", "# End"],
        ["I", "II", "III", "IV", "V", "VI"],
        ["I. THE LETTER", "II. The _Boat_", "III. Fog", "IV. Sand", "V. Wreck", "VI. Shore"],
        ["Prologue", "Stave One", "Stave Two", "Stave Three", "Letter 4", "PART THE SECOND"],
    ],
)
def test_headings_of_many_forms_are_found(headings: list[str], made_text: MakeText) -> None:
    text = book(headings, made_text)
    found = find_chapters(text)
    assert begins(text, found) == headings
    assert [chapter.end for chapter in found] == [*(chapter.boundary for chapter in found[1:]), len(text)]


def test_numbers_head_chapters_but_not_pages(made_text: MakeText) -> None:
    chapters = book([str(number) for number in range(1, 8)], made_text, words=1200)
    assert begins(chapters, find_chapters(chapters)) == list("1234567")
    pages = book([str(number) for number in range(1, 30)], made_text, words=450)
    assert find_chapters(pages) == []


def test_sentences_that_speak_of_chapters_are_no_headings(made_text: MakeText) -> None:
    headings = [f"CHAPTER {number}" for number in range(1, 7)]
    text = book(headings, made_text).replace("\n\nCHAPTER 3", "\n\nChapter two was burnt by her aunt.\n\nCHAPTER 3")
    assert begins(text, find_chapters(text)) == headings


def test_a_table_of_contents_has_no_chapters(made_text: MakeText) -> None:
    headings = [f"CHAPTER {number}" for number in range(1, 7)]
    contents = "\n\n".join(headings)
    text = f"{contents}\n\n{'-' * 300}\n\n{book(headings, made_text)}"
    chapters = find_chapters(text)
    assert begins(text, chapters) == headings
    assert chapters[0].boundary > len(contents)


def test_the_frame_of_project_gutenberg_is_no_part_of_the_book(made_text: MakeText) -> None:
    inside = book([f"CHAPTER {number}" for number in range(1, 7)], made_text)
    start, end = "*** START OF THE PROJECT GUTENBERG EBOOK X ***", "*** END OF THE PROJECT GUTENBERG EBOOK X ***"
    text = f"CHAPTER 0\n\n{made_text(600)}\n\n{start}\n\n{inside}\n\n{end}\n\nCHAPTER 7\n\n{made_text(600)}"
    chapters = find_chapters(text)
    assert begins(text, chapters) == [f"CHAPTER {number}" for number in range(1, 7)]
    assert chapters[-1].end == text.index(end)


def test_parts_titles_and_subtitles_belong_to_the_boundary() -> None:
    body = "It was late when they came. " * 100
    text = f"{body}\n\nPART II\n\nCHAPTER III\n\nTHE RETURN.\n\nIn which nothing happens\n\n{body}"
    headings = [Heading(at := text.index(words), at + len(words)) for words in ("PART II", "CHAPTER III")]
    (chapter,) = chapters_of(text, headings)
    assert text[chapter.boundary :].startswith("PART II")
    assert text[chapter.body :].startswith("It was late")


def test_a_chapter_needs_enough_text() -> None:
    text = "".join(f"CHAPTER {number}\n\n{'x' * size}\n\n" for number, size in enumerate((300, 1990, 2100)))
    headings = [Heading(at := text.index(f"CHAPTER {number}"), at + 9) for number in range(3)]
    assert begins(text, chapters_of(text, headings)) == ["CHAPTER 2"]
    assert begins(text, chapters_of(text, headings, minimum=250)) == ["CHAPTER 0", "CHAPTER 1", "CHAPTER 2"]
    assert chapters_of(text, []) == []


@pytest.mark.shared
def test_found_chapters_are_those_of_the_index(shared_dir: Any) -> None:
    import json

    from longmem.data.text import read_documents

    lines = (shared_dir / "data" / "books" / "index.jsonl").read_text(encoding="utf-8").splitlines()
    index = {record["member"]: record["headings"] for record in map(json.loads, lines)}
    right = given = found = 0
    for document in read_documents([shared_dir / "data" / "books" / "test.tar.xz"]):
        headings = [Heading(start, start + len(words)) for start, _, words in index[document.id]]
        true = {chapter.boundary for chapter in chapters_of(document.text, headings)}
        mine = {chapter.boundary for chapter in find_chapters(document.text)}
        right, given, found = right + len(true & mine), given + len(true), found + len(mine)
    assert right > 0.97 * given
    assert right > 0.99 * found
