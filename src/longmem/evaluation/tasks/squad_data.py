"""Reader of SQuAD v1.1 files: articles, their paragraphs, questions about each and the answers people gave."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longmem.errors import DataError


@dataclass(frozen=True)
class SquadQuestion:
    """A question, the passage it is about, and every answer that counts (a short span of the passage)."""

    id: str
    article: str
    passage: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class SquadFile:
    """The questions of a file in its order, and its hash."""

    name: str
    sha256: str
    questions: tuple[SquadQuestion, ...]


def read_squad(path: str | Path) -> SquadFile:
    """Read ``train-v1.1.json`` or ``dev-v1.1.json``, or a file of the same form.

    Raises:
        DataError: no such file, not JSON, or not of that form; names the file and the place in it.
    """
    file = Path(path)
    try:
        content = file.read_bytes()
        tree = json.loads(content)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); name a SQuAD v1.1 JSON file") from error
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}); name a SQuAD v1.1 JSON file") from error
    questions = []
    for a, article in enumerate(_list(file, tree, "data", "the file")):
        where = f"data[{a}]"
        for p, paragraph in enumerate(_list(file, article, "paragraphs", where)):
            place = f"{where}.paragraphs[{p}]"
            passage = _text(file, paragraph, "context", place)
            for q, asked in enumerate(_list(file, paragraph, "qas", place)):
                questions.append(_question(file, asked, f"{place}.qas[{q}]", str(article.get("title", a)), passage))
    if not questions:
        raise DataError(f"{file}: no question in it; name a SQuAD v1.1 JSON file")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise DataError(f"{file}: two questions have the id {question.id!r}; ids must differ")
        seen.add(question.id)
    return SquadFile(file.name, hashlib.sha256(content).hexdigest()[:16], tuple(questions))


def _question(file: Path, asked: Any, place: str, article: str, passage: str) -> SquadQuestion:
    answers = [_text(file, answer, "text", place) for answer in _list(file, asked, "answers", place)]
    if not answers:
        raise DataError(f"{file}: {place} has no answer; SQuAD v1.1 has one or more for every question, v2.0 not")
    return SquadQuestion(
        _text(file, asked, "id", place), article, passage, _text(file, asked, "question", place), tuple(answers)
    )


def _list(file: Path, node: Any, key: str, place: str) -> list[Any]:
    found = node.get(key) if isinstance(node, dict) else None
    if not isinstance(found, list):
        raise DataError(f"{file}: {place} has no list {key!r}; a SQuAD v1.1 file has data, paragraphs, qas, answers")
    return found


def _text(file: Path, node: Any, key: str, place: str) -> str:
    found = node.get(key) if isinstance(node, dict) else None
    if not isinstance(found, str):
        raise DataError(f"{file}: {place} has no text {key!r}; it must be as in SQuAD v1.1")
    # a template of lines needs texts of one line
    return " ".join(found.split())
