"""A benchmark of the shape of ChapterBreak (Sun, Thai and Iyyer 2022) from books: which beginning is the next one?

Usage: python recipes/data/chapterbreak.py BOOKS... --out data/chapterbreak [--prefix 8192]

Writes chapterbreak_ctx_<N>.json, as the official files, for ``longmem eval chapterbreak``, and sources.json, which says
what became of each book. An example is the text before a chapter boundary, the beginning of the next chapter, and five
beginnings of other chapters of the same book, none of which the prefix contains. Headings come from an index.jsonl
beside the books if there is one, else they are found in the text. A book without six chapters, or too short for a
prefix, is left out and named.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import click

from longmem.data.text import ARCHIVES, COMPRESSED, TEXT_SUFFIXES, Document, expand, read_documents
from longmem.errors import DataError, LongMemError
from longmem.files import write_whole

INDEX = "index.jsonl"
SPLIT = "books"  # the key in the file, where the official files have pg19 and ao3
NEGATIVES = 5
CHARACTERS = 6  # of a prefix for each token wanted: more than a token of any tokenizer of English has on average
SHINGLE = 5  # words; two beginnings that share half of their shingles are the same


@dataclass(frozen=True)
class ChapterBreakSettings:
    """What the examples depend on, beside the books.

    Attributes:
        prefix: tokens that a prefix is long enough for; prefixes have 6 characters for each.
        words: of the gold suffix and of each negative.
        minimum: characters of text between a chapter's heading and the next heading.
        per_book: examples taken of one book, at most.
        seed: of the choice of chapters, negatives and their order.
    """

    prefix: int = 8192
    words: int = 150
    minimum: int = 2000
    per_book: int = 8
    seed: int = 0


def build_chapterbreak(
    paths: Iterable[str | Path], settings: ChapterBreakSettings
) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """Examples from the chapter boundaries of books.

    A prefix ends before the heading, a suffix begins behind it, so no chapter number tells the answer. Negatives begin
    other chapters of the same book, none of them in the prefix, none like the gold suffix or one another.

    Args:
        paths: files, folders, archives or JSON lines of books. Where an ``index.jsonl`` with headings lies beside them,
            and the text is the one it speaks of (by its sha256), its headings are used.

    Returns:
        work -> examples, each with ``ctx``, ``pos`` and ``negs``; and what became of every book: whether its headings
        were in the ``index`` or ``found`` in the text, how many chapters are long enough, how many examples there are,
        and why there is none (``skipped``).

    Raises:
        DataError: a path is missing or holds no text, or no book gives an example.
    """
    works: dict[str, list[dict[str, Any]]] = {}
    books: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    for book, headings in _books(paths):
        sha = hashlib.sha256(book.text.encode()).hexdigest()
        if headings is None:
            chapters = find_chapters(book.text, settings.minimum)
        else:
            chapters = chapters_of(book.text, headings, settings.minimum)
        examples, reason = _examples(book, chapters, settings)
        if sha in seen:
            examples, reason = [], f"the same text as {seen[sha]}"
        seen.setdefault(sha, book.id)
        work, number = book.id, 2
        while work in works:  # another book has this name
            work, number = f"{book.id} ({number})", number + 1
        if examples:
            works[work] = examples
        about = {"headings": "found" if headings is None else "index", "chapters": len(chapters)}
        books.append({"id": work, "sha256": sha, **about, "examples": len(examples), "skipped": reason})
    if not works:
        reasons = "; ".join(f"{book['id']}: {book['skipped']}" for book in books[:3])
        raise DataError(f"no book gives an example ({reasons}); bring longer books, or pass a smaller --prefix")
    return works, books


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
    body = text[chapter.body : chapter.end]
    *_, last = [0, *(found.end() for found in islice(re.finditer(r"\S+", body), words))]
    return body[:last]


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


# where books come from, and the headings that are given beside them


def _books(paths: Iterable[str | Path]) -> Iterator[tuple[Document, list[Heading] | None]]:
    for path in map(Path, expand([str(path) for path in paths])):
        files = [path] if not path.is_dir() else _files(path)
        if not files:
            raise DataError(f"{path}: no books in this folder; looked for text files, .jsonl and tar archives")
        index: dict[str, list[Heading]] = {}  # by the sha256 of the text
        for beside in path.rglob(INDEX) if path.is_dir() else [path.parent / INDEX]:
            index |= _read_index(beside) if beside.is_file() else {}
        for file in files:
            for document in read_documents([file]):
                name = file.relative_to(path).as_posix() if file != path and document.id == file.name else document.id
                book = Document(name, document.text, document.source)
                yield book, index.get(hashlib.sha256(book.text.encode()).hexdigest())


def _files(folder: Path) -> list[Path]:
    """Texts, archives and JSON lines below a folder; an index is none of them."""
    kinds = (*TEXT_SUFFIXES, *ARCHIVES, *COMPRESSED, ".jsonl")
    found = (file for file in folder.rglob("*") if file.is_file() and file.name.endswith(kinds) and file.name != INDEX)
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts))


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


# chapters: headings found in plain text, or given, and the text that follows each

MINIMUM = 2000  # characters of text that make what follows a heading a chapter
ENOUGH = 6  # chapters, after which weaker kinds of heading are not looked for,
LONG = 40_000  # unless chapters have more characters than this: they may be the parts of the book
CHAIN = 200  # characters between two headings that belong together: a part's and its first chapter's
PAGES = 5000  # bare numbers that are closer than this are numbers of pages

UNITS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth last"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety twentieth thirtieth"
WORD = rf"(?:(?:{'|'.join(TENS.split())})(?:[- ](?:{'|'.join(UNITS.split())}))?|{'|'.join(UNITS.split())})"
ROMAN = r"(?=[IVXLC])(?:C{0,3})(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})"
KINDS = "chapter|book|part|phase|volume|letter|canto|stave|section|act"
ALONE = "prologue|epilogue|introduction|preface|prelude|interlude|conclusion|postscript|foreword|afterword"

# a number in the text of a sentence is followed by a small letter: "Chapter ten was burnt" is no heading
NAMED = re.compile(rf"(?:{KINDS})\.? +(?:the +)?(?:{ROMAN}|\d+|{WORD})\b(?! +(?-i:[a-z]))", re.IGNORECASE)
SINGLE = re.compile(rf"(?:{ALONE})\b[^a-z]*(?: [^a-z].*)?", re.IGNORECASE)
MARKED = re.compile(r"#{1,6} +\S")
ROMAN_NUMBER = re.compile(rf"({ROMAN})(?:[.:)]|(?=$)|(?= +[-–—]))")
NUMBER = re.compile(r"(\d{1,3})(?:[.:)]|(?=$)|(?= +[-–—A-Z]))")
PARAGRAPH = re.compile(r"[^\n]+(?:\n[ \t]*[^\s][^\n]*)*")
GUTENBERG = re.compile(r"^\*\*\* ?(START|END) OF (?:THE|THIS) PROJECT GUTENBERG[^\n]*$", re.MULTILINE)


@dataclass(frozen=True)
class Heading:
    """Where a heading starts and ends, in characters."""

    start: int
    end: int


@dataclass(frozen=True)
class Chapter:
    """A chapter's place in the text, in characters.

    Attributes:
        boundary: where its headings start; all text before is of the chapters before.
        body: where its text starts, behind headings and a subtitle.
        end: where the next heading starts.
    """

    boundary: int
    body: int
    end: int


def find_chapters(text: str, minimum: int = MINIMUM) -> list[Chapter]:
    """Chapters by the headings found in plain text.

    Looked for, until there are six chapters, and one for every 40,000 characters: ``CHAPTER IV``, ``Book the First``,
    ``Prologue``, Markdown's ``## Title``; then Roman numerals; then Arabic numbers, unless they follow so closely that
    they number pages; and where there are not six chapters by then, lines of capitals.
    Numbers without a word must count up, or begin again at 1.

    Project Gutenberg's own header and footer are left out.
    """
    first, last = _own_text(text)
    paragraphs = [
        (found.start(), found.group().rstrip())
        for found in PARAGRAPH.finditer(text, first, last)
        if len(found.group()) < 200
    ]
    headings: list[Heading] = []
    chapters: list[Chapter] = []
    for kind in (_named, _roman, _numbered, _capitals):
        if kind is _capitals and len(chapters) >= ENOUGH:
            break  # capitals stand in letters and on signs too
        headings = sorted({*headings, *kind(paragraphs)}, key=lambda heading: heading.start)
        chapters = chapters_of(text, headings, minimum, last)
        if len(chapters) >= max(ENOUGH, (last - first) / LONG):
            break
    return chapters


def chapters_of(
    text: str, headings: Sequence[Heading], minimum: int = MINIMUM, last: int | None = None
) -> list[Chapter]:
    """The headings with enough text behind them; headings just before one of them are part of it.

    Args:
        headings: in the order of the text.
        minimum: characters of text before the next heading.
        last: where the text ends.
    """
    chapters: list[Chapter] = []
    boundary, before = 0, None
    last = len(text) if last is None else last
    for number, heading in enumerate(headings):
        if before is None or heading.start - before.end > CHAIN:
            boundary = heading.start
        end = headings[number + 1].start if number + 1 < len(headings) else last
        if end - heading.end >= minimum:
            chapters.append(Chapter(boundary, _behind_subtitle(text, heading.end, end), end))
        before = heading
    return chapters


def _own_text(text: str) -> tuple[int, int]:
    """Where the book itself starts and ends in a file of Project Gutenberg."""
    first, last = 0, len(text)
    for found in GUTENBERG.finditer(text):
        if found[1] == "START":
            first = found.end()
        else:
            last = min(last, found.start())
    return first, last


def _behind_subtitle(text: str, start: int, end: int) -> int:
    """Where the text begins: short first paragraphs in capitals, or without a stop at their end, are subtitles."""
    for found in PARAGRAPH.finditer(text, start, end):
        words = found.group().strip().strip("_*")
        if len(words) >= 100 or not (words.isupper() or words[-1:] not in ".!?\"”’':;,-—"):
            return found.start() + len(found.group()) - len(found.group().lstrip())
    return start


Paragraphs = Sequence[tuple[int, str]]


def _named(paragraphs: Paragraphs) -> Iterator[Heading]:
    for start, words in paragraphs:
        begins = words.lstrip("_*[ ")
        single = len(words) < 80 and SINGLE.fullmatch(words.strip("_*[] "))
        if single or (words.count("\n") < 3 and (MARKED.match(begins) or NAMED.match(begins))):
            yield Heading(start, start + len(words))


def _roman(paragraphs: Paragraphs) -> list[Heading]:
    return _counting(paragraphs, ROMAN_NUMBER, _value)


def _numbered(paragraphs: Paragraphs) -> list[Heading]:
    headings = _counting(paragraphs, NUMBER, int)
    gaps = [after.start - before.end for before, after in pairwise(headings)]
    return headings if gaps and statistics.median(gaps) >= PAGES else []


def _capitals(paragraphs: Paragraphs) -> Iterator[Heading]:
    for start, words in paragraphs:
        if words.isupper() and 3 < len(words) < 80 and "\n" not in words and words[-1] not in "!?,;:":
            yield Heading(start, start + len(words))


def _counting(paragraphs: Paragraphs, number: re.Pattern[str], value: Callable[[str], int]) -> list[Heading]:
    """Short paragraphs that begin with numbers which go on (one or two may be missing) or begin again at 1."""
    kept: list[Heading] = []
    last = 0
    for start, words in paragraphs:
        match = number.match(words.lstrip("_*[ "))
        now = value(match[1]) if match and len(words) < 120 else 0
        if now == 1 or (last and 0 < now - last <= 3):
            kept.append(Heading(start, start + len(words)))
            last = now
    return kept


def _value(roman: str) -> int:
    digits = [{"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}[sign] for sign in roman]
    return sum(-digit if digit < after else digit for digit, after in zip(digits, [*digits[1:], 0], strict=True))


@click.command(help=__doc__)
@click.argument("books", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the two files.")
@click.option("--prefix", default=8192, type=click.IntRange(1), help="Tokens that prefixes are long enough for.")
@click.option("--words", default=150, type=click.IntRange(1), help="Of every suffix.")
@click.option("--min-chapter", "minimum", default=MINIMUM, type=click.IntRange(1), help="Characters of its text.")
@click.option("--per-book", default=8, type=click.IntRange(1), help="Examples of one book, at most.")
@click.option("--seed", default=0, help="Of the choice of boundaries and negatives.")
def main(books: Sequence[str], out: Path, **given: int) -> None:
    settings = ChapterBreakSettings(**given)
    try:
        works, made = build_chapterbreak(books, settings)
    except LongMemError as error:
        sys.exit(f"error: {error}")
    data = out / f"chapterbreak_ctx_{settings.prefix}.json"
    write_whole(data, [json.dumps({SPLIT: works}, ensure_ascii=False, indent=0), "\n"])
    sources = {"settings": asdict(settings), "books": made}
    write_whole(out / "sources.json", [json.dumps(sources, ensure_ascii=False, indent=1), "\n"])
    for book in made:
        if book["skipped"]:
            click.echo(f"left out: {book['id']}: {book['skipped']}", err=True)
    examples = sum(book["examples"] for book in made)
    print(f"{data}: {examples} examples of {len(works)} books ({len(made) - len(works)} left out)")


if __name__ == "__main__":
    main()
