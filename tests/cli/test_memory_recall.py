"""``longmem memory stats --recall``: indexes against exact search, on the model's own queries over stored keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.calling import Memory

from longmem import LongMem, MemoryBank
from longmem.errors import StoreError
from longmem.store.measuring import real_queries, store_recall
from longmem.store.reading import read_chunks
from longmem.store.store import MemoryStore


@pytest.fixture
def longmem(models: Path) -> Any:
    return LongMem.from_pretrained(models / "side" / "final")


@pytest.mark.usefixtures("filled")
def test_stats_show_the_recall_of_an_index(memory: Memory) -> None:
    shown = memory("stats", "-n", "ada", "--recall", "--index", "exact", "--json")
    (report,) = shown.json["recall"]
    assert report["recall"] == 1.0
    assert report["attention_kept"] == pytest.approx(1.0, abs=1e-5)
    assert report["recall_by_head"] == [1.0] * 4
    assert report["chunks"] == memory("stats", "-n", "ada", "--json").json["chunks"]
    assert "recall" in memory("stats", "-n", "ada", "--recall", "--index", "exact", "--ask", "notes/one.txt").out
    assert "name it with --namespace: ada, bob" in memory("stats", "--recall").error
    assert "index ('none') must be one of" in memory("stats", "-n", "ada", "--recall", "--index", "none").error


@pytest.mark.usefixtures("filled")
def test_every_index_that_is_installed_is_measured(memory: Memory, made_text: Callable[..., str]) -> None:
    from longmem.errors import ConfigError
    from longmem.memory.index import INDEXES, make_index

    Path("long.txt").write_text(made_text(300))
    memory("add", "long.txt", "-n", "ada")
    done = memory("stats", "-n", "ada", "--recall", "--json")
    there = []
    for name in INDEXES:
        try:
            make_index(name)
        except ConfigError:
            assert f"{name} is left out: " in done.err
        else:
            there.append(name)
    assert [report["index"] for report in done.json["recall"]] == [name for name in there if name != "exact"]


def test_the_queries_are_those_that_the_model_asks_a_memory(longmem: Any, filled: Path) -> None:
    asked: list[torch.Tensor] = []

    class Listening(MemoryBank):
        def search(self, queries: torch.Tensor, num_chunks: int, rows: torch.Tensor | None = None) -> Any:
            asked.append(queries)
            return super().search(queries, num_chunks, rows)

    with MemoryStore.open(filled, model=longmem, mode="read") as store:
        ids = store.token_ids("ada", "two.md")[:64]
        queries = real_queries(longmem, [ids[:32], ids[32:]], 4)
    bank = Listening.for_model(longmem, 1)
    bank.add(longmem.encode(torch.arange(8)[None]))
    with torch.no_grad():
        for part in (ids[:32], ids[32:]):
            longmem(torch.tensor(part.astype("int64"))[None], memory=bank)
    assert torch.equal(queries, torch.cat([each[0] for each in asked], dim=1))


def test_the_keys_are_those_of_the_namespace(longmem: Any, filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longmem.store import measuring

    seen: list[torch.Tensor] = []
    monkeypatch.setattr(measuring, "measure_recall", lambda index, keys, queries, num: seen.append(keys) or index)
    with MemoryStore.open(filled, model=longmem, mode="read") as store:
        assert store_recall(store, "bob", ["exact"]) == ["exact"]
        with store.snapshot() as snapshot:
            table = read_chunks(snapshot, "bob")
        each = table.expand()
        keys = [store.data_file(table.files[f]).keys(c, c + 1)[0] for f, c in zip(each.file, each.chunk, strict=True)]
    assert torch.equal(seen[0], torch.stack(keys, dim=1))


def test_a_store_without_model_or_text_is_refused(longmem: Any, filled: Path) -> None:
    with (
        MemoryStore.open(filled, mode="read") as store,
        pytest.raises(StoreError, match="measuring recall needs the model"),
    ):
        store_recall(store, "ada", ["exact"])
    with (
        MemoryStore.open(filled, model=longmem, mode="read") as store,
        pytest.raises(StoreError, match="namespace 'eve' holds nothing to measure on"),
    ):
        store_recall(store, "eve", ["exact"])
