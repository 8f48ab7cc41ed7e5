"""A benchmark of the shape of ChapterBreak (Sun, Thai and Iyyer 2022) from books: which beginning is the next one?"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from longmem.data.chapters import Chapter, Heading, chapters_of, find_chapters
from longmem.data.text import ARCHIVES, TEXT_SUFFIXES, Document, expand, read_documents
from longmem.errors import ConfigError, DataError
from longmem.files import write_whole

INDEX = "index.jsonl"
NEGATIVES = 5
CHARACTERS = 6  # of a prefix for each token wanted: more than a token of any tokenizer of English has on average
SHINGLE = 5  # words; two beginnings that share half of their shingles are the same


@dataclass(frozen=True)
class ChapterBreakSettings:
    """What the examples depend on, beside the books.

    Attributes:
        split: the key of the books in the file, where the official files have ``pg19`` and ``ao3``.
        prefix: tokens that a prefix is long enough for; prefixes have 6 characters for each.
        words: of the gold suffix and of each negative.
        minimum: characters of text between a chapter's heading and the next heading.
        per_book: examples taken of one book, at most.
        seed: of the choice of chapters, negatives and their order.
    """

    split: str = "books"
    prefix: int = 8192
    words: int = 150
    minimum: int = 2000
    per_book: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [
            f"{name} ({value}) must be at least 1; leave it out for the default"
            for name, value in asdict(self).items()
            if name not in ("split", "seed") and value < 1
        ]
        if not self.split:
            wrong.append("the split needs a name; try books")
        if wrong:
            raise ConfigError(wrong)


@dataclass(frozen=True)
class Book:
    """A book and what became of it.

    Attributes:
        headings: ``index`` where they were given beside the text, ``found`` where they were looked for in it.
        chapters: with enough text.
        examples: made of it.
        skipped: why there is none.
    """

    id: str
    sha256: str
    headings: str
    chapters: int
    examples: int
    skipped: str | None = None


@dataclass(frozen=True)
class ChapterBreakData:
    """``works``: work -> examples, each with ``ctx``, ``pos`` and ``negs``; ``books``: every book that was read."""

    settings: ChapterBreakSettings
    works: dict[str, list[dict[str, Any]]]
    books: list[Book] = field(default_factory=list)


def build_chapterbreak(paths: Iterable[str | Path], settings: ChapterBreakSettings | None = None) -> ChapterBreakData:
    """Examples from the chapter boundaries of books.

    A prefix ends before the heading, a suffix begins behind it, so no chapter number tells the answer. Negatives begin
    other chapters of the same book, none of them in the prefix, none like the gold suffix or one another.

    Args:
        paths: files, folders, archives or JSON lines of books. Where an ``index.jsonl`` with headings lies beside them,
            and the text is the one it speaks of (by its sha256), its headings are used.
        settings: default if None.

    Raises:
        DataError: a path is missing or holds no text, or no book gives an example.
    """
    settings = settings or ChapterBreakSettings()
    works: dict[str, list[dict[str, Any]]] = {}
    books: list[Book] = []
    seen: dict[str, str] = {}
    for book, headings in _books(paths):
        sha = hashlib.sha256(book.text.encode()).hexdigest()
        where = "found" if headings is None else "index"
        if headings is None:
            chapters = find_chapters(book.text, settings.minimum)
        else:
            chapters = chapters_of(book.text, headings, settings.minimum)
        examples, reason = _examples(book, chapters, settings)
        if sha in seen:
            examples, reason = [], f"the same text as {seen[sha]}"
        seen.setdefault(sha, book.id)
        work = _unused(book.id, works)
        if examples:
            works[work] = examples
        books.append(Book(work, sha, where, len(chapters), len(examples), reason))
    if not works:
        reasons = "; ".join(f"{book.id}: {book.skipped}" for book in books[:3])
        raise DataError(f"no book gives an example ({reasons}); bring longer books, or pass a smaller --prefix")
    return ChapterBreakData(settings, works, books)


def write_chapterbreak(made: ChapterBreakData, out: Path) -> tuple[Path, Path]:
    """``chapterbreak_ctx_<N>.json``, as the official files, and ``sources.json``, which says what it was made from."""
    data, sources = out / f"chapterbreak_ctx_{made.settings.prefix}.json", out / "sources.json"
    write_whole(data, [json.dumps({made.settings.split: made.works}, ensure_ascii=False, indent=0), "\n"])
    said = {"settings": asdict(made.settings), "books": [asdict(book) for book in made.books]}
    write_whole(sources, [json.dumps(said, ensure_ascii=False, indent=1), "\n"])
    return data, sources


def _examples(
    book: Document, chapters: Sequence[Chapter], settings: ChapterBreakSettings
) -> tuple[list[dict[str, Any]], str | None]:
    """Examples in the order of the book, or why there are none."""
    if len(chapters) <= NEGATIVES:
        return [], f"{len(chapters)} chapters of {settings.minimum:,} characters; {NEGATIVES + 1} are needed"
    needed = settings.prefix * CHARACTERS
    far = [number for number, chapter in enumerate(chapters) if number and chapter.boundary >= needed]
    if not far:
        return [], f"no chapter begins after {needed:,} characters, the length of a prefix"
    # of the book and its name alone: another book beside it changes nothing
    draw = random.Random(f"{settings.seed} {book.id}")
    openings = [_opening(book.text, chapter, settings.words) for chapter in chapters]
    found: list[tuple[int, dict[str, Any]]] = []
    for number in draw.sample(far, len(far)):
        if len(found) == settings.per_book:
            break
        boundary = chapters[number].boundary
        away = [
            other
            for other, chapter in enumerate(chapters)
            if other != number and not boundary - needed <= chapter.body < boundary
        ]
        negatives = _different(openings[number], [openings[other] for other in draw.sample(away, len(away))])
        if len(negatives) == NEGATIVES:
            context = book.text[boundary - needed : boundary].rstrip()
            found.append((number, {"ctx": context, "pos": openings[number], "negs": negatives}))
    if not found:
        return [], f"no chapter with {NEGATIVES} others that begin outside of its prefix of {needed:,} characters"
    return [example for _, example in sorted(found, key=lambda pair: pair[0])], None


def _opening(text: str, chapter: Chapter, words: int) -> str:
    """The first words of a chapter, as they stand."""
    end = chapter.body
    for _, found in zip(range(words), re.finditer(r"\S+", text[chapter.body : chapter.end]), strict=False):
        end = chapter.body + found.end()
    return text[chapter.body : end]


def _different(gold: str, others: Iterable[str]) -> list[str]:
    """The first five that are like neither the gold suffix nor one another."""
    kept: list[str] = []
    known = [_shingles(gold)]
    for other in others:
        shingles = _shingles(other)
        if all(2 * len(shingles & before) <= min(len(shingles), len(before)) for before in known):
            kept.append(other)
            known.append(shingles)
        if len(kept) == NEGATIVES:
            break
    return kept


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[at : at + SHINGLE]) for at in range(max(1, len(words) - SHINGLE + 1))}


def _unused(name: str, names: Iterable[str]) -> str:
    """The name, or with a number behind it where another work has it."""
    taken, number = set(names), 2
    plain = name
    while name in taken:
        name, number = f"{plain} ({number})", number + 1
    return name


# where books come from, and the headings that are given beside them


def _books(paths: Iterable[str | Path]) -> Iterator[tuple[Document, list[Heading] | None]]:
    for path in map(Path, expand([str(path) for path in paths])):
        files = [path] if not path.is_dir() else _files(path)
        if not files:
            raise DataError(f"{path}: no books in this folder; looked for text files, .jsonl and tar archives")
        for file in files:
            index = _index(file.parent, path)
            for document in read_documents([file]):
                name = file.relative_to(path).as_posix() if file != path and document.id == file.name else document.id
                book = Document(name, document.text, document.source)
                yield book, _given(book, index)


def _files(folder: Path) -> list[Path]:
    """Texts, archives and JSON lines below a folder; an index is none of them."""
    kinds = (*TEXT_SUFFIXES, *ARCHIVES, ".jsonl")
    found = (file for file in folder.rglob("*") if file.is_file() and file.name.endswith(kinds) and file.name != INDEX)
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def _index(folder: Path, top: Path) -> dict[str, list[Heading]]:
    """sha256 of a text -> its headings, of the index beside a file, or in a folder above up to ``top``."""
    for place in (folder, *folder.parents):
        if (place / INDEX).is_file():
            return _read_index(place / INDEX)
        if place == top or not top.is_dir():
            break
    return {}


def _read_index(file: Path) -> dict[str, list[Heading]]:
    found: dict[str, list[Heading]] = {}
    # only \n ends a line: headings may hold other signs that str.splitlines would take for one
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            found[record["sha256"]] = [Heading(start, start + len(words)) for start, _, words in record["headings"]]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{file}, line {number}: no headings ({type(error).__name__}: {error}); a line needs sha256 "
                "and headings ([offset, level, heading]); mend it, or move the file away to have headings found"
            ) from error
    return found


def _given(book: Document, index: dict[str, list[Heading]]) -> list[Heading] | None:
    return index.get(hashlib.sha256(book.text.encode()).hexdigest()) if index else None
