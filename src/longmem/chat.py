"""Conversations: prompts from messages, passages of memory read once more (``Recall``), and what was said kept.

Used by ``longmem chat``, ``longmem demo`` and the server; what was said is kept in the store alone.

Heads that attend to memory find keys, not answers: what they bring is a hint, and small models need the words
themselves. So the passages that share words with a question are looked up by text (BM25) and put into the window
before it, while memory attention goes on beside them.
"""

from __future__ import annotations

import math
import re
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from longmem.data.tokens import Message, chat_text, start_tokens, token_ids
from longmem.generation.page import Readings
from longmem.store import MemoryStore

# passages that share words with a question

NOTES = "Notes from earlier conversations and documents:"
NOTES_TOKENS = 400  # of the window, that recalled passages may take
PASSAGE_WORDS = 60  # a turn or a paragraph that is shorter stays whole, longer ones are cut at sentences
QUERY_WORDS = 256  # of a longer query the rarest: time grows with the square of their number
_WORDS = "tokenize='porter unicode61 remove_diacritics 2'"


@dataclass(frozen=True)
class RecalledPassage:
    """A passage that was found."""

    document: str  # its document's name
    start: int  # offset of its first character in the document's text
    text: str
    score: float  # BM25, larger is better


class Recall:
    """Text search over a namespace; documents that are added, changed or forgotten are noticed at every search.

    The index is in this process alone: what is forgotten is in no file of its own.

    Args:
        store: a ``MemoryStore``, or what has its ``documents`` and ``text``.
    """

    def __init__(self, store: Any, namespace: str) -> None:
        self._store, self._namespace = store, namespace
        self._lock = threading.Lock()
        self._known: dict[str, Any] = {}
        self._seen: Any = None  # version of the catalog that is known
        self._expires = math.inf  # the first moment at which a known document expires
        self._index = sqlite3.connect(":memory:", check_same_thread=False)
        weakref.finalize(self, self._index.close)
        self._index.execute(
            f"CREATE VIRTUAL TABLE passage USING fts5(text, document UNINDEXED, start UNINDEXED, {_WORDS})"
        )
        # to count in how many passages the words of a long query are
        self._index.execute(f"CREATE VIRTUAL TABLE query USING fts5(word, {_WORDS})")
        self._index.execute("CREATE VIRTUAL TABLE asked USING fts5vocab(query, instance)")
        self._index.execute("CREATE VIRTUAL TABLE known USING fts5vocab(passage, row)")

    def search(self, query: str, top: int = 5, *, without: Iterable[str] = ()) -> list[RecalledPassage]:
        """The ``top`` passages with the largest BM25 score; fewer where fewer share a word with the query.

        Args:
            query: any text; its words are searched, none is an operator. Of very many, those in the fewest passages.
            top: how many at most.
            without: names of documents that are not wanted.
        """
        words, unwanted = list(dict.fromkeys(re.findall(r"\w+", query.lower()))), set(without)
        with self._lock:
            self._refresh()
            if len(words) > QUERY_WORDS:
                words = self._rarest(words)
            if not words or top < 1:
                return []
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
            budget -= len(token_ids(tokenizer, passage.text)) + 2
            if budget < 0:
                break
            found.append(passage)
        known = list(self._known)  # of this moment: other threads search too
        age = {passage.document: known.index(passage.document) for passage in found if passage.document in known}
        lines = sorted(found, key=lambda passage: (age.get(passage.document, -1), passage.start))
        return "\n".join([NOTES, *(f"- {passage.text}" for passage in lines)]) if found else "", found

    def _rarest(self, words: list[str]) -> list[str]:
        """Of the words that passages have, those in the fewest."""
        try:
            self._index.executemany("INSERT INTO query (rowid, word) VALUES (?, ?)", enumerate(words))
            fewest = "SELECT asked.doc FROM asked JOIN known USING (term) ORDER BY known.doc LIMIT ?"
            return [words[place] for (place,) in self._index.execute(fewest, (QUERY_WORDS,))]
        finally:  # also where it is interrupted: the next one begins with none
            self._index.rollback()

    def _refresh(self) -> None:
        """Take up the documents that there are now; microseconds where the store is what it was."""
        catalog = getattr(self._store, "catalog", None)  # plain texts have none
        seen = None if catalog is None else catalog.version()  # before the documents: no change between is missed
        if seen is not None and seen == self._seen and time.time() < self._expires:
            return
        with nullcontext() if catalog is None else catalog.read():  # of one moment: a text may be forgotten meanwhile
            now = {info.name: info for info in self._store.documents(self._namespace)}
            new = [name for name, info in now.items() if self._known.get(name) != info]
            texts = [(name, self._store.text(self._namespace, name)) for name in new]
        with self._index:
            for name in (name for name, info in self._known.items() if now.get(name) != info):
                self._index.execute("DELETE FROM passage WHERE document = ?", (name,))
            for name, text in texts:
                rows = ((passage, name, start) for start, passage in passages(text))
                self._index.executemany("INSERT INTO passage (text, document, start) VALUES (?, ?, ?)", rows)
        self._known, self._seen = now, seen  # the oldest document first
        self._expires = min(
            (at for info in now.values() if (at := getattr(info, "expires", None)) is not None), default=math.inf
        )


@dataclass(frozen=True)
class PlainTexts:
    """Texts by their names, to be searched without a store; the dict may grow."""

    texts: dict[str, str]

    def documents(self, namespace: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name) for name in self.texts]

    def text(self, namespace: str, name: str) -> str:
        return self.texts[name]


def passages(text: str) -> list[tuple[int, str]]:
    """Lines of a text as passages, each with its first character; longer lines are cut, at sentences if possible."""
    found: list[tuple[int, str]] = []
    for line in re.finditer(r"[^\n]+", text):
        start, count = line.start(), 0
        for sentence in re.finditer(r"\S.*?(?:[.!?](?=\s)|$)", line.group()):
            at = line.start() + sentence.start()
            for piece in re.finditer(rf"(?:\S+\s*){{1,{PASSAGE_WORDS}}}", sentence.group()):
                size = len(piece.group().split())
                if count and count + size > PASSAGE_WORDS:
                    found.append((start, text[start : at + piece.start()].strip()))
                    start, count = at + piece.start(), 0
                count += size
        found.append((start, text[start : line.end()].strip()))
    return [(start, passage) for start, passage in found if passage]


# conversations


class Prompt(NamedTuple):
    """What a model continues."""

    ids: list[int]
    recalled: list[RecalledPassage]
    """The passages that were put into it."""


class Reply(NamedTuple):
    """An answer."""

    text: str
    recalled: list[RecalledPassage]
    """Passages that were put into the window."""
    read: list[Any]
    """``ChunkReading`` of the chunks that heads read, each with its largest share of an output, largest first."""


def chat_prompt(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    recall: Recall | None = None,
    passages: int = 5,
    without: Sequence[str] = (),
) -> Prompt:
    """Messages as the model's chat template has them, or plainly where it has none, up to the answer to be given.

    Args:
        messages: oldest first; the last is the one to answer.
        recall: where passages are looked up that share words with the last message; None leaves them out.
        passages: how many at most; together they have at most ``NOTES_TOKENS`` tokens.
        without: documents whose passages are not wanted, such as this very conversation.
    """
    notes, found = "", list[RecalledPassage]()
    if recall is not None:
        notes, found = recall.notes(messages[-1]["content"], tokenizer, passages, without=without)
    said = list(messages)
    if notes and said[0]["role"] == "system":
        said[0] = {"role": "system", "content": f"{said[0]['content']}\n\n{notes}"}
    elif notes:
        said.insert(0, {"role": "system", "content": notes})
    if _templated(tokenizer):
        return Prompt(token_ids(tokenizer, chat_text(tokenizer, said, answer=True)), found)
    lines = [f"{message['role'].capitalize()}: {message['content']}" for message in said]
    return Prompt([*start_tokens(tokenizer), *token_ids(tokenizer, "\n".join([*lines, "Assistant:"]))], found)


@torch.no_grad()
def reply(
    model: Any,
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    bank: Any = None,
    recall: Recall | None = None,
    passages: int = 5,
    without: Sequence[str] = (),
    **settings: Any,
) -> Reply:
    """Answer the last message; heads read ``bank``, ``settings`` are those of ``generate``; see ``chat_prompt``."""
    prompt = chat_prompt(tokenizer, messages, recall=recall, passages=passages, without=without)
    ids, ends, readings = torch.tensor([prompt.ids], device=model.device), stop_words(tokenizer), Readings()
    settings |= {"stop_strings": ends, "tokenizer": tokenizer} if ends else {}
    settings |= {"memory": bank, "explain": readings} if bank is not None else {}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.generate(ids, pad_token_id=pad, **settings)
    said = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    for end in ends:
        said = said.removesuffix(end)
    chunks = sorted((chunk for reading in readings for chunk in reading.chunks), key=lambda chunk: chunk.share)
    best = {(chunk.origin.document, chunk.origin.start_token): chunk for chunk in chunks}
    return Reply(said.strip(), prompt.recalled, sorted(best.values(), key=lambda chunk: -chunk.share))


def _templated(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def stop_words(tokenizer: Any) -> list[str]:
    """What ends an answer besides the model's own end token: without a template the next speaker's name."""
    return [] if _templated(tokenizer) else ["\nUser:", "\nSystem:", "\nAssistant:"]


def transcript(messages: Sequence[Message]) -> str:
    """Messages as a document of the memory keeps them: a line for each, so that each can be found by itself."""
    return "".join(f"{message['role']}: {' '.join(message['content'].split())}\n" for message in messages)


def conversation_name() -> str:
    """A name for the document of a new conversation, in the order of time."""
    moment = time.time()
    return time.strftime("chat-%Y%m%d-%H%M%S", time.gmtime(moment)) + f"-{int(moment % 1 * 1e6):06}"


def keep(store: MemoryStore, namespace: str, name: str, messages: Sequence[Message]) -> None:
    """Append messages to a conversation's document, or begin it."""
    add = store.append if store.has(namespace, name) else store.add_document
    add(namespace, transcript(messages), name=name)
