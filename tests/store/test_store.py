"""Opening, forgetting, compacting, verifying, moving: a store as its users and its keepers see it."""

from __future__ import annotations

import io
import itertools
import json
import os
import sqlite3
import tarfile
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.store.small import MODEL, TOKENIZER, NumberModel, chunks_of, open_small, quick_folder, state_of, words

from longmem.errors import StoreDamaged, StoreError, StoreLocked
from longmem.store import MemoryStore, NewDocument, Progress
from longmem.store import catalog as catalogs

MANY = 50


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    with quick_folder() as folder, open_small(folder / "memory") as opened:
        yield opened


def fill(store: MemoryStore) -> None:
    for number, kind in enumerate(["note", "letter", "note"]):
        text = words(number, 150 * (number + 1))
        store.add_document("alice", text, name=f"d{number}", metadata={"kind": kind}, time=100.0 + number)
    store.add_document("bob", words(0, 150), name="same", time=5.0)


# opening


def test_opening_takes_the_same_time_at_any_size() -> None:
    seconds = []
    for count in (1, 300):
        with quick_folder() as path:
            with open_small(path) as store:
                list(store.add_documents("alice", (NewDocument(f"{n}", words(n, 400)) for n in range(count))))
            best = 1.0
            for _ in range(5):
                begin = time.perf_counter()
                open_small(path, mode="read").close()
                best = min(best, time.perf_counter() - begin)
            seconds.append(best)
    assert seconds[1] < max(0.01, 3 * seconds[0])


def test_a_second_writer_is_refused_by_name(store: MemoryStore) -> None:
    with pytest.raises(
        StoreLocked, match=rf"process {os.getpid()} on \S+ \(`.*`\) has been writing since .*mode='read'"
    ):
        open_small(store.path)
    with open_small(store.path, mode="read") as reader, pytest.raises(StoreError, match="opened to read; open it with"):
        reader.add_document("alice", "text", name="a")
    store.close()
    left = open_small(store.path)
    connection = left.catalog._db
    del left  # one that nobody closed holds lock and connection no longer than it lives
    open_small(store.path).close()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.execute("SELECT 1")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"dtype": "int8"}, "was made with dtype=float32, not int8; leave dtype away"),
        ({"segment_tokens": 4}, "was made with segment_tokens=8, not 4"),
        (
            {"model": NumberModel(seed=1)},
            r"written by backbone numbers \(numbers-2-4-0, layers 1\), this model is numbers",
        ),
        ({"mode": "append"}, "mode .'append'. must be 'write' or 'read'"),
    ],
)
def test_what_does_not_fit_the_store_is_refused_in_one_line(store: MemoryStore, how: Any, message: str) -> None:
    store.close()
    with pytest.raises(StoreError, match=message) as caught:
        MemoryStore.open(store.path, **{"model": MODEL, "tokenizer": TOKENIZER, **how})
    assert "\n" not in str(caught.value)
    open_small(store.path).close()  # the lock was let go


def test_what_is_no_store_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("")
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "kv-000001.bin").write_text("")
    for name, message in (
        ("none", "no memory store here"),
        ("file", "a file, not a store's folder"),
        ("full", r"holds other files \(letter.txt\)"),
        ("lost", r"holds other files \(kv-000001.bin\); restore catalog.sqlite"),
    ):
        with pytest.raises(StoreError, match=message):
            open_small(tmp_path / name, mode="read")
    with pytest.raises(StoreError, match="a new store needs the model"):
        MemoryStore.open(tmp_path / "none")
    with pytest.raises(
        StoreError, match=r"segment_tokens \(7\) must be a positive multiple of chunk_size \(2\); try .*=8"
    ):
        MemoryStore.open(tmp_path / "none", model=MODEL, segment_tokens=7)
    with pytest.raises(StoreError, match=r"dtype \('float8'\) must be one of float32"):
        MemoryStore.open(tmp_path / "none", model=MODEL, dtype="float8")
    with pytest.raises(StoreError, match=r"segment_tokens \(80\) must not exceed the backbone's window of 64"):
        MemoryStore.open(tmp_path / "none", model=MODEL, segment_tokens=80)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("version", "message"),
    [(1, "format 1, .*`longmem memory export` of longmem 0.1.*`longmem memory import`"), (9, "use a newer longmem")],
)
def test_a_store_of_another_format_says_how_to_bring_it_over(tmp_path: Path, version: int, message: str) -> None:
    (tmp_path / "memory" / "segments").mkdir(parents=True)
    with sqlite3.connect(tmp_path / "memory" / "catalog.sqlite") as db:
        db.execute("CREATE TABLE meta (key TEXT, value TEXT)")
        db.execute(f"PRAGMA user_version = {version}")
    db.close()
    for mode in ("read", "write"):
        with pytest.raises(StoreError, match=message) as caught:
            open_small(tmp_path / "memory", mode=mode)
        assert "\n" not in str(caught.value)


def test_a_model_may_know_other_fingerprints_of_its_weights(store: MemoryStore) -> None:
    store.close()
    model = NumberModel()
    model.fingerprint = "the same weights, in float16"
    model.accepts = lambda theirs: theirs == MODEL.fingerprint  # type: ignore[method-assign]
    with open_small(store.path, model=model) as again:
        assert again.add_document("alice", "text", name="a").status == "added"


def test_a_read_only_folder_is_read_and_changes_are_noticed(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store)
    store.close()
    plain = os.access
    closed = lambda path, how: plain(path, how) and not (how == os.W_OK and Path(path) == store.path)  # noqa: E731
    monkeypatch.setattr(catalogs.os, "access", closed)
    with open_small(store.path, mode="read") as reader:
        assert not (store.path / "catalog.sqlite-shm").exists()
        bank = reader.bank("alice")
        bank.search(torch.ones(1, 2, 1, 4), 5)
        monkeypatch.undo()
        with open_small(store.path) as writer:
            writer.forget("alice", everything=True)
        assert not bank.search(torch.ones(1, 2, 1, 4), 5).chunk_mask.any()
        assert reader.documents("alice") == []


# names


def test_names_that_look_the_same_are_the_same(store: MemoryStore) -> None:
    composed, apart = (unicodedata.normalize(form, "Zoë.txt") for form in ("NFC", "NFD"))
    assert store.add_document(apart, "hello there", name=apart).name == composed
    assert store.add_document(composed, "hello there", name=composed).status == "unchanged"
    assert store.namespaces() == [composed]
    for name in (composed, apart):
        assert store.text(name, name) == "hello there"
        assert store.bank(name, documents=[name]).tokens.tolist() == [12]
    assert [(each.name, each.tokens) for each in store.forget(apart, name=apart)] == [(composed, 12)]


def test_fifty_namespaces_never_see_each_other(store: MemoryStore) -> None:
    for number in range(MANY):
        text = words(number % 7, 60 + number)  # every seventh begins with the same text
        store.add_document(f"user {number}", text, name="diary", metadata={"of": number})
    banks = {f"user {number}": store.bank(f"user {number}") for number in range(MANY)}
    for row, (space, bank) in enumerate(banks.items()):
        assert int(bank.tokens) == 61 + row
        assert [each.metadata for each in store.documents(space)] == [{"of": row}]
        found = bank.search(torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0)), 200)
        for chunk in found.chunks[found.chunk_mask].unique().tolist():
            assert bank.provenance(0, chunk).namespace == space
    for number in range(0, MANY, 2):
        store.forget(f"user {number}", everything=True)
    store.compact()
    for row, bank in enumerate(banks.values()):
        assert bool(bank.search(torch.ones(1, 2, 1, 4), 200).chunk_mask.any()) == bool(row % 2)
    assert store.verify().clean


# forgetting and compacting


def test_after_compact_no_byte_of_what_was_forgotten_is_on_the_disk(store: MemoryStore) -> None:
    fill(store)
    store.add_document("alice", words(50, 300), name="soon gone")
    gone = []
    for name in ("d1", "soon gone"):
        chunks, text, ids = chunks_of(store, "alice")[name], store.text("alice", name), store.token_ids("alice", name)
        for at in range(20, 100, 3):
            gone += [text[at : at + 16].encode(), ids[at : at + 16].tobytes()]
            gone += [chunks.kv[at : at + 4].tobytes(), chunks.keys[at : at + 4].tobytes()]
    store.forget("alice", name="d1")
    store.add_document("alice", words(50, 300), name="soon gone", expires=time.time())
    assert store.stats().dead_tokens > 0
    with pytest.raises(StoreError, match="nothing was forgotten"):
        store.forget("alice")
    done = store.compact()
    assert done.emptied and done.documents == 1 and done.bytes_after < done.bytes_before
    assert store.verify().problems == [] and store.stats().dead_tokens == 0
    assert store.compact().tokens == 0
    assert [path.name for path in sorted(store.path.glob("*.bin"))] == ["keys-000002.bin", "kv-000002.bin"]
    store.close()
    for path in store.path.iterdir():
        data = path.read_bytes()
        assert not any(each in data for each in gone), path


# damage


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 16
    file.write_bytes(data)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("which", ["kv", "keys"])
def test_a_flipped_byte_is_found_and_encoded_again(tmp_path: Path, dtype: Any, which: str) -> None:
    path = tmp_path / "memory"
    with open_small(path, dtype=dtype) as store:
        fill(store)
        before = state_of(store)
    (file,) = path.glob(f"{which}-*.bin")
    for place in (0, file.stat().st_size // 2, file.stat().st_size - 1):
        flip(file, place)
        with open_small(path) as store:
            (problem,) = store.verify().problems
            assert problem.kind == "piece" and f"{which}-000001.bin" in problem.where and "--repair" in problem.what
            report = store.verify(repair=True)
            assert report.clean and report.rebuilt_tokens > 0
            assert store.verify().problems == [] and state_of(store) == before
    with open_small(path) as store:
        store.compact()
        assert state_of(store) == before


@pytest.mark.parametrize("how", ["cut", "gone"])
def test_lost_data_files_are_encoded_again(store: MemoryStore, how: str) -> None:
    fill(store)
    before = state_of(store)
    store.close()
    for path in store.path.glob("k*.bin"):
        path.unlink() if how == "gone" else path.write_bytes(path.read_bytes()[:100])
    with open_small(store.path) as again:
        with pytest.raises(StoreDamaged, match="missing" if how == "gone" else "bytes where"):
            again.bank("alice")
        assert not again.verify().clean
        assert again.verify(repair=True).clean
        assert again.verify().problems == [] and state_of(again) == before


def test_damage_that_a_compact_would_carry_on_stops_it(store: MemoryStore) -> None:
    fill(store)
    store.forget("alice", name="d1")
    store.close()
    flip(*store.path.glob("kv-*.bin"), 0)
    with open_small(store.path) as again:
        with pytest.raises(StoreDamaged, match="not what was written"):
            again.compact()
        assert again.verify(repair=True).clean
        again.compact()
        assert again.verify().problems == []


def test_a_damaged_catalog_is_said_in_one_line(store: MemoryStore) -> None:
    fill(store)
    text = store.text("alice", "d2")
    store.close()
    path = store.path / "catalog.sqlite"
    data = path.read_bytes()
    path.write_bytes(data.replace(text[:40].encode(), b"?" * 40))
    with open_small(store.path) as again:
        assert {problem.kind for problem in again.verify().problems} == {"text"}
        assert not again.verify(repair=True).clean
    path.write_bytes(data[:4096] + b"\0" * (len(data) - 4096))
    with pytest.raises(StoreDamaged) as caught, open_small(store.path) as again:
        state_of(again)
    assert "\n" not in str(caught.value)


# moving


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_an_export_comes_back_as_it_was(tmp_path: Path, dtype: Any) -> None:
    with open_small(tmp_path / "from", dtype=dtype) as store, open_small(tmp_path / "to", dtype=dtype) as other:
        fill(store)
        store.append("alice", words(8, 30), name="d0")
        steps: list[Progress] = []
        exported = store.export("alice", tmp_path / "out.tar", progress=steps.append)
        assert [each.name for each in exported] == ["d0", "d1", "d2"] and steps
        assert [each.status for each in other.import_(tmp_path / "out.tar", "carol")] == ["added"] * 3
        assert [each.status for each in other.import_(tmp_path / "out.tar", "carol")] == ["unchanged"] * 3
        ours, theirs = state_of(store)["alice"], state_of(other)["carol"]
        assert [{**each, "id": 0, "namespace": ""} for each in ours] == [
            {**each, "id": 0, "namespace": ""} for each in theirs
        ]
        other.add_document("alice", "another", name="d1")
        with pytest.raises(StoreError, match=r"has another document 'd1'.*nothing was imported"):
            other.import_(tmp_path / "out.tar")
        assert [each.name for each in other.documents("alice")] == ["d1"] and other.verify().clean
        assert store.export("alice", tmp_path / "out.tar", ["d1"])[0].name == "d1"
        with pytest.raises(StoreError, match="no document 'x'"):
            store.export("alice", tmp_path / "out.tar", ["x"])
        with pytest.raises(StoreError, match="no documents to export"):
            store.export("nobody", tmp_path / "out.tar")
        with pytest.raises(StoreError, match="a folder; name a file"):
            store.export("alice", tmp_path)


def rewritten(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Change members of a tar file."""
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar.getmembers()]  # type: ignore[union-attr]
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            new = change(name, data)
            member = tarfile.TarInfo(name)
            member.size = len(new)
            tar.addfile(member, io.BytesIO(new))


def manifest(**fields: Any) -> Callable[[str, bytes], bytes]:
    """A change of the manifest."""

    def change(name: str, data: bytes) -> bytes:
        return json.dumps({**json.loads(data), **fields}).encode() if name == "manifest.json" else data

    return change


def last_piece_damaged() -> Callable[[str, bytes], bytes]:
    """A change of the second piece, after one that is whole."""
    pieces = itertools.count()

    def change(name: str, data: bytes) -> bytes:
        damaged = name.startswith("p") and next(pieces) == 1
        return data[:-1] + bytes([data[-1] ^ 1]) if damaged else data

    return change


def without_pieces(name: str, data: bytes) -> bytes:
    if name != "manifest.json":
        return data
    found = json.loads(data)
    found["documents"] = [entry | {"tokens": 0, "pieces": []} for entry in found["documents"]]
    return json.dumps(found).encode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (last_piece_damaged(), "bytes have changed"),
        (lambda name, data: data if name.startswith("p") else b"{", "no whole export of a memory store"),
        (manifest(format="longmem-export-9"), "this version reads longmem-export-2, longmem-export-1"),
        (manifest(contents={}), "is incomplete; nothing was imported"),
        (without_pieces, "is incomplete; nothing was imported"),
        (manifest(contents={"no digest": ""}), "no whole export of a memory store"),
        (manifest(documents=1), "no whole export of a memory store"),
    ],
)
def test_a_damaged_export_is_refused_and_nothing_imported(
    store: MemoryStore, tmp_path: Path, change: Callable[[str, bytes], bytes], message: str
) -> None:
    fill(store)
    store.export("alice", tmp_path / "out.tar")
    rewritten(tmp_path / "out.tar", change)
    with open_small(tmp_path / "to") as other:
        with pytest.raises(StoreError, match=message) as caught:
            other.import_(tmp_path / "out.tar")
        assert "\n" not in str(caught.value) and other.namespaces() == [] and other.verify().clean
        with other.catalog.read():
            assert other.catalog.pieces() == []  # also no text of those that were whole


def test_exports_of_another_backbone_or_layout_are_refused(store: MemoryStore, tmp_path: Path) -> None:
    fill(store)
    store.export("alice", tmp_path / "out.tar")
    with (
        open_small(tmp_path / "half", dtype="float16") as half,
        pytest.raises(StoreError, match=r"dtype=float32 .*this one has float16.*add the text itself"),
    ):
        half.import_(tmp_path / "out.tar")
    with (
        open_small(tmp_path / "foreign", model=NumberModel(seed=1)) as foreign,
        pytest.raises(StoreError, match="fingerprint=numbers-2-4-0"),
    ):
        foreign.import_(tmp_path / "out.tar")


# threads


@pytest.mark.parametrize(("seconds", "least"), [(3.0, 30), pytest.param(60.0, 500, marks=pytest.mark.slow)])
def test_eight_threads_share_a_store_and_no_answer_is_wrong(store: MemoryStore, seconds: float, least: int) -> None:
    """Each with a namespace reads, writes and forgets; every answer is compared with a model of it."""
    rounds, wrong = list[str](), list[str]()
    ends = time.monotonic() + seconds

    def work(number: int) -> None:
        space, mine, round_ = f"user {number}", dict[str, str](), 0
        bank = store.bank(space)
        try:
            while time.monotonic() < ends and not wrong:
                round_ += 1
                what = ("add", "search", "append", "search", "forget", "list", "compact" if number == 0 else "list")
                kind = what[round_ % 7]
                name = f"{round_ % 5}"
                if kind == "add":
                    mine[name] = words(round_ % 11, 40 + round_ % 200)
                    store.add_document(space, mine[name], name=name, replace=True)
                elif kind == "append" and name in mine:
                    mine[name] += words(number, 20)
                    store.append(space, words(number, 20), name=name)
                elif kind == "forget" and mine:
                    gone = sorted(mine)[0]
                    del mine[gone]
                    store.forget(space, name=gone)
                elif kind == "compact" and round_ % 5 == 0:
                    store.compact()
                elif kind == "list":
                    assert {each.name: store.text(space, each.name) for each in store.documents(space)} == mine
                bank.refresh()
                found = bank.search(torch.ones(1, 2, 1, 4), 1000)
                origins = [bank.provenance(0, chunk) for chunk in found.chunks[0, 0, 0].tolist() if chunk >= 0]
                assert sum(origin.length for origin in origins) == sum(len(text) + 1 for text in mine.values())
                assert {origin.document for origin in origins} == set(mine)
                assert all(origin.namespace == space for origin in origins)
                rounds.append(kind)
        except Exception as error:
            wrong.append(f"{space}, round {round_}: {type(error).__name__} {error}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(rounds) > least
    assert store.verify().clean
