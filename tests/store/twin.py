"""A plain Python model of a store: what every namespace has, and what must be nowhere any more."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tests.store.small import BEGIN, MODEL, expected_chunks, words

from longmem.store import MemoryStore

GRAM = 16
"""Bytes that are not found by chance; keys and values of a token and a head."""


@dataclass(frozen=True)
class Document:
    """A document as the store should have it; ``number`` grows as the store's own does.

    ``shorter`` is what it was before each ``append``: a short last segment that was encoded again may stay beside the
    whole segments in front of it, of tokens that the document still has, until the document is forgotten.
    """

    number: int
    name: str
    text: str | None
    ids: tuple[int, ...]
    metadata: dict[str, Any]
    added: float
    expires: float | None
    revision: int = 1
    shorter: tuple[Document, ...] = ()

    def expired(self, now: float) -> bool:
        return self.expires is not None and self.expires <= now

    def same(self, other: Document) -> bool:
        """Whether adding the other one adds nothing."""
        return (self.text, self.ids, self.metadata) == (other.text, other.ids, other.metadata)


def make_document(number: int, name: str, seed: int, length: int, as_ids: bool, now: float) -> Document:
    """What is to be added; equal seeds and lengths are the same document, and begin with the same text."""
    text = words(seed, length)
    ids = tuple(text.encode()) if as_ids else (BEGIN, *text.encode())
    metadata = {"kind": ["note", "letter"][seed % 2], "secret": words(1000 + seed, 40)} if seed % 3 else {}
    return Document(number, name, None if as_ids else text, ids, metadata, now, None)


@dataclass
class Twin:
    """All documents of a store, expired ones until they are compacted, and what was once in it."""

    rows: dict[str, dict[str, Document]] = field(default_factory=dict)
    buried: list[Document] = field(default_factory=list)

    def find(self, namespace: str, name: str, now: float) -> Document | None:
        """One that can be found."""
        found = self.rows.get(namespace, {}).get(name)
        return None if found is None or found.expired(now) else found

    def live(self, namespace: str, now: float) -> list[Document]:
        """Those that can be found, in order."""
        rows = [row for row in self.rows.get(namespace, {}).values() if not row.expired(now)]
        return sorted(rows, key=lambda row: (row.added, row.number))

    def put(self, namespace: str, document: Document) -> None:
        """Take a document, in the place of what has its name."""
        old = self.rows.setdefault(namespace, {}).get(document.name)
        if old is not None:
            self._bury(old)
        self.rows[namespace][document.name] = document

    def remove(self, namespace: str, name: str) -> None:
        """Forget a document."""
        self._bury(self.rows[namespace].pop(name))

    def _bury(self, document: Document) -> None:
        self.buried += (document, *document.shorter)

    def remove_expired(self, now: float) -> int:
        """How many were removed."""
        gone = [(space, row.name) for space, rows in self.rows.items() for row in rows.values() if row.expired(now)]
        for namespace, name in gone:
            self.remove(namespace, name)
        return len(gone)

    def append(self, namespace: str, name: str, seed: int, length: int) -> Document:
        """Take more of a text behind a document."""
        old, more = self.rows[namespace][name], words(seed, length)
        text = None if old.text is None else old.text + more
        shorter = (*old.shorter, replace(old, shorter=()))
        ids = (*old.ids, *more.encode())
        new = replace(old, text=text, ids=ids, revision=old.revision + 1, shorter=shorter)
        self.rows[namespace][name] = new
        return new

    # bytes

    def left_of_buried(self, store: MemoryStore) -> list[str]:
        """What of buried documents is in any file, though no document has it."""
        disk = bytes_of(store)
        living = [each for rows in self.rows.values() for row in rows.values() for each in (row, *row.shorter)]
        may = b"\0".join(trace for document in living for trace in traces(store, document))
        left = [
            f"{gram!r} of {document.name}"
            for document in self.buried
            for trace in traces(store, document)
            for gram in (trace[at : at + GRAM] for at in range(0, len(trace) - GRAM + 1, GRAM))
            if any(gram) and gram not in may and gram in disk  # zeros fill up short chunks
        ]
        self.buried = [] if not left else self.buried
        return left


def traces(store: MemoryStore, document: Document) -> Iterator[bytes]:
    """Everything that the files keep of a document: token ids, text, metadata, and its chunks."""
    yield np.array(document.ids, dtype="<u4").tobytes()
    yield (document.text or "").encode()
    yield document.metadata.get("secret", "").encode()
    chunks = expected_chunks(store, MODEL, document.ids)
    yield chunks.kv.tobytes()
    yield chunks.keys.tobytes()


def bytes_of(store: MemoryStore) -> bytes:
    """All files of an open store, but those that SQLite keeps locks on and no text in."""
    # read by another process: closing a descriptor of it here would drop SQLite's locks
    catalog = subprocess.run(["cat", store.path / "catalog.sqlite"], stdout=subprocess.PIPE, check=True).stdout
    others = [path for path in sorted(store.path.rglob("*")) if path.is_file()]
    return catalog + b"".join(
        path.read_bytes() for path in others if path.name not in ("catalog.sqlite", "catalog.sqlite-shm")
    )
