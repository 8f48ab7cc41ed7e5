"""Any life of a store against a plain model of it: namespaces stay apart, and what is forgotten is gone."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as some
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from tests.store.small import BEGIN, MODEL, TOKENIZER, open_small, quick_folder, words

from longmem.chat import PlainTexts, Recall
from longmem.errors import StoreError
from longmem.store import DocumentInfo, MemoryStore
from longmem.store.bank import StoreBank
from longmem.store.disk import StoredChunks
from longmem.store.encode import Encoder

NAMESPACES = ["alice", "bob", "carol"]
SPACE = some.sampled_from(NAMESPACES)
NAME = some.sampled_from(["a", "b", "c"])
SEED = some.integers(0, 5)
LENGTH = some.sampled_from([5, 40, 90, 200, 300])
"""Within a segment, within a piece, and over two and three pieces."""
AGE = some.sampled_from([1.0, 5.0, 60.0])
KIND = some.sampled_from([None, "note", "letter"])
CHUNK = 2
GRAM = 16
"""Bytes that are not found by chance; keys and values of a token and a head."""


@dataclass(frozen=True)
class Document:
    """A document as the store should have it; ``number`` grows as the store's own does.

    ``shorter`` is what it was before each ``append``: a short last segment that was encoded again may stay beside the
    whole segments in front of it, of tokens that the document still has, until the document is forgotten.
    """

    number: int
    text: str | None
    ids: tuple[int, ...]
    metadata: dict[str, Any]
    added: float
    expires: float | None
    revision: int = 1
    shorter: tuple[Document, ...] = ()


class Life(RuleBasedStateMachine):
    """A store, a reader of it, banks and text searches held open; after every change all that they say is compared
    with the model.

    ``rows`` are the documents of each namespace by their names, expired ones until they are compacted; ``buried`` what
    must be in no file after the next compact.
    """

    place: Path

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000_000.0
        self.clock = patch("time.time", lambda: self.now)
        self.clock.start()
        self.folder = tempfile.TemporaryDirectory(dir=self.place)
        self.path = Path(self.folder.name) / "memory"
        self.open()
        self.rows: dict[str, dict[str, Document]] = {namespace: {} for namespace in NAMESPACES}
        self.buried: list[Document] = []
        self.added = 0

    def open(self) -> None:
        self.store, self.reader = open_small(self.path), open_small(self.path, mode="read")
        self.banks: list[StoreBank] = []
        self.recalls = [[Recall(store, namespace) for namespace in NAMESPACES] for store in (self.store, self.reader)]

    def teardown(self) -> None:
        try:
            self.compact()
            self.reopen()
            self.everything_is_as_in_the_model()
            assert self.store.verify().problems == []
        finally:
            self.reader.close()
            self.store.close()
            self.clock.stop()
            self.folder.cleanup()

    def live(self, namespace: str) -> dict[str, Document]:
        """Those that can be found, in order."""
        found = [(name, row) for name, row in self.rows[namespace].items() if not row.expires or row.expires > self.now]
        return dict(sorted(found, key=lambda each: (each[1].added, each[1].number)))

    def bury(self, namespace: str, name: str) -> None:
        gone = self.rows[namespace].pop(name, None)
        self.buried += () if gone is None else (gone, *gone.shorter)

    # what changes it

    @initialize()
    def begin(self) -> None:
        """So that a short life has something to forget, to expire and to read anew."""
        for seed, (namespace, name) in enumerate(product(NAMESPACES, "ab")):
            self.add(namespace, name, seed % 4, 90, seed % 3 == 0, 5.0 if name == "b" else None, False)
        self.hold_a_bank(beside=False, load=True)

    @rule(
        namespace=SPACE, name=NAME, seed=SEED, length=LENGTH, as_ids=some.booleans(), age=some.none() | AGE,
        replaces=some.booleans(),
    )  # fmt: skip
    def add(
        self, namespace: str, name: str, seed: int, length: int, as_ids: bool, age: float | None, replaces: bool
    ) -> None:
        """Equal seeds and lengths are the same document, and others of a seed begin with the same text."""
        text, expires = words(seed, length), None if age is None else self.now + age
        ids = tuple(text.encode()) if as_ids else (BEGIN, *text.encode())
        metadata = {"kind": ["note", "letter"][seed % 2], "secret": words(1000 + seed, 40)} if seed % 3 else {}
        self.added += 1
        new = Document(self.added, None if as_ids else text, ids, metadata, self.now, expires)
        old = self.live(namespace).get(name)
        given: Any = {"ids": ids} if as_ids else {"text": text}
        try:
            about = {"name": name, "metadata": metadata, "expires": expires, "replace": replaces}
            receipt = self.store.add_document(namespace, **given, **about)
            assert receipt.tokens == len(ids)
            status: str = receipt.status
        except StoreError as error:
            status = "refused" if "has another document" in str(error) else str(error)
        if old is not None and (old.text, old.ids, old.metadata) == (new.text, ids, metadata):
            kept = expires == old.expires or (expires is None and not replaces)
            assert status == ("unchanged" if kept else "updated")
            self.rows[namespace][name] = old if kept else replace(old, expires=expires)
        elif old is not None and not replaces:
            assert status == "refused"
        else:
            assert status == ("added" if old is None else "replaced")
            self.bury(namespace, name)
            self.rows[namespace][name] = replace(new, revision=1 if old is None else old.revision + 1)

    @rule(namespace=SPACE, name=NAME, seed=SEED, length=LENGTH)
    def append(self, namespace: str, name: str, seed: int, length: int) -> None:
        old, more = self.live(namespace).get(name), words(seed, length)
        if old is None:
            with pytest.raises(StoreError, match="no document"):
                self.store.append(namespace, more, name=name)
            return
        given: Any = {"ids": list(more.encode())} if old.text is None else {"text": more}
        receipt = self.store.append(namespace, name=name, **given)
        text, ids = None if old.text is None else old.text + more, (*old.ids, *more.encode())
        shorter = (*old.shorter, replace(old, shorter=()))
        new = replace(old, text=text, ids=ids, revision=old.revision + 1, shorter=shorter)
        self.rows[namespace][name] = new
        assert (receipt.status, receipt.tokens, receipt.revision) == ("appended", len(ids), new.revision)

    @rule(namespace=SPACE, name=some.none() | NAME, age=some.none() | AGE, kind=KIND)
    def forget(self, namespace: str, name: str | None, age: float | None, kind: str | None) -> None:
        rows, before, where = self.rows[namespace], None if age is None else self.now - age, {"kind": kind}
        given: Any = {"name": name, "before": before, "where": None if kind is None else where}
        if name is not None and name not in rows:
            with pytest.raises(StoreError, match="no document"):
                self.store.forget(namespace, **given)
            return
        found = self.store.forget(namespace, **given, everything=given == dict.fromkeys(given))
        gone = {
            each: len(row.ids)
            for each, row in rows.items()
            if name in (None, each) and kind in (None, row.metadata.get("kind")) and (age is None or row.added < before)
        }
        assert {each.name: each.tokens for each in found} == gone
        for each in gone:
            self.bury(namespace, each)

    @rule(age=AGE)
    def wait(self, age: float) -> None:
        self.now += age

    @rule()
    def compact(self) -> None:
        expired = [(space, name) for space in NAMESPACES for name in self.rows[space].keys() - self.live(space).keys()]
        for space, name in expired:
            self.bury(space, name)
        done = self.store.compact()
        assert (done.documents, done.emptied) == (len(expired), True)
        disk = bytes_of(self.store)
        living = [each for rows in self.rows.values() for row in rows.values() for each in (row, *row.shorter)]
        may = b"\0".join(trace for document in living for trace in traces(self.store, document))
        for trace in (trace for document in self.buried for trace in traces(self.store, document)):
            for gram in (trace[at : at + GRAM] for at in range(0, len(trace) - GRAM + 1, GRAM)):
                assert not any(gram) or gram in may or gram not in disk  # zeros fill up short chunks
        self.buried = []

    @rule()
    def reopen(self) -> None:
        self.reader.close()
        self.store.close()
        self.open()

    @rule(beside=some.booleans(), load=some.booleans())
    def hold_a_bank(self, beside: bool, load: bool) -> None:
        banks = [(self.reader if beside else self.store).bank(namespace) for namespace in NAMESPACES]
        self.banks = [*self.banks, *(bank.load() if load else bank for bank in banks)][-6:]

    @rule()
    def refresh(self) -> None:
        for bank in self.banks:
            bank.refresh()
            self._compare_all(bank)

    # what must hold

    @invariant()
    def everything_is_as_in_the_model(self) -> None:
        for store in (self.store, self.reader):
            assert store.namespaces() == [name for name in NAMESPACES if self.live(name)]
            for namespace in NAMESPACES:
                rows = self.live(namespace)
                assert [
                    (each.namespace, *about(each.name, each, each.tokens)) for each in store.documents(namespace)
                ] == [(namespace, *about(name, row, len(row.ids))) for name, row in rows.items()]
                for name, row in rows.items():
                    assert store.token_ids(namespace, name).tolist() == list(row.ids)
                    assert row.text is None or store.text(namespace, name) == row.text
                stats = store.stats(namespace)
                assert (stats.documents, stats.tokens) == (len(rows), sum(len(row.ids) for row in rows.values()))
                assert stats.expired == len(self.rows[namespace]) - len(rows)
        for namespace in NAMESPACES:
            self._compare_all(self.store.bank(namespace))
        for bank in self.banks:
            self._compare_found(bank)
        for number, namespace in enumerate(NAMESPACES):
            texts = {name: TOKENIZER.decode(row.ids) for name, row in self.live(namespace).items()}
            wanted = passages_of(Recall(PlainTexts(texts), ""))
            assert [passages_of(recalls[number]) for recalls in self.recalls] == [wanted] * 2

    def _compare_all(self, bank: StoreBank) -> None:
        """The bank finds every chunk of its namespace, and nothing else."""
        rows = self.live(bank.namespace).values()
        assert self._compare_found(bank) == sum(-(-len(row.ids) // CHUNK) for row in rows)
        assert bank.tokens.tolist() == [sum(len(row.ids) for row in rows)]

    def _compare_found(self, bank: StoreBank) -> int:
        """All that can be found is of a document that is there now; how many chunks."""
        ids = {each.name: each.id for each in self.store.documents(bank.namespace)}
        found = bank.search(torch.ones(1, 2, 1, 4), int(bank.chunks) + 1)
        both = torch.stack([found.keys, found.values], dim=3) * found.mask[..., None, :, None]
        both = both.unflatten(4, (-1, CHUNK))  # (1, head, 1, 2, R, S, D)
        chunks = found.chunks[found.chunk_mask].view(2, -1)
        numbers, order = chunks.sort(dim=1)
        assert numbers[0].equal(numbers[1])  # every head finds all
        for at, chunk in enumerate(numbers[0].tolist()):
            origin = bank.provenance(0, chunk)
            assert origin.namespace == bank.namespace and origin.document is not None
            assert origin.document_id == ids.get(origin.document)
            row = self.live(bank.namespace)[origin.document]
            expected = torch.from_numpy(encoded(self.store, row).kv[origin.start_token // CHUNK])
            for head in range(2):
                assert torch.equal(both[0, head, 0, :, order[head, at]], expected[head])
        return chunks.shape[1]


def about(name: str, document: Document | DocumentInfo, tokens: int) -> tuple[Any, ...]:
    """What a document and its twin in the model have in common."""
    return name, tokens, document.metadata, document.added, document.expires, document.revision


def passages_of(recall: Recall) -> set[tuple[str, int, str]]:
    """What text search finds of words that are in all texts."""
    return {(each.document, each.start, each.text) for each in recall.search("0 1 2 3 4 5", 100)}


ENCODED: dict[tuple[int, ...], StoredChunks] = {}


def encoded(store: MemoryStore, document: Document) -> StoredChunks:
    """What memory holds of a document; the same in all lives."""
    if document.ids not in ENCODED:
        (ENCODED[document.ids],) = Encoder(MODEL, store.layout).encode([np.array(document.ids, dtype=np.uint32)])
    return ENCODED[document.ids]


def traces(store: MemoryStore, document: Document) -> Iterator[bytes]:
    """Everything that the files keep of a document: token ids, text, metadata, and its chunks."""
    yield np.array(document.ids, dtype="<u4").tobytes()
    yield (document.text or "").encode()
    yield document.metadata.get("secret", "").encode()
    yield encoded(store, document).kv.tobytes()
    yield encoded(store, document).keys.tobytes()


def bytes_of(store: MemoryStore) -> bytes:
    """All files of an open store, but those that SQLite keeps locks on and no text in."""
    # read by another process: closing a descriptor of it here would drop SQLite's locks
    catalog = subprocess.run(["cat", store.path / "catalog.sqlite"], stdout=subprocess.PIPE, check=True).stdout
    kept = ("catalog.sqlite", "catalog.sqlite-shm")
    return catalog + b"".join(path.read_bytes() for path in store.path.rglob("*") if path.name not in kept)


@pytest.mark.parametrize(("examples", "steps"), [(8, 12), pytest.param(150, 50, marks=pytest.mark.slow)])
def test_lives_are_as_in_the_model(examples: int, steps: int) -> None:
    quick = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    with quick_folder() as folder:
        Life.place = folder
        run_state_machine_as_test(Life, settings=quick)
