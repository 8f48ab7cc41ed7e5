"""Reader of ChapterBreak's files (Sun, Thai and Iyyer 2022): the official ones, or of ``longmem data chapterbreak``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longmem.errors import ConfigError, DataError

NAME = re.compile(r"_ctx_(\d+)\.json$")


@dataclass(frozen=True)
class Item:
    """One chapter boundary.

    Attributes:
        split: ``pg19``, ``ao3``, or what a file made here calls its books.
        work: the work's id.
        number: among the examples of its work.
        context: the text before the boundary.
        options: six beginnings of chapters; the first is the true one.
    """

    split: str
    work: str
    number: int
    context: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class ChapterBreakFile:
    """A file and what is in it; ``prefix``: tokens of its prefixes, by its name, None if that does not say."""

    name: str
    prefix: int | None
    sha256: str
    items: list[Item] = field(repr=False)


def read_chapterbreak(path: str | Path) -> ChapterBreakFile:
    """Read ``chapterbreak_ctx_<N>.json``: split -> work -> examples, each with ``ctx``, ``pos`` and ``negs``.

    Raises:
        DataError: no such file, or something in it is not of that form; says what and where.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        splits = json.loads(raw)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; name a chapterbreak_ctx_<N>.json file") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); name a chapterbreak_ctx_<N>.json file") from error
    items = [
        _item(path, split, work, number, example)
        for split, works in _object(path, "the file", splits).items()
        for work, examples in _object(path, split, works).items()
        for number, example in enumerate(_list(path, f"{split}, work {work}", examples))
    ]
    if not items:
        raise DataError(f"{path}: no examples in it; make some with longmem data chapterbreak")
    length = NAME.search(path.name)
    return ChapterBreakFile(
        path.name, None if length is None else int(length[1]), hashlib.sha256(raw).hexdigest(), items
    )


def files_for(files: Sequence[ChapterBreakFile], prefix: int) -> list[ChapterBreakFile]:
    """Those whose prefixes are long enough, the shortest of them, all of a length together; and those that do not say.

    Raises:
        ConfigError: none is long enough.
    """
    lengths = {file.prefix for file in files if file.prefix is not None}
    shortest = min((length for length in lengths if length >= prefix), default=None)
    found = [file for file in files if file.prefix in (None, shortest)]
    if not found:
        longest = max(lengths)
        raise ConfigError(
            f"--prefix {prefix} is longer than the prefixes of the files ({longest} tokens, by their names); "
            "give a file with longer ones, or a smaller --prefix"
        )
    return found


def _item(path: Path, split: str, work: str, number: int, example: Any) -> Item:
    where = f"{split}, work {work}, example {number + 1}"
    found = _object(path, where, example)
    context, gold, negatives = found.get("ctx"), found.get("pos"), found.get("negs")
    negatives = negatives if isinstance(negatives, list) else []
    texts = [context, gold, *(negatives or [None])]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(
            f"{path}: {where} must have the texts ctx and pos and a list negs of texts, none of them empty (it has: "
            f"{', '.join(found)}); fetch or make the file again"
        )
    return Item(split, work, number, str(context), (str(gold), *map(str, negatives)))


def _object(path: Path, where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{path}: {where} is a {type(value).__name__}, not an object; a file is "
            '{split: {work: [{"ctx", "pos", "negs"}, ...]}}'
        )
    return value


def _list(path: Path, where: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{path}: {where} is a {type(value).__name__}, not a list of examples; fetch or make it again")
    return value
