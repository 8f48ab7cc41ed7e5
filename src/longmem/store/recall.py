"""Re-reading: passages of a namespace that share words with a question, to be put into the window before it.

Heads that attend to memory find keys, not answers: what they bring is a hint, and small models need the words
themselves. So the best passages are looked up by text (BM25) and read once more, while memory attention goes on
beside them. The index lives in this process alone: what is forgotten is in no file of its own.
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

NOTES = "Notes from earlier conversations and documents:"
NOTES_TOKENS = 400  # of the window, that recalled passages may take
PASSAGE_WORDS = 60  # a turn or a paragraph that is shorter stays whole, longer ones are cut at sentences


@dataclass(frozen=True)
class RecalledPassage:
    """A passage that was found."""

    document: str  # its document's name
    start: int  # offset of its first character in the document's text
    text: str
    score: float  # BM25, larger is better


class Recall:
    """Text search over a namespace; documents that are added, changed or forgotten are noticed at every search.

    Args:
        store: a ``MemoryStore``, or what has its ``documents`` and ``text``.
        words: of a passage, at most.
    """

    def __init__(self, store: Any, namespace: str, *, words: int = PASSAGE_WORDS) -> None:
        self._store, self._namespace, self._words = store, namespace, words
        self._lock = threading.Lock()
        self._known: dict[str, Any] = {}
        self._index = sqlite3.connect(":memory:", check_same_thread=False)
        self._index.execute(
            "CREATE VIRTUAL TABLE passage USING fts5"
            "(text, document UNINDEXED, start UNINDEXED, tokenize='porter unicode61 remove_diacritics 2')"
        )

    def search(self, query: str, top: int = 5, *, without: Iterable[str] = ()) -> list[RecalledPassage]:
        """The ``top`` passages with the largest BM25 score; fewer where fewer share a word with the query.

        Args:
            query: any text; its words are searched, none is an operator.
            top: how many at most.
            without: names of documents that are not wanted.
        """
        words = dict.fromkeys(re.findall(r"\w+", query.lower()))
        if not words or top < 1:
            return []
        unwanted = set(without)
        with self._lock:
            self._refresh()
            rows = self._index.execute(
                "SELECT document, start, text, -bm25(passage) FROM passage WHERE passage MATCH ? ORDER BY rank LIMIT ?",
                (" OR ".join(f'"{word}"' for word in words), top if not unwanted else -1),
            )
            found = (RecalledPassage(*row) for row in rows if row[0] not in unwanted)
            return [passage for passage, _ in zip(found, range(top), strict=False)]

    def notes(
        self, query: str, tokenizer: Any, top: int = 5, *, budget: int = NOTES_TOKENS, without: Iterable[str] = ()
    ) -> tuple[str, list[RecalledPassage]]:
        """The best passages, as many as have at most ``budget`` tokens together; see ``search``.

        Returns:
            the passages as lines below ``NOTES``, the newest last, an empty text where nothing was found; and the
            passages, the best first.
        """
        found = []
        for passage in self.search(query, top, without=without):
            budget -= len(tokenizer(passage.text, add_special_tokens=False)["input_ids"]) + 2
            if budget < 0:
                break
            found.append(passage)
        known = list(self._known)  # of this moment: other threads search too
        age = {passage.document: known.index(passage.document) for passage in found if passage.document in known}
        lines = sorted(found, key=lambda passage: (age.get(passage.document, -1), passage.start))
        return "\n".join([NOTES, *(f"- {passage.text}" for passage in lines)]) if found else "", found

    def _refresh(self) -> None:
        now = {info.name: info for info in self._store.documents(self._namespace)}
        with self._index:  # all of it, or nothing where a text cannot be read
            for name in (name for name, info in self._known.items() if now.get(name) != info):
                self._index.execute("DELETE FROM passage WHERE document = ?", (name,))
            for name in (name for name, info in now.items() if self._known.get(name) != info):
                text = self._store.text(self._namespace, name)
                rows = ((passage, name, start) for start, passage in passages(text, self._words))
                self._index.executemany("INSERT INTO passage (text, document, start) VALUES (?, ?, ?)", rows)
        self._known = now  # the oldest document first


@dataclass(frozen=True)
class PlainTexts:
    """Texts by their names, to be searched without a store; the dict may grow."""

    texts: dict[str, str]

    def documents(self, namespace: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name) for name in self.texts]

    def text(self, namespace: str, name: str) -> str:
        return self.texts[name]


def passages(text: str, words: int = PASSAGE_WORDS) -> list[tuple[int, str]]:
    """Lines of a text as passages, each with its first character; longer lines are cut, at sentences if possible."""
    found: list[tuple[int, str]] = []
    for line in re.finditer(r"[^\n]+", text):
        start, count = line.start(), 0
        for sentence in re.finditer(r"\S.*?(?:[.!?](?=\s)|$)", line.group()):
            at = line.start() + sentence.start()
            for piece in re.finditer(rf"(?:\S+\s*){{1,{words}}}", sentence.group()):
                size = len(piece.group().split())
                if count and count + size > words:
                    found.append((start, text[start : at + piece.start()].strip()))
                    start, count = at + piece.start(), 0
                count += size
        found.append((start, text[start : line.end()].strip()))
    return [(start, passage) for start, passage in found if passage]
