"""Random histories of a store with open banks, against a plain model of what a bank may find."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from tests.store.banks import SEGMENT, ids, make_model, make_store, memory_bank, queries
from torch import Tensor

from longmem import LongMem
from longmem.store.store import MemoryStore

MODEL: LongMem = make_model()
NAMESPACES = ["alice", "bob"]
NAMES = ["a", "b", "c"]
STEPS = some.lists(
    some.tuples(
        some.sampled_from(["add", "add", "append", "forget", "compact", "refresh", "look"]),
        some.sampled_from(NAMESPACES),
        some.sampled_from(NAMES),
        some.integers(1, 2 * SEGMENT + 3),
    ),
    min_size=4,
    max_size=12,
)


class View:
    """What a bank on one namespace may find: names, ids and how much of each, in order."""

    def __init__(self, store: MemoryStore, namespace: str) -> None:
        self.store, self.namespace = store, namespace
        self.documents: list[tuple[str, int, Tensor]] = []
        self.refresh()

    def refresh(self) -> None:
        self.documents = [(info.name, info.id, self.tokens(info.name)) for info in self.store.documents(self.namespace)]

    def tokens(self, name: str) -> Tensor:
        return torch.from_numpy(self.store.token_ids(self.namespace, name).astype("int64"))

    def notice(self) -> None:
        """Forgotten and replaced documents are gone, of appended ones the segment that was encoded anew."""
        now = {info.id: info for info in self.store.documents(self.namespace)}
        left = []
        for name, number, tokens in self.documents:
            if number in now:
                grown = now[number].tokens > len(tokens)
                left.append((name, number, tokens[: len(tokens) // SEGMENT * SEGMENT] if grown else tokens))
        self.documents = [each for each in left if len(each[2])]


@settings(max_examples=12, deadline=None)
@given(steps=STEPS, keep=some.sampled_from(["map", "memory", "device"]), loaded=some.booleans())
def test_a_bank_finds_what_is_there_and_nothing_else(
    steps: list[tuple[str, str, str, int]], keep: str, loaded: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder, make_store(Path(folder) / "m", MODEL) as store:
        store.add_document("alice", ids=ids(SEGMENT + 3), name="a")
        bank = store.bank(NAMESPACES, keep=keep)
        if loaded:
            bank.load()
        views = [View(store, namespace) for namespace in NAMESPACES]
        for number, (what, namespace, name, length) in enumerate(steps):
            there = name in {info.name for info in store.documents(namespace)}
            if what == "add":
                store.add_document(namespace, ids=ids(length, seed=number), name=name, replace=True)
            elif what == "append" and there:
                store.append(namespace, ids=ids(length, seed=number), name=name)
            elif what == "forget" and there:
                store.forget(namespace, name=name)
            elif what == "compact":
                store.compact()
            elif what == "refresh":
                bank.refresh()
            for view in views:
                view.notice() if what != "refresh" else view.refresh()
            if what == "look" or number == len(steps) - 1:
                _compare(store, bank, views)


def _compare(store: MemoryStore, bank: object, views: list[View]) -> None:
    asked = queries(bank, rows=2)
    found = bank.search(asked, 60)
    for row, view in enumerate(views):
        twin = memory_bank(store, MODEL, [(name, tokens) for name, _, tokens in view.documents])
        wanted = twin.search(asked[row : row + 1], 60)
        assert torch.equal(found.chunk_mask[row : row + 1], wanted.chunk_mask)
        torch.testing.assert_close(found.scores[row : row + 1], wanted.scores)
        mask = wanted.mask[..., None]
        assert torch.equal(found.keys[row : row + 1] * mask, wanted.keys * mask)
        assert torch.equal(found.values[row : row + 1] * mask, wanted.values * mask)
        assert int(bank.tokens[row]) == sum(len(tokens) for _, _, tokens in view.documents)
        allowed = {(name, number) for name, number, _ in view.documents}
        for chunk in found.chunks[row][found.chunk_mask[row]].unique().tolist():
            origin = bank.provenance(row, chunk)
            assert (origin.document, origin.document_id) in allowed
            assert origin.namespace == view.namespace
