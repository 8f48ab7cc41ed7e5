"""Everything that changes a store, as trials: the store before, what a child does, and the states it may leave.

In small: files, pieces and commits are tiny, so that every operation makes several of each.
"""

from __future__ import annotations

import shutil
import sqlite3
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.crash.forks import Say
from tests.store.small import MODEL, NumberModel, open_small, state_of, words

from longmem.errors import StoreDamaged, StoreError, StoreFull
from longmem.store import MemoryStore, NewDocument, adding, compacting, durable, importing
from longmem.store.migrations import MIGRATIONS

State = Any
"""What ``state_of`` says; None where there is no store, ``damaged`` where it cannot be read."""


@dataclass(frozen=True)
class Operation:
    """Something that can be killed.

    Attributes:
        prepare: makes what is there before.
        act: does it with the open store, and says a word after everything that is promised to stay.
        settings: in which it happens, in the child and wherever the store is looked at afterwards.
        model: that the store is opened with.
        again: whether it can be done again when it had been done.
    """

    prepare: Callable[[Path], None]
    act: Callable[[MemoryStore, Say], None]
    settings: Callable[[], AbstractContextManager[object]] = ExitStack
    model: NumberModel = MODEL
    again: bool = True

    def open(self, path: Path) -> MemoryStore:
        """The store, to write."""
        return open_small(path, model=self.model)

    def run(self, path: Path, say: Say) -> None:
        """Do it, from opening to closing."""
        with self.open(path) as store:
            self.act(store, say)


@contextmanager
def small_steps() -> Iterator[None]:
    """Data files of some KiB, commits of two documents, and long documents committed piece by piece."""
    with ExitStack() as stack:
        for module in (adding, compacting, importing):
            stack.enter_context(patch.object(module, "FILE_BYTES", 12_000))
        stack.enter_context(patch.object(adding, "COMMIT_DOCUMENTS", 2))
        yield


# what is there before


def nothing(path: Path) -> None:
    """No folder."""


def some_documents(path: Path) -> None:
    """Two namespaces that share a text, a document with an end, and one that has expired."""
    with open_small(path) as store:
        store.add_document("alice", words(1, 300), name="long", time=1.0, metadata={"kind": "letter"})
        store.add_document("alice", words(2, 40), name="short", time=2.0, metadata={"kind": "note"}, expires=4e9)
        store.add_document("alice", words(3, 150), name="gone", time=3.0, metadata={"kind": "note"}, expires=4.0)
        store.add_document("bob", words(1, 300), name="long", time=4.0, source="alice")
        store.add_document("bob", ids=range(21), name="ids", time=5.0)


def forgotten_documents(path: Path) -> None:
    """The same, half of it forgotten: dead contents beside living ones, and whole files of them."""
    some_documents(path)
    with open_small(path) as store:
        for number in range(4):
            store.add_document("alice", words(10 + number, 90), name=f"{number}", time=10.0 + number)
        store.add_document("carol", words(20, 200), name="all of it", time=20.0)
        store.forget("carol", everything=True)
        store.forget("alice", name="1")
        store.forget("bob", name="long")


def leftovers(path: Path) -> None:
    """The same, with what killed writers leave: unfinished files, and data files that nobody knows."""
    some_documents(path)
    (path / "staging" / "0123456789abcdef.safetensors").write_bytes(b"half")
    (path / "staging" / "catalog.seal").write_bytes(b"{")
    data = next((path / "segments").iterdir())
    for number in range(2):
        shutil.copy(data, data.with_name(f"{number:016x}.safetensors"))


def damaged_files(path: Path) -> None:
    """The same, one data file with a flipped byte and one missing."""
    some_documents(path)
    first, second, *_ = sorted((path / "segments").iterdir(), key=lambda each: each.stat().st_size)
    data = bytearray(second.read_bytes())
    data[-100] ^= 1
    second.write_bytes(bytes(data))
    first.unlink()


def archive_beside(path: Path) -> None:
    """The same, and an export of another store."""
    some_documents(path)
    with open_small(path.parent / "other") as store:
        for number, length in enumerate((300, 250, 40)):
            store.add_document("alice", words(number, length), name=f"{number}", time=70.0 + number)
        store.export("alice", path.parent / "archive.tar")


# what is done


def only_open(_: MemoryStore, say: Say) -> None:
    say("open")


def add(store: MemoryStore, say: Say) -> None:
    say(store.add_document("alice", words(30, 450), name="new", time=30.0, metadata={"n": 1}).status)


def add_many(store: MemoryStore, say: Say) -> None:
    texts = [words(40, 60), words(41, 250), words(1, 300), words(41, 250), words(44, 70)]
    new = (NewDocument(f"many {number}", text, time=40.0 + number) for number, text in enumerate(texts))
    for receipt in store.add_documents("bob", new):
        say(receipt.name)


def replace(store: MemoryStore, say: Say) -> None:
    say(store.add_document("alice", words(50, 200), name="long", time=50.0, replace=True).status)


def append(store: MemoryStore, say: Say) -> None:
    say(store.append("alice", words(60, 250), name="long").status)


def forget(store: MemoryStore, say: Say) -> None:
    say(store.forget("alice", where={"kind": "note"}).tokens)


def compact(store: MemoryStore, say: Say) -> None:
    say(store.compact().tokens)


def repair(store: MemoryStore, say: Say) -> None:
    report = store.verify(repair=True)
    if not report.clean:  # verify reports and does not raise; here what failed is to be seen
        left = next(problem for problem in report.problems if not problem.repaired)
        said = {"make room": StoreFull, "allow writing": StoreFull, "the device fails": StoreDamaged}
        raise next((kind for words, kind in said.items() if words in left.what), StoreError)(left.what)
    say("repaired")


def export(store: MemoryStore, say: Say) -> None:
    path = store.path.parent / "exported.tar"
    store.export("alice", path)
    with tarfile.open(path) as tar:
        say(len(tar.getmembers()))


def import_(store: MemoryStore, say: Say) -> None:
    for receipt in store.import_(store.path.parent / "archive.tar", "dora"):
        say(receipt.name)


@contextmanager
def newer_version() -> Iterator[None]:
    """A version of longmem with two more steps of the schema."""

    def index(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE INDEX documents_by_time ON documents (added)")

    def table(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE marks (document INTEGER PRIMARY KEY, mark TEXT NOT NULL)")

    known = len(MIGRATIONS)
    MIGRATIONS.extend((index, table))
    try:
        yield
    finally:
        del MIGRATIONS[known:]


OTHER_DEVICE = NumberModel()
"""The same model where it rounds otherwise."""
OTHER_DEVICE.table = OTHER_DEVICE.table * (1 + 2**-20)

OPERATIONS: dict[str, Operation] = {
    "create": Operation(nothing, only_open),
    "add": Operation(some_documents, add),
    "add many": Operation(some_documents, add_many),
    "replace": Operation(some_documents, replace),
    "append": Operation(some_documents, append, again=False),
    "forget": Operation(some_documents, forget),
    "compact": Operation(forgotten_documents, compact),
    "sweep": Operation(leftovers, only_open),
    "repair": Operation(damaged_files, repair),
    "repair elsewhere": Operation(damaged_files, repair, model=OTHER_DEVICE),
    "export": Operation(some_documents, export),
    "import": Operation(archive_beside, import_),
    "migrate": Operation(some_documents, only_open, newer_version),
}


# trials


def see(store: MemoryStore) -> State:
    """What can be read of an open store."""
    try:
        return state_of(store)
    except StoreDamaged:
        return "damaged"


def read_state(path: Path) -> State:
    """What a reader finds."""
    try:
        with open_small(path, mode="read", model=None) as store:
            return see(store)
    except StoreDamaged:
        return "damaged"
    except StoreError as error:
        if "no memory store here" in str(error) or "never finished" in str(error):
            return None
        if "open it to write once" in str(error):  # to be migrated
            with open_small(path) as store:
                return state_of(store)
        raise


def states_of(operation: Operation, path: Path) -> list[State]:
    """The state before an operation, and after everything that it promises."""
    operation.prepare(path)
    states = [read_state(path)]
    with small_steps(), operation.settings():
        operation.run(path, lambda _: states.append(read_state(path)))
    return states


class Reached(dict[str, Any]):
    """In the place of the armed failpoints: counts who asks."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __contains__(self, name: object) -> bool:
        self.counts[str(name)] += 1
        return False


def count(say: Say, operation: str, path: str) -> None:
    """Do an operation and say how often it comes to which failpoint."""
    reached = Reached()
    with patch.object(durable, "_armed", reached):
        do(lambda _: None, operation, path)
    say(reached.counts)


def do(say: Say, operation: str, path: str, failpoint: str | None = None) -> None:
    """Do an operation; ``failpoint`` as in LONGMEM_FAILPOINT."""
    chosen = OPERATIONS[operation]
    with small_steps(), chosen.settings(), ExitStack() as stack:
        if failpoint is not None:
            armed = durable._Armed(failpoint)
            stack.enter_context(patch.object(durable, "_armed", {armed.name: armed}))
        chosen.run(Path(path), say)
