"""The users of a server: API keys by the names of their owners, and the memories that belong to each name.

A memory is the namespace ``OWNER/MEMORY`` of one store. ``namespace`` is that; ``Memories.own`` makes it of an owner
and the name that they call the memory by.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from longmem.errors import ConfigError
from longmem.files import write_whole
from longmem.server.schemas import NAME, Refused
from longmem.store import DocumentInfo, MemoryStore, Receipt
from longmem.store.recall import Recall

REGISTRY = "memories.json"
"""Beside the store: when memories were made, also those that are empty."""
RESPONSES = "~responses"
"""Where a user's stored responses are kept that name no memory; no user's memory can be called so."""
OPEN_BYTES = 2 << 30
"""Of banks that are kept open; those used longest ago are closed beyond it."""
OPEN_RECALLS = 64
"""Text searches that are kept, likewise."""

# keys


def read_keys(file: Path) -> dict[str, str]:
    """SHA-256 hashes of keys in hexadecimal, by their names, from a file of lines ``name hash``.

    Raises:
        ConfigError: no file, no key, or a line that is none.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: there is no such file; make it with longmem serve --keys {file} --new-key NAME")
    found: dict[str, str] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(rf"({NAME})\s+([0-9a-f]{{64}})", line.strip())
        if match is None:
            raise ConfigError(f"{file}:{number}: a line is a name and a hash, as longmem serve --new-key writes it")
        found[match[1]] = match[2]
    if not found:
        raise ConfigError(f"{file}: no key in it; make one with longmem serve --keys {file} --new-key NAME")
    return found


def owner_of(keys: dict[str, str], authorization: str | None) -> str:
    """Whose key an ``Authorization: Bearer KEY`` carries; memories belong to the name of the key that made them.

    Without ``keys`` (see ``read_keys``) everybody is let in, as one owner.
    """
    if not keys:
        return "local"
    scheme, _, key = (authorization or "").partition(" ")
    given = hashlib.sha256(key.strip().encode()).hexdigest() if scheme.lower() == "bearer" else ""
    # all of them are compared, so that the time tells nothing
    found = [name for name, digest in keys.items() if hmac.compare_digest(given, digest)]
    if not found:
        raise Refused(401, "no valid API key; send Authorization: Bearer KEY", code="invalid_api_key")
    return found[0]


def new_key(file: Path, name: str) -> str:
    """Make a key, append its hash to the file, and return the key: nothing else ever shows it."""
    if re.fullmatch(NAME, name) is None:
        raise ConfigError(f"{name!r} is no name for a key; use letters, digits, '.', '_' and '-', at most 64")
    if file.exists() and name in read_keys(file):
        raise ConfigError(f"{file} has a key named {name}; remove its line, or choose another name")
    key = f"lm-{secrets.token_urlsafe(32)}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)
    with file.open("a", encoding="utf-8") as out:
        out.write(f"{name} {hashlib.sha256(key.encode()).hexdigest()}\n")
    return key


# memories


class Memories:
    """The store, opened with the model and its tokenizer, and what is open of it."""

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
        if re.fullmatch(NAME, memory) is None or not self.exists(f"{owner}/{memory}"):
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
