"""Damaged files: every question asked of a store gets the right answer or one clear line, in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tests.crash.forks import Say
from tests.store.small import NumberModel, chunks_of, open_small, words

from longmem.errors import LongMemError, StoreDamaged
from longmem.store import MemoryStore, adding
from longmem.store.records import Dtype

MODEL = NumberModel(heads=4, dim=16)
NAMES = {"alice": ["0", "1", "2", "forgotten"], "bob": ["0", "ids", "last"], "nobody": ["0"]}
VARIANTS: dict[str, Dtype] = {"sealed": "float16", "unsealed": "int8", "killed": "bfloat16", "copied": "float32"}
"""Closed; closed, without its seal; left by a killed writer, with a write-ahead log; left by one that had brought the
log into the catalog and not yet emptied it."""


def make(path: Path, dtype: Dtype) -> None:
    """Data files of one and of several blocks, shared and dead contents, all kinds of rows."""
    with open_small(path, model=MODEL, dtype=dtype) as store, patch.object(adding, "FILE_BYTES", 100_000):
        for number, length in enumerate((700, 40, 260)):
            store.add_document("alice", words(number, length), name=f"{number}", time=float(number), metadata={"n": 1})
        store.add_document("bob", words(0, 700), name="0", source="alice", time=4.0, expires=4e9)
        store.add_document("bob", ids=range(33), name="ids", time=5.0)
        store.append("bob", ids=range(20), name="ids")
        store.add_document("alice", words(8, 90), name="forgotten", time=8.0)
        store.forget("alice", name="forgotten")


def make_variant(say: Say, path: str, known: str, variant: str) -> None:
    """A store in one of the ``VARIANTS``, and its right answers: the newest, then those that a lost log would leave."""
    folder = Path(path)
    make(folder, VARIANTS[variant])
    keep_answers(folder, Path(known))
    if variant == "unsealed":
        (folder / "catalog.seal").unlink()
    if variant in ("killed", "copied"):
        store = open_small(folder, model=MODEL)
        store.add_document("bob", words(9, 120), name="last", time=9.0)
        keep_answers(folder, Path(known))
        store.forget("alice", name="1")
        keep_answers(folder, Path(known))
        if variant == "copied":
            other = sqlite3.connect(folder / "catalog.sqlite")
            busy, pages, copied = other.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            assert not busy and pages == copied > 0
        os.kill(os.getpid(), signal.SIGKILL)


def keep_answers(folder: Path, known: Path) -> None:
    """Put the answers of a whole store in front of those that are known."""
    before = json.loads(known.read_text()) if known.exists() else []
    with open_small(folder, mode="read", model=MODEL) as store:
        known.write_text(json.dumps([answers(store), *before]))


# what is asked


def questions(store: MemoryStore) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Everything that is asked, each for itself."""
    yield "namespaces", store.namespaces
    yield "stats", lambda: [vars(store.stats(name)) for name in NAMES]
    yield "all stats", lambda: {**vars(store.stats()), "catalog_bytes": None}
    for namespace, names in NAMES.items():
        yield f"{namespace}: documents", lambda name=namespace: [vars(each) for each in store.documents(name)]
        yield f"{namespace}: chunks", lambda name=namespace: digest_of_chunks(store, name)
        yield f"{namespace}: search", lambda name=namespace: found_by_search(store, name)
        for name in names:
            yield f"{namespace}/{name}: row", lambda at=(namespace, name): vars(store.document(*at))
            yield f"{namespace}/{name}: text", lambda at=(namespace, name): store.text(*at)
            yield f"{namespace}/{name}: ids", lambda at=(namespace, name): store.token_ids(*at).tolist()


def digest_of_chunks(store: MemoryStore, namespace: str) -> str:
    """Of all that data files hold of a namespace."""
    digest = hashlib.sha256()
    for name, first, chunks in chunks_of(store, namespace):
        digest.update(repr((name, first, len(chunks))).encode())
        for array in (chunks.kv, chunks.keys, chunks.lengths, chunks.scales):
            digest.update(b"" if array is None else array.tobytes())
    return digest.hexdigest()


def found_by_search(store: MemoryStore, namespace: str) -> list[Any]:
    """What some queries find, and where it came from."""
    bank = store.bank(namespace)
    queries = torch.randn(1, 4, 3, 16, generator=torch.Generator().manual_seed(1))
    found = bank.search(queries, 5)
    chunks = [chunk for chunk in found.chunks.flatten().unique().tolist() if chunk >= 0]
    origins = [vars(bank.provenance(0, chunk)) for chunk in chunks]
    both = torch.stack([found.keys, found.values]) * found.mask[..., None]
    return [found.scores.flatten().tolist(), origins, hashlib.sha256(both.float().numpy().tobytes()).hexdigest()]


def answers(store: MemoryStore) -> dict[str, Any]:
    """The answer to every question; an error is an answer, too."""
    said: dict[str, Any] = {}
    for question, ask in questions(store):
        try:
            said[question] = json.loads(json.dumps(ask()))
        except LongMemError as error:
            said[question] = f"{type(error).__name__}: {error}"
    return said


# damage


def flip_bit(data: bytearray, draw: random.Random) -> str:
    at = draw.randrange(len(data))
    data[at] ^= 1 << draw.randrange(8)
    return f"bit of byte {at}"


def other_byte(data: bytearray, draw: random.Random) -> str:
    at = draw.randrange(len(data))
    data[at] = (data[at] + draw.randrange(1, 256)) % 256
    return f"byte {at}"


def cut(data: bytearray, draw: random.Random) -> str:
    keep = draw.choice([0, len(data) - 1, draw.randrange(len(data)), draw.randrange(len(data)) // 4096 * 4096])
    del data[keep:]
    return f"cut to {keep}"


def zero_stretch(data: bytearray, draw: random.Random) -> str:
    size = min(len(data), draw.choice([16, 512, 4096]))
    at = draw.randrange(len(data)) // size * size
    data[at : at + size] = bytes(len(data[at : at + size]))
    return f"zeros from {at}"


def swap_pages(data: bytearray, draw: random.Random) -> str:
    one, other = (draw.randrange(max(1, len(data) // 4096)) * 4096 for _ in range(2))
    data[one : one + 4096], data[other : other + 4096] = data[other : other + 4096], data[one : one + 4096]
    return f"pages {one} and {other} swapped"


def longer(data: bytearray, draw: random.Random) -> str:
    data.extend(draw.randbytes(draw.choice([1, 100, 5000])))
    return "longer"


DAMAGES = [flip_bit] * 7 + [other_byte] * 4 + [cut] * 5 + [zero_stretch] * 2 + [swap_pages, longer]


def damage(path: Path, seed: int) -> tuple[str, str, str] | None:
    """Damage a file of a store: which one, the kind of damage, and where; None where nothing has changed after all."""
    draw = random.Random(seed)
    data_files = sorted(each.name for each in (path / "segments").iterdir())
    others = {"catalog.sqlite": 9, "catalog.sqlite-wal": 6, "catalog.sqlite-shm": 1, "catalog.seal": 1}
    there = [name for name in others if (path / name).exists() and (path / name).stat().st_size]
    weights = [9, *(others[name] for name in there)]
    (name,) = draw.choices([f"segments/{draw.choice(data_files)}", *there], weights)
    data = bytearray((path / name).read_bytes())
    before = bytes(data)
    kind = draw.choice(DAMAGES)
    where = kind(data, draw)
    (path / name).write_bytes(data)
    return None if bytes(data) == before else (name, kind.__name__, where)


# trials


def trial(say: Say, scratch: str, original: str, known: str, variant: str, seed: int) -> None:
    """Damage a copy, ask everything of it, verify and repair it; says the damage, all faults, and what came of it."""
    folder = Path(scratch) / "trial"
    shutil.copytree(original, folder)
    found = damage(folder, seed)
    say(["damaged", found])
    if found is not None:
        look = Look(say, folder, Path(original), json.loads(Path(known).read_text()), found[0], variant)
        look.ask()
        look.verify()
        look.repair()
        say(["outcome", look.outcome])


class Look:
    """A look at a damaged store.

    Args:
        right: the right answers, the newest first; see ``make_variant``.
        damaged: the file.

    Attributes:
        outcome: whether anything was ``refused``, the damage was ``found`` by verify, and it was ``repaired``.
    """

    def __init__(
        self, say: Say, folder: Path, original: Path, right: list[dict[str, Any]], damaged: str, variant: str
    ) -> None:
        self._say, self._folder, self._original, self._right = say, folder, original, right
        self._data = damaged.startswith("segments/")
        self._log = damaged.endswith("-wal")
        self._must_be_found = self._data or (variant == "sealed" and not damaged.endswith("-shm"))
        self.outcome = {"refused": False, "found": False, "repaired": False}

    def ask(self) -> None:
        """Ask everything, of the store as it is opened and as it is opened in spite of what is wrong."""
        for check in (True, False):
            if not check and (self._log or self._data):
                continue  # lost transactions are noticed when a store is opened; of data files nothing is
            try:
                with open_small(self._folder, mode="read", model=MODEL, check=check) as store:
                    said = answers(store)
            except LongMemError as error:
                self._expect_line("opening", error)
                self.outcome["refused"] = True
                continue
            for question, answer in said.items():
                if answer != self._right[0][question]:
                    self.outcome["refused"] = True
                    if not str(answer).startswith("StoreDamaged: ") or "\n" in answer:
                        wrong = f"{question}: {answer!r:.300}, not {self._right[0][question]!r:.300}"
                        self._fault(f"wrong answer (check={check}): {wrong}")

    def verify(self) -> None:
        """All damage is found that could be felt, and in a sealed store all damage."""
        try:
            with open_small(self._folder, mode="read", model=None, check=False) as store:
                problems = store.verify().problems
        except LongMemError as error:
            self._expect_line("verifying", error)
            self.outcome["found"] = True
            return
        self.outcome["found"] = bool(problems)
        if not problems and (self._must_be_found or self.outcome["refused"]):
            self._fault("verify found nothing")
        if any("\n" in each.what or not each.where for each in problems):
            self._fault(f"verify said {[vars(each) for each in problems]}")

    def repair(self) -> None:
        """What is called whole after a repair has to be right, and data files have to have their old bits."""
        try:
            with open_small(self._folder, model=MODEL, check=self._data) as store:
                report = store.verify(repair=True)
        except LongMemError as error:
            self._expect_line("repairing", error)
            if self._data:
                self._fault(f"data files cannot be repaired: {error}")
            return
        self.outcome["repaired"] = report.clean
        if self._data:
            if not report.clean or report.same_bits is False:
                self._fault(f"not repaired: {[vars(each) for each in report.problems]}")
            for each in (self._original / "segments").iterdir():
                if (self._folder / "segments" / each.name).read_bytes() != each.read_bytes():
                    self._fault(f"{each.name} has other bytes than before")
        elif report.clean:
            with open_small(self._folder, mode="read", model=MODEL) as store:
                said = answers(store)
                left = store.verify().problems
            # of a lost log an older state is accepted, one that there was
            if said not in (self._right if self._log else self._right[:1]):
                wrong = next(question for question in said if said[question] != self._right[0][question])
                self._fault(f"repaired, but wrong: {wrong}: {said[wrong]!r:.300}")
            if left:
                self._fault(f"repaired, and verify says {[vars(each) for each in left]}")

    def _fault(self, what: str) -> None:
        self._say(["fault", what])

    def _expect_line(self, doing: str, error: LongMemError) -> None:
        line = str(error)
        newer = "use a newer longmem" in line or "was never finished" in line  # the number of the schema was hit
        if "\n" in line or len(line) > 600 or not (isinstance(error, StoreDamaged) or newer):
            self._fault(f"{doing}: {type(error).__name__}: {line}")
