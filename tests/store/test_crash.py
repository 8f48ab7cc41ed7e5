"""A store whose writer dies at any moment is as before or as after; readers beside a writer see whole states only."""

import errno
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.store.small import flip, open_small, quick_folder, state_of, words

from longmem.chat import Recall
from longmem.errors import StoreFull, StoreLocked
from longmem.store import MemoryStore, NewDocument, disk

Act = Callable[[MemoryStore], object]
FAILPOINTS = (
    "create.folder",  # the folder and the lock exist, no catalog
    "append.written",  # chunks are in the data files, not durable, unknown to the catalog
    "append.synced",
    "commit.begun",  # all rows are written, the transaction is open
    "commit.done",
    "compact.copied",  # the new generation is complete, the catalog still names the old one
    "compact.committed",  # the catalog names the new generation, the old files are still there
    "compact.unlinked",
    "compact.vacuumed",
    "export.written",
)


def failing(place: str, count: int = 1, code: int = 0) -> Callable[[str], None]:
    """Kill this process the ``count``-th time that it comes to a place, or raise an ``OSError`` of this code there."""
    left = [count]

    def reached(name: str) -> None:
        left[0] -= name == place
        if name == place and not left[0]:
            if not code:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(code, os.strerror(code))

    return reached


def fill(store: MemoryStore) -> None:
    """Three documents that share text across namespaces, one forgotten, one appended to."""
    for namespace, name, seed in (("alice", "a", 1), ("alice", "b", 2), ("bob", "c", 1), ("bob", "gone", 3)):
        store.add_document(namespace, words(seed, 300), name=name, time=float(seed))
    store.append("alice", words(4, 20), name="b")
    store.forget("bob", name="gone")


OPERATIONS: dict[str, Act] = {
    "add": lambda store: store.add_document("alice", words(7, 300), name="new", time=9.0),
    "add many": lambda store: list(
        store.add_documents("alice", [NewDocument(f"n{n}", words(n, 90), time=9.0) for n in range(3)])
    ),
    "replace": lambda store: store.add_document("alice", words(8, 200), name="a", time=9.0, replace=True),
    "append": lambda store: store.append("alice", words(9, 200), name="a"),
    "forget": lambda store: store.forget("alice", everything=True),
    "compact": lambda store: store.compact(),
    "repair": lambda store: store.verify(repair=True),
    "export": lambda store: store.export("alice", store.path.parent / "out.tar"),
    "import": lambda store: store.import_(store.path.parent / "export.tar", "carol"),
}


def state(path: Path) -> Any:
    """All that can be read, by a writer that goes on after the last one; clean if nothing was damaged."""
    with open_small(path) as store:
        return state_of(store), store.verify().problems


def size_of(path: Path) -> int:
    """Bytes of the data files."""
    return sum(file.stat().st_size for file in path.glob("*.bin"))


def forked(act: Callable[[], object]) -> int:
    """Run it in a process of its own."""
    child = os.fork()
    if not child:
        try:
            act()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def status(child: int) -> int:
    """The exit status of a process when it has ended, negative where it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def changed(path: Path, act: Act, place: str = "", count: int = 1) -> None:
    """Open a store and change it, dying where this says."""
    disk.reached = failing(place, count)
    with open_small(path) as store:
        act(store)


def prepared(folder: Path, name: str) -> Path:
    """A store for an operation to change."""
    origin = folder / "origin"
    with open_small(origin) as store:
        fill(store)
    with open_small(folder / "other") as other:
        other.add_document("alice", words(20, 500), name="a", time=1.0)
        other.export("alice", folder / "export.tar")
    if name == "repair":
        flip(*origin.glob("kv-*.bin"), 40)
    return origin


@pytest.mark.parametrize("name", ["create", *OPERATIONS])
def test_killed_at_every_named_point_it_is_before_or_after(name: str) -> None:
    act = OPERATIONS.get(name, OPERATIONS["add"])
    with quick_folder() as folder:
        origin, path, killed = prepared(folder, name), folder / "memory", 0

        def trial(*failpoint: Any) -> int:
            shutil.rmtree(path, ignore_errors=True)
            (folder / "out.tar").unlink(missing_ok=True)
            if name != "create":
                shutil.copytree(origin, path)
            return status(forked(partial(changed, path, act, *failpoint)))

        before = ({}, []) if name == "create" else state(origin)
        assert trial() == 0
        after = state(path)
        for point in FAILPOINTS:
            for count in range(1, 100):
                ended = trial(point, count)
                if ended == 0:
                    break
                assert ended == -signal.SIGKILL
                killed += 1
                found = state(path)
                if name == "add many":  # whole documents, one after the other
                    assert found[1] == [] and all(row in after[0]["alice"] for row in found[0]["alice"])
                else:
                    assert found in (before, after), f"{point}:{count}"
                assert not (folder / "out.tar").exists()  # whole or not at all
                assert len([*path.glob("k*.bin")]) <= 2  # no generation but one
                # the next one goes on
                assert status(forked(partial(changed, path, OPERATIONS["compact"] if found == after else act))) == 0
        assert killed > 0


def half(handle: int, data: Any, place: int, *, plain: Any = os.pwrite) -> int:
    """A disk that takes a part of a write and refuses the rest."""
    if len(data) <= 100:
        raise OSError(errno.ENOSPC, "full")
    return int(plain(handle, data[:100], place))


@pytest.mark.parametrize("point", ["half a write", "append.written", "commit.begun"])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("export", "forget")])
def test_a_full_disk_gives_one_line_and_the_state_as_before(
    name: str, point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = prepared(tmp_path, name)
    before, size = state(path)[0], size_of(path)
    with open_small(path) as store:
        monkeypatch.setattr(disk, "reached", failing(point, code=errno.ENOSPC))
        if point == "half a write":
            monkeypatch.setattr(os, "pwrite", half)
        with pytest.raises((StoreFull, OSError), match=r"No space left on device[^\n]*$"):
            OPERATIONS[name](store)
        monkeypatch.undo()
        assert state_of(store) == before and (size_of(path) == size or point == "commit.begun")
        OPERATIONS[name](store)  # once there is room, work goes on in the same process
        assert store.verify().clean


def test_a_forked_child_neither_gives_up_its_parents_lock_nor_keeps_it(tmp_path: Path) -> None:
    reading, told = os.pipe()
    with ExitStack() as ends:
        ends.enter_context(disk.writer_lock(tmp_path))
        assert status(forked(ends.close)) == 0
        with pytest.raises(StoreLocked), disk.writer_lock(tmp_path):
            pass
        child = forked(partial(os.read, reading, 1))  # lives on, with the file open
    try:
        with disk.writer_lock(tmp_path):
            pass
    finally:
        os.write(told, b"x")
        assert status(child) == 0


# a long life with kills at random moments, and readers beside it

Model = dict[tuple[str, str], str]
"""Texts by namespace and name."""


def steps(seed: int) -> Iterator[tuple[str, str, str, str]]:
    """Random changes that are all allowed: what, namespace, name, text."""
    draw, alive = random.Random(seed), set[tuple[str, str]]()
    while True:
        what, namespace = draw.choice(["add", "add", "append", "forget", "compact"]), draw.choice(["alice", "bob"])
        place = namespace, f"{namespace} {draw.randrange(6)}"
        if what in ("append", "forget") and place not in alive:
            continue
        alive = alive | {place} if what == "add" else alive - {place} if what == "forget" else alive
        yield what, *place, words(draw.randrange(30), draw.choice([20, 90, 300]))


def apply(model: Model, what: str, namespace: str, name: str, text: str) -> Model:
    """The model after a step."""
    place = namespace, name
    if what == "forget":
        return {key: text for key, text in model.items() if key != place}
    return model if what == "compact" else {**model, place: (model[place] if what == "append" else "") + text}


def change(store: MemoryStore, what: str, namespace: str, name: str, text: str) -> None:
    """The same in a store."""
    if what == "add":
        store.add_document(namespace, text, name=name, replace=True)
    elif what == "append":
        store.append(namespace, text, name=name)
    elif what == "forget":
        store.forget(namespace, name=name)
    else:
        store.compact()


def live(path: Path, seed: int, start: int, told: int) -> None:
    """Do all steps from ``start`` on; says the number of each that is done."""
    store = open_small(path)
    for number, (what, namespace, name, text) in enumerate(steps(seed)):
        if number < start:
            continue
        change(store, what, namespace, name, text)
        if what == "compact":
            store.close()
            store = open_small(path)
        os.write(told, f"{number}\n".encode())


def texts(store: MemoryStore, *namespaces: str) -> Model:
    """What the store has, in these namespaces or in all, as the model says it."""
    spaces = namespaces or store.namespaces()
    return {(space, each.name): store.text(space, each.name) for space in spaces for each in store.documents(space)}


def read_beside(path: Path, seed: int, stop: Path) -> None:
    """Every state that a reader sees is one that there was, and none is older than the one before."""
    script, model, done, seen = steps(seed), Model(), 0, 0
    with open_small(path, mode="read") as store:
        bank = store.bank("alice")
        while path.exists() and not stop.exists():
            with store.catalog.read():
                there = texts(store)
            while there != model:
                model, done = apply(model, *next(script)), done + 1
                assert done < 20_000, there
            found = bank.search(torch.ones(1, 2, 1, 4), 3)
            for chunk in found.chunks[found.chunk_mask].unique().tolist():
                assert bank.provenance(0, chunk).namespace == "alice"
            seen += 1
            if seen % 5 == 0:
                bank.refresh()
            time.sleep(0.02)
    assert seen > 3 and done > 3


@pytest.mark.parametrize(("kills", "readers", "seed"), [(30, 3, 0), pytest.param(300, 8, 1, marks=pytest.mark.slow)])
def test_killed_at_random_moments_nothing_that_returned_is_lost_and_readers_see_whole_states(
    kills: int, readers: int, seed: int
) -> None:
    """A writer is killed again and again; another one goes on with what was left; others read all the while."""
    draw, done, model = random.Random(seed), 0, Model()
    script = steps(seed)
    upcoming = next(script)
    with quick_folder() as folder:
        path, stop = folder / "memory", folder / "stop"
        open_small(path).close()
        children = [forked(partial(read_beside, path, seed, stop)) for _ in range(readers)]
        for _ in range(kills):
            reading, told = os.pipe()
            child = forked(partial(live, path, seed, done, told))
            os.close(told)
            time.sleep(draw.uniform(0.01, 0.25))
            os.kill(child, signal.SIGKILL)
            assert status(child) == -signal.SIGKILL
            with os.fdopen(reading) as stream:
                lines = stream.read().splitlines()
            while lines and done <= int(lines[-1]):
                model, upcoming, done = apply(model, *upcoming), next(script), done + 1
            with open_small(path) as store:
                assert store.verify().problems == []
                found = texts(store)
            if found != model:
                model, upcoming, done = apply(model, *upcoming), next(script), done + 1
            assert found == model, f"after {done} steps"
        stop.touch()
        assert [status(child) for child in children] == [0] * readers
    assert done > kills / 3


# threads


@pytest.mark.parametrize(("seconds", "least"), [(3.0, 30), pytest.param(60.0, 500, marks=pytest.mark.slow)])
def test_eight_threads_share_a_store_and_no_answer_is_wrong(seconds: float, least: int) -> None:
    """Each reads, writes and forgets in a namespace and compares every answer with a model; all search one of them."""
    rounds, wrong, ends = list[str](), list[str](), time.monotonic() + seconds

    def work(store: MemoryStore, recall: Recall, number: int) -> None:
        space, model, bank = f"user {number}", Model(), store.bank(f"user {number}")
        try:
            for what, _, name, text in steps(number):
                if wrong or time.monotonic() > ends:
                    return
                if what != "compact" or number == 0:
                    change(store, what, space, name, text)
                model = apply(model, what, space, name, text)
                assert texts(store, space) == model
                bank.refresh()
                found = bank.search(torch.ones(1, 2, 1, 4), int(bank.chunks) + 1)
                origins = [bank.provenance(0, chunk) for chunk in found.chunks[0, 0, 0].tolist() if chunk >= 0]
                assert sum(origin.length for origin in origins) == sum(len(text) + 1 for text in model.values())
                assert {(origin.namespace, origin.document) for origin in origins} == model.keys()
                passages = recall.notes(text, lambda text, **_: {"input_ids": text.split()})[1]
                assert number or {each.document for each in passages} <= {name for _, name in model}
                rounds.append(what)
        except Exception as error:
            wrong.append(f"{space}: {type(error).__name__} {error}")

    with quick_folder() as folder, open_small(folder / "memory") as store:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(partial(work, store, Recall(store, "user 0")), range(8)))
        assert wrong == [] and len(rounds) > least
        assert store.verify().clean
