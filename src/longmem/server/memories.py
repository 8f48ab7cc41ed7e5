"""Memories of the server's users: namespaces of one store, each reachable by its owner alone."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from longmem.chat import Message, conversation_name, keep
from longmem.files import write_whole
from longmem.store.recall import Recall

REGISTRY = "memories.json"
RESPONSES = "~responses"
"""Where a user's stored responses are kept that name no memory; no user's memory can be called so."""


class Memories:
    """The store, and what is open of it.

    Methods that take ``owner`` see that owner's memories and no others.

    Args:
        store: opened with the model and its tokenizer.
        budget: bytes of open banks; those used longest ago are closed beyond it.
    """

    def __init__(self, store: Any, *, budget: int = 2 << 30) -> None:
        self.store, self.budget = store, budget
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._recalls: OrderedDict[str, Recall] = OrderedDict()
        self._lock = threading.Lock()
        self._file = Path(store.path) / REGISTRY
        self._created: dict[str, float] = json.loads(self._file.read_text()) if self._file.is_file() else {}

    def exists(self, owner: str, memory: str) -> bool:
        """Whether the owner has a memory of this id."""
        return f"{owner}/{memory}" in self._created or f"{owner}/{memory}" in self.store.namespaces()

    def create(self, owner: str, memory: str) -> bool:
        """Make an empty memory; False: it is there."""
        with self._lock:
            if self.exists(owner, memory):
                return False
            self._created[f"{owner}/{memory}"] = time.time()
            self._write()
            return True

    def listed(self, owner: str) -> list[dict[str, Any]]:
        """The owner's memories with their sizes."""
        names = {*self._created, *self.store.namespaces()}
        mine = sorted(name.partition("/")[2] for name in names if name.partition("/")[0] == owner)
        return [self.shown(owner, memory) for memory in mine if memory != RESPONSES]

    def shown(self, owner: str, memory: str) -> dict[str, Any]:
        """A memory with its sizes."""
        documents = self.documents(owner, memory)
        return {
            "id": memory,
            "object": "memory",
            "documents": len(documents),
            "tokens": sum(info.tokens for info in documents),
            "chunks": sum(info.chunks for info in documents),
            "created": int(self._created.get(f"{owner}/{memory}", min((d.added for d in documents), default=0))),
        }

    def documents(self, owner: str, memory: str) -> list[Any]:
        """The documents of a memory; none where it is empty."""
        namespace = f"{owner}/{memory}"
        return list(self.store.documents(namespace)) if namespace in self.store.namespaces() else []

    def text(self, owner: str, memory: str, document: str) -> str:
        """The text of a document."""
        return str(self.store.text(f"{owner}/{memory}", document))

    def search(self, owner: str, memory: str, query: str, top: int) -> list[Any]:
        """Passages that share words with a query, best first."""
        return self.recall(owner, memory).search(query, top)

    def recall(self, owner: str, memory: str) -> Recall:
        """The text search of a memory."""
        namespace = f"{owner}/{memory}"
        with self._lock:
            found = self._recalls.pop(namespace, None) or Recall(_Known(self.store), namespace)
            self._recalls[namespace] = found
            while len(self._recalls) > 64:
                self._recalls.popitem(last=False)
            return found

    # what runs the model: called in the engine's thread only

    def bank(self, owner: str, memory: str) -> Any:
        """What the model searches; None where the memory is empty."""
        namespace = f"{owner}/{memory}"
        if namespace not in self.store.namespaces():
            self._open.pop(namespace, None)
            return None
        bank = self._open.pop(namespace, None) or self.store.bank(namespace)
        bank.refresh()  # what was added since
        self._open[namespace] = bank
        while len(self._open) > 1 and sum(each.nbytes for each in self._open.values()) > self.budget:
            self._open.popitem(last=False)
        return bank

    def add(self, owner: str, memory: str, name: str, text: str, **settings: Any) -> Any:
        """Add a document, or append to one (``append=True``); durable when this returns."""
        namespace = f"{owner}/{memory}"
        settings = {key: value for key, value in settings.items() if value}
        if settings.pop("append", False) and name in {info.name for info in self.documents(owner, memory)}:
            return self.store.append(namespace, text, name=name)
        return self.store.add_document(namespace, text, name=name, **settings)

    def remember(self, owner: str, memory: str, messages: list[Message]) -> int:
        """Keep messages as lines of a document; returns the tokens written."""
        return keep(self.store, f"{owner}/{memory}", conversation_name(), messages)

    def forget(self, owner: str, memory: str, document: str | None = None) -> int:
        """Forget a document, or the whole memory; returns how many documents are gone."""
        namespace = f"{owner}/{memory}"
        known = [info.name for info in self.documents(owner, memory) if document in (None, info.name)]
        if known:
            self.store.forget(namespace, **({"everything": True} if document is None else {"name": document}))
        with self._lock:
            if document is None:
                self._created.pop(namespace, None)
                self._write()
            self._recalls.pop(namespace, None)
        self._open.pop(namespace, None)
        return len(known)

    def _write(self) -> None:
        write_whole(self._file, [json.dumps(self._created, indent=1, sort_keys=True) + "\n"])


class _Known:
    """The store as ``Recall`` asks it: a namespace without documents is an empty one."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def documents(self, namespace: str) -> Any:
        return self._store.documents(namespace) if namespace in self._store.namespaces() else []

    def text(self, namespace: str, name: str) -> str:
        return str(self._store.text(namespace, name))
