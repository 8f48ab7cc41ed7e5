"""Chapters of a book: headings found in plain text, or given, and the text that follows each."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

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

    Args:
        text: of a whole book; Project Gutenberg's own header and footer are left out.
        minimum: characters of text between a chapter's heading and the next heading.
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
    found = []
    for start, words in paragraphs:
        match = ROMAN_NUMBER.match(words.lstrip("_*[ "))
        if match and len(words) < 120:
            found.append((_value(match[1]), Heading(start, start + len(words))))
    return _counting(found)


def _numbered(paragraphs: Paragraphs) -> list[Heading]:
    found = []
    for start, words in paragraphs:
        match = NUMBER.match(words.lstrip("_*[ "))
        if match and len(words) < 120:
            found.append((int(match[1]), Heading(start, start + len(words))))
    headings = _counting(found)
    gaps = [after.start - before.end for before, after in pairwise(headings)]
    return headings if gaps and statistics.median(gaps) >= PAGES else []


def _capitals(paragraphs: Paragraphs) -> Iterator[Heading]:
    for start, words in paragraphs:
        if words.isupper() and 3 < len(words) < 80 and "\n" not in words and words[-1] not in "!?,;:":
            yield Heading(start, start + len(words))


def _counting(found: Sequence[tuple[int, Heading]]) -> list[Heading]:
    """Those whose numbers go on (one or two may be missing) or begin again at 1."""
    kept: list[Heading] = []
    last = 0
    for number, heading in found:
        if number == 1 or (last and 0 < number - last <= 3):
            kept.append(heading)
            last = number
    return kept


def _value(roman: str) -> int:
    digits = [{"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}[sign] for sign in roman]
    return sum(-digit if digit < after else digit for digit, after in zip(digits, [*digits[1:], 0], strict=True))
