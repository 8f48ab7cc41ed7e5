"""Several processes that encode leave what one leaves."""

from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from tests.family_table import tiny_gpt
from tests.generation.models import longmem
from tests.store.small import chunks_of, open_small

from longmem import LongMem, MemoryStore
from longmem.errors import StoreError
from longmem.store import NewDocument, adding


@pytest.fixture(scope="module")
def model() -> LongMem:
    """Over a backbone that has no name: workers are given its weights."""
    return longmem(tiny_gpt(), chunk_size=4)


def documents() -> Iterator[NewDocument]:
    """Short and long ones; every fourth has the token ids of the one before."""
    draw, ids = np.random.default_rng(0), np.zeros(0)
    for number in range(12):
        if number % 4 != 3:
            ids = draw.integers(0, 64, (5, 700, 90, 0)[number % 4])
        yield NewDocument(f"{number:02}", ids=ids, time=float(number))


def added(path: Path, model: LongMem, workers: Any) -> Any:
    with MemoryStore.open(path, model=model, dtype="float32", segment_tokens=16) as store:
        stream = store.add_documents("alice", documents(), workers=workers)
        receipts = [(each.name, each.status) for each in stream]
        assert store.verify().clean
        chunks = {name: some.crc() for name, some in chunks_of(store, "alice").items()}
        ids = [store.token_ids("alice", name).tolist() for name, _ in receipts]
        return receipts, store.documents("alice"), chunks, ids


@pytest.mark.parametrize("workers", [2, pytest.param("ray:2", marks=pytest.mark.slow)])
def test_workers_leave_what_one_process_leaves(tmp_path: Path, model: LongMem, workers: Any) -> None:
    if isinstance(workers, str):
        pytest.importorskip("ray")
    assert added(tmp_path / "many", model, workers) == added(tmp_path / "one", model, 1)


def test_a_worker_that_is_killed_ends_the_call_with_one_line(tmp_path: Path) -> None:
    killed: Future[Any] = Future()
    killed.set_exception(BrokenProcessPool("A process in the process pool was terminated abruptly"))
    with (
        open_small(tmp_path / "memory") as store,
        patch.object(adding, "_processes", lambda *_: (lambda pieces: killed, 4)),
        pytest.raises(StoreError, match=r"^a worker failed or was killed \(BrokenProcessPool[^\n]*$"),
    ):
        list(store.add_documents("alice", documents(), workers=2))
