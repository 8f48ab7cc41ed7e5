"""Any life of a store against a plain model of it: namespaces stay apart, and what is forgotten is gone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as some
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from tests.store.small import MODEL, expected_chunks, open_small, quick_folder
from tests.store.twin import Document, Twin, make_document
from torch import Tensor

from longmem.errors import StoreError
from longmem.store.bank import StoreBank
from longmem.store.catalog import DocumentInfo

NAMESPACES = ["alice", "bob", "carol"]
SPACE = some.sampled_from(NAMESPACES)
NAME = some.sampled_from(["a", "b", "c"])
SEED = some.integers(0, 5)
LENGTH = some.sampled_from([5, 40, 90, 200, 300])
"""Within a segment, within a piece, and over two and three pieces."""
AGE = some.sampled_from([1.0, 5.0, 60.0])
CHUNK = 2


class Life(RuleBasedStateMachine):
    """A store, a reader of it and banks held open; after every change all that they say is compared with the model."""

    counts: dict[str, int]

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000_000.0
        self.clock = patch("time.time", lambda: self.now)
        self.clock.start()
        self.folder = tempfile.TemporaryDirectory(dir=FOLDER[-1])
        self.path = Path(self.folder.name) / "memory"
        self.store = open_small(self.path)
        self.reader = open_small(self.path, mode="read")
        self.twin = Twin()
        self.added = 0
        self.banks: list[StoreBank] = []

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

    # what changes it

    @rule(
        namespace=SPACE, name=NAME, seed=SEED, length=LENGTH, as_ids=some.booleans(), age=some.none() | AGE,
        replaces=some.booleans(),
    )  # fmt: skip
    def add(
        self, namespace: str, name: str, seed: int, length: int, as_ids: bool, age: float | None, replaces: bool
    ) -> None:
        expires = None if age is None else self.now + age
        self.added += 1
        new = make_document(self.added, name, seed, length, as_ids, self.now)
        old = self.twin.find(namespace, name, self.now)

        def write() -> str:
            receipt = self.store.add_document(
                namespace,
                new.text,
                ids=None if new.text is not None else new.ids,
                name=name,
                metadata=new.metadata,
                expires=expires,
                replace=replaces,
            )
            assert receipt.tokens == len(new.ids)
            return receipt.status

        if old is not None and not old.same(new) and not replaces:
            with pytest.raises(StoreError, match="has another document"):
                write()
        elif old is None or not old.same(new):
            assert write() == ("added" if old is None else "replaced")
            revision = 1 if old is None else old.revision + 1
            self.twin.put(namespace, replace(new, expires=expires, revision=revision))
        elif expires == old.expires or (expires is None and not replaces):
            assert write() == "unchanged"
        else:
            assert write() == "updated"
            self.twin.rows[namespace][name] = replace(old, expires=expires)

    @rule(namespace=SPACE, name=NAME, seed=SEED, length=LENGTH)
    def append(self, namespace: str, name: str, seed: int, length: int) -> None:
        old = self.twin.find(namespace, name, self.now)
        if old is None:
            with pytest.raises(StoreError, match="no document"):
                self.store.append(namespace, "more", name=name)
            return
        new = self.twin.append(namespace, name, seed, length)
        more = new.ids[len(old.ids) :]
        if old.text is None:
            receipt = self.store.append(namespace, ids=more, name=name)
        else:
            receipt = self.store.append(namespace, bytes(more).decode(), name=name)
        assert (receipt.status, receipt.tokens, receipt.revision) == ("appended", len(new.ids), new.revision)

    @rule(namespace=SPACE, name=NAME)
    def forget(self, namespace: str, name: str) -> None:
        if name not in self.twin.rows.get(namespace, {}):
            with pytest.raises(StoreError, match="no document"):
                self.store.forget(namespace, name=name)
        else:
            self._forgotten(namespace, self.store.forget(namespace, name=name), lambda row: row.name == name)

    @rule(namespace=SPACE, age=some.none() | AGE, kind=some.sampled_from([None, "note", "letter"]))
    def forget_several(self, namespace: str, age: float | None, kind: str | None) -> None:
        before, where = None if age is None else self.now - age, None if kind is None else {"kind": kind}
        found = self.store.forget(namespace, before=before, where=where, everything=before is None and where is None)

        def gone(row: Document) -> bool:
            return (before is None or row.added < before) and (kind is None or row.metadata.get("kind") == kind)

        self._forgotten(namespace, found, gone)

    def _forgotten(self, namespace: str, found: list[DocumentInfo], which: Callable[[Document], bool]) -> None:
        gone = [row for row in self.twin.rows.get(namespace, {}).values() if which(row)]
        assert sorted((each.name, each.tokens) for each in found) == sorted((row.name, len(row.ids)) for row in gone)
        for row in gone:
            self.twin.remove(namespace, row.name)

    @rule(age=AGE)
    def wait(self, age: float) -> None:
        self.now += age

    @rule()
    def compact(self) -> None:
        expired = self.twin.remove_expired(self.now)
        done = self.store.compact()
        assert (done.documents, done.emptied) == (expired, True)
        assert self.twin.left_of_buried(self.store) == []

    @rule()
    def reopen(self) -> None:
        self.reader.close()
        self.store.close()
        self.banks.clear()
        self.store = open_small(self.path)
        self.reader = open_small(self.path, mode="read")

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
            spaces = [name for name in NAMESPACES if self.twin.live(name, self.now)]
            assert store.namespaces() == spaces
            for namespace in NAMESPACES:
                rows = self.twin.live(namespace, self.now)
                have = [
                    (each.namespace, each.name, each.tokens, each.metadata, each.added, each.expires, each.revision)
                    for each in store.documents(namespace)
                ]
                assert have == [
                    (namespace, row.name, len(row.ids), row.metadata, row.added, row.expires, row.revision)
                    for row in rows
                ]
                stats = store.stats(namespace)
                assert (stats.documents, stats.tokens) == (len(rows), sum(len(row.ids) for row in rows))
                assert stats.expired == len(self.twin.rows.get(namespace, {})) - len(rows)
        for namespace in NAMESPACES:
            for row in self.twin.live(namespace, self.now):
                assert store.token_ids(namespace, row.name).tolist() == list(row.ids)
                assert row.text is None or store.text(namespace, row.name) == row.text
        for namespace in NAMESPACES:
            self._compare_all(self.store.bank(namespace))
        for bank in self.banks:
            self._compare_found(bank)

    def _compare_all(self, bank: StoreBank) -> None:
        """The bank finds every chunk of its namespace, and nothing else."""
        rows = self.twin.live(bank.namespace, self.now)
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
            row = self.twin.find(bank.namespace, origin.document, self.now)
            assert row is not None
            expected = self._chunks(row)[origin.start_token // CHUNK]
            for head in range(2):
                assert torch.equal(both[0, head, 0, :, order[head, at]], expected[head])
        return chunks.shape[1]

    def _chunks(self, row: Document) -> Tensor:
        """(n, head, 2, S, D): what memory holds of a document."""
        if row.ids not in self.encoded:
            self.encoded[row.ids] = torch.from_numpy(expected_chunks(self.store, MODEL, row.ids).kv)
        return self.encoded[row.ids]

    encoded: dict[tuple[int, ...], Tensor] = {}  # noqa: RUF012  of one test run; the same for all lives


FOLDER: list[Path] = []
"""Where lives are lived."""


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
        FOLDER.append(folder)
        run_state_machine_as_test(Life, settings=quick)
        FOLDER.pop()
