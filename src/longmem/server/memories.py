"""Memories of the server's users: namespaces ``OWNER/MEMORY`` of one store, each reachable by its owner alone."""

from __future__ import annotations

import io
import json
import threading
import time
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any

from longmem.data.text import TEXT_SUFFIXES, read_stream
from longmem.errors import DataError
from longmem.files import write_whole
from longmem.server.access import NAME, Refused
from longmem.store import DocumentInfo, MemoryStore, Receipt
from longmem.store.recall import Recall

REGISTRY = "memories.json"
RESPONSES = "~responses"
"""Where a user's stored responses are kept that name no memory; no user's memory can be called so."""
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl")
OPEN_BYTES = 2 << 30
"""Of banks that are kept open; those used longest ago are closed beyond it."""
OPEN_RECALLS = 64
"""Text searches that are kept, likewise."""


class Memories:
    """The store, opened with the model and its tokenizer, and what is open of it.

    ``namespace`` is that of a memory; ``own`` makes it of an owner and the name that they call the memory by.
    """

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self._recalls: OrderedDict[str, Recall] = OrderedDict()
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._file = Path(store.path) / REGISTRY
        self._created: dict[str, float] = json.loads(self._file.read_text()) if self._file.is_file() else {}

    def exists(self, namespace: str) -> bool:
        """Whether it was made, or holds documents."""
        return namespace in self._created or namespace in self.store.namespaces()

    def own(self, owner: str, memory: str) -> str:
        """The namespace of a memory; refused where the owner has none of this name, whether or not another has one."""
        if NAME.fullmatch(memory) is None or not self.exists(f"{owner}/{memory}"):
            raise Refused(404, f"you have no memory {memory[:100]!r}; make it with POST /v1/memories", code="not_found")
        return f"{owner}/{memory}"

    def create(self, owner: str, memory: str) -> str:
        """Make an empty memory, unless it is there; returns its namespace."""
        namespace = f"{owner}/{memory}"
        with self._lock:
            if self.exists(namespace):
                raise Refused(409, f"you have a memory {memory!r} already", param="id", code="exists")
            self._created[namespace] = time.time()
            self._write()
        return namespace

    def listed(self, owner: str) -> list[dict[str, Any]]:
        """The owner's memories with their sizes."""
        mine = (name for name in {*self._created, *self.store.namespaces()} if name.partition("/")[0] == owner)
        return [self.shown(namespace) for namespace in sorted(mine) if namespace != f"{owner}/{RESPONSES}"]

    def shown(self, namespace: str) -> dict[str, Any]:
        """A memory with its sizes."""
        documents = self.store.documents(namespace)
        return {
            "id": namespace.partition("/")[2],
            "object": "memory",
            "documents": len(documents),
            "tokens": sum(info.tokens for info in documents),
            "chunks": sum(info.chunks for info in documents),
            "created": int(self._created.get(namespace, min((info.added for info in documents), default=0))),
        }

    def document(self, namespace: str, name: str) -> DocumentInfo:
        """A document of a memory; refused where it has none of this name."""
        if not self.store.has(namespace, name):
            said = f"no document and no response {name[:100]!r} is here; "
            way_out = "a response that named a memory is in that memory"
            raise Refused(404, said + way_out, code="not_found")
        return self.store.document(namespace, name)

    def recall(self, namespace: str) -> Recall:
        """The text search of a memory; of the memories used last it stays open."""
        with self._lock:
            found = self._recalls.pop(namespace, None) or Recall(self.store, namespace)
            self._recalls[namespace] = found
            if len(self._recalls) > OPEN_RECALLS:
                self._recalls.popitem(last=False)
        return found

    # what runs the model or writes: called in the engine's thread only

    def bank(self, namespace: str) -> Any:
        """What the model searches; None where the memory is empty."""
        bank = self._open.pop(namespace, None)
        if namespace not in self.store.namespaces():
            return None
        bank = bank or self.store.bank(namespace)
        bank.refresh()  # what was added since
        self._open[namespace] = bank
        while len(self._open) > 1 and sum(each.nbytes for each in self._open.values()) > OPEN_BYTES:
            self._open.popitem(last=False)
        return bank

    def add(self, namespace: str, name: str, text: str, *, append: bool = False, **settings: Any) -> Receipt:
        """Add a document, or with ``append`` to one that is there; durable when this returns."""
        if append and self.store.has(namespace, name):
            return self.store.append(namespace, text, name=name)
        return self.store.add_document(namespace, text, name=name, **settings)

    def forget(self, namespace: str, document: str | None = None) -> list[DocumentInfo]:
        """Forget a document, refused where there is none, or the whole memory; returns what is gone."""
        which: Any = {"everything": True} if document is None else {"name": self.document(namespace, document).name}
        gone = self.store.forget(namespace, **which)
        with self._lock:
            self._recalls.pop(namespace, None)  # its index holds the text
            if document is None and self._created.pop(namespace, None) is not None:
                self._write()
        self._open.pop(namespace, None)
        return gone

    def _write(self) -> None:
        write_whole(self._file, [json.dumps(self._created, indent=1, sort_keys=True) + "\n"])


def texts_of(filename: str, data: bytes) -> list[tuple[str, str]]:
    """Names and texts of the documents in a file that a user sent; nothing of its name becomes a path."""
    name = PurePosixPath(filename.replace("\\", "/")).name[:200]
    suffix = PurePosixPath(name).suffix.lower()
    if suffix not in SUFFIXES:
        raise Refused(400, f"files of these kinds are read: {', '.join(SUFFIXES)}", param="file")
    try:
        found = list(read_stream(io.BytesIO(data), name, lines=suffix == ".jsonl"))
    except DataError:
        said = "the file holds no text in UTF-8, or a line of it is no JSON object with a field text"
        raise Refused(400, said, param="file") from None
    return [(name if each.line is None else f"{name}:{each.line}", each.text) for each in found]
