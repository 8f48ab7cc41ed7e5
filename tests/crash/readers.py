"""Many readers beside one writer: every state that a reader sees is one that there was, and no older than the last.

The writer counts its changes. Before each it notes in a journal what the store will hold, a hash of all documents;
after it, it writes the number into a document of its own, the clock. Who sees the clock at n must see state n or n + 1.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from tests.crash.forks import Say
from tests.crash.operations import small_steps
from tests.store.small import BEGIN, MODEL, SEGMENT, open_small, words
from torch import Tensor

from longmem.errors import StoreError
from longmem.store import MemoryStore, compacting
from longmem.store.bank import StoreBank
from longmem.types import ChunkOrigin

NAMESPACES = ["alice", "bob"]
CHUNK = 2
State = dict[tuple[str, str], tuple[str, int]]
"""Text and revision by namespace and name."""


def stage(say: Say, path: str, readers: int, seconds: float, changes: int) -> None:
    """A writer and its readers, each a process; says what each of them did, or its traceback.

    Args:
        seconds, changes: the writer goes on for so long, and until it has made so many changes.
    """
    folder = Path(path)
    open_small(folder).close()
    folder.with_name("journal").write_text(hash_of({}) + "\n")  # moment 0
    ends = time.monotonic() + seconds
    names = ["writer", *(f"reader {number}" for number in range(readers))]
    children = {_child(folder, names[0], lambda counts: write(folder, ends, changes, counts))}
    for number, name in enumerate(names[1:]):

        def act(counts: Counter[str], seed: int = number) -> None:
            Reader(folder, seed, counts).read_beside_the_writer()

        children.add(_child(folder, name, act))
    while children:
        child, _ = os.waitpid(-1, os.WNOHANG)
        children.discard(child)
        if not child:
            time.sleep(1.0)
            say(["waiting", len(children)])
    for name in names:
        say([name, json.loads(folder.with_name(name).read_text())])
    with open_small(folder) as store:
        say(["problems", [vars(problem) for problem in store.verify().problems]])


def _child(folder: Path, name: str, act: Callable[[Counter[str]], None]) -> int:
    child = os.fork()
    if child:
        return child
    counts: Counter[str] = Counter()
    fault = None
    try:
        act(counts)
    except BaseException:
        fault = traceback.format_exc()
    folder.with_name(name).write_text(json.dumps({"counts": counts, "fault": fault}))
    os._exit(0)


# writing


def part_of(serial: int, number: int, body: str) -> str:
    """A part of a text that says itself whether it is whole."""
    return f"<{serial:06d}.{number:03d}.{len(body):04d}.{zlib.crc32(body.encode()):08x}>{body}"


def parts_in(text: str) -> int:
    """How many parts a text has, all of them whole and in order."""
    at = parts = 0
    while at < len(text):
        _, number, length, check = text[at + 1 : at + 25].split(".")
        body = text[at + 26 : at + 26 + int(length)]
        assert (int(number), int(check, 16), len(body)) == (parts, zlib.crc32(body.encode()), int(length))
        at += 26 + int(length)
        parts += 1
    return parts


def hash_of(state: State) -> str:
    """Of all documents."""
    return hashlib.sha256(json.dumps(sorted([*key, *value] for key, value in state.items())).encode()).hexdigest()


def write(folder: Path, ends: float, changes: int, counts: Counter[str]) -> None:
    """Add, replace, append, forget and compact until it is time, and close and open again now and then."""
    draw = random.Random(0)
    state: State = {}
    with (
        small_steps(),
        patch.object(compacting, "READER_SECONDS", 0.2),
        folder.with_name("journal").open("a") as journal,
    ):
        store = open_small(folder)
        while time.monotonic() < ends or counts["changes"] < changes:
            number = counts["changes"] + 1
            kind = draw.choice(["add", "add", "replace", "append", "append", "forget", "forget all", "compact"])
            if counts["changes"] % 40 == 39:
                store.close()
                store = open_small(folder)
                counts["reopened"] += 1
            act = plan(state, kind, number, draw)
            if act is None:
                continue
            journal.write(hash_of(state) + "\n")
            journal.flush()
            act(store)
            store.add_document("clock", f"{number}", name="clock", time=0.0, replace=True)
            counts.update(["changes", kind])
        store.close()


def plan(state: State, kind: str, number: int, draw: random.Random) -> Callable[[MemoryStore], object] | None:
    """Change the state that is to be; what does it to a store. None where it cannot be done."""
    namespace = draw.choice(NAMESPACES)
    body = words(number, draw.choice([10, 60, 200, 400]))
    own = sorted(name for space, name in state if space == namespace)
    if kind == "compact":
        return lambda store: store.compact()
    if kind == "forget all":
        if len(own) < 6:
            return None
        for name in own:
            del state[namespace, name]
        return lambda store: store.forget(namespace, everything=True)
    if kind == "add":
        state[namespace, f"{number}"] = (part_of(number, 0, body), 1)
        return lambda store: store.add_document(namespace, part_of(number, 0, body), name=f"{number}")
    if not own:
        return None
    name = draw.choice(own)
    text, revision = state[namespace, name]
    if kind == "forget":
        del state[namespace, name]
        return lambda store: store.forget(namespace, name=name)
    if kind == "append":
        part = part_of(number, parts_in(text), body)
        state[namespace, name] = (text + part, revision + 1)
        return lambda store: store.append(namespace, part, name=name)
    state[namespace, name] = (part_of(number, 0, body), revision + 1)
    return lambda store: store.add_document(namespace, part_of(number, 0, body), name=name, replace=True)


# reading


class Reader:
    """Looks at the store again and again, in all ways there are."""

    def __init__(self, folder: Path, seed: int, counts: Counter[str]) -> None:
        self._folder = folder
        self._draw = random.Random(seed)
        self._counts = counts
        self._clock = self._commits = 0

    def read_beside_the_writer(self) -> None:
        """Look until it has ended, and open the store anew now and then."""
        while not self._alone() or not self._counts["states"]:
            with open_small(self._folder, mode="read") as store:
                self._counts["opened"] += 1
                bank = store.bank(NAMESPACES, keep=self._draw.choice(["map", "memory"]))
                for _ in range(self._draw.randint(1, 30)):
                    self._look_at_state(store)
                    self._search(store, bank)
                    if self._draw.random() < 0.3:
                        bank.refresh()
                        self._counts["refreshed"] += 1
                    if self._alone():
                        break

    def _alone(self) -> bool:
        return self._folder.with_name("writer").exists()

    def _look_at_state(self, store: MemoryStore) -> None:
        with store.snapshot() as snapshot:
            clock = int(store.text("clock", "clock")) if "clock" in store.namespaces() else 0
            state: State = {}
            for namespace in NAMESPACES:
                for info in store.documents(namespace):
                    text = store.text(namespace, info.name)
                    assert parts_in(text) >= 1
                    assert store.token_ids(namespace, info.name).tolist() == [BEGIN, *text.encode()]
                    assert info.tokens == len(text) + 1
                    state[namespace, info.name] = (text, info.revision)
            commits = snapshot.commits()
        assert clock >= self._clock and commits >= self._commits, "an older state than before"
        journal = self._folder.with_name("journal").read_text().splitlines()
        assert hash_of(state) in journal[clock : clock + 2], f"no state of moment {clock}"
        self._clock, self._commits = clock, commits
        self._counts["states"] += 1

    def _search(self, store: MemoryStore, bank: StoreBank) -> None:
        there = {(space, info.id) for space in NAMESPACES for info in store.documents(space)}
        found = bank.search(torch.randn(len(NAMESPACES), 2, 2, 4), 6)
        both = torch.stack([found.keys, found.values], dim=-2)  # (B, H, T, K, 2, D)
        for row, namespace in enumerate(NAMESPACES):
            for head, query, slot in (found.chunk_mask[row]).nonzero().tolist():
                origin = bank.provenance(row, int(found.chunks[row, head, query, slot]))
                assert origin.namespace == namespace
                assert (namespace, origin.document_id) in there, "forgotten before, and found"
                expected = remembered(bank, origin)
                if expected is not None:
                    begin = slot * CHUNK
                    assert torch.equal(both[row, head, query, begin : begin + origin.length], expected[:, :, head])
                    self._counts["chunks"] += 1
        self._counts["searches"] += 1


def remembered(bank: StoreBank, origin: ChunkOrigin) -> Tensor | None:
    """(length, 2, Hkv, D): what memory holds of the text of a chunk; None where its document is gone by now."""
    try:
        passage = bank.passage(origin, around=1)
    except StoreError:
        return None
    text = [BEGIN, *passage.text.encode()] if origin.start_token == 0 else [*passage.text.encode()]
    assert len(text) == origin.length
    own = MODEL.table[torch.tensor(text)]
    before = torch.zeros_like(own)
    before[1:] = own[:-1]
    if origin.start_token % SEGMENT:
        before[0] = MODEL.table[passage.before.encode()[-1]]
    return own + 0.25 * before
