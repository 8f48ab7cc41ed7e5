"""Opening, forgetting, compacting, verifying, moving: a store as its users and its keepers see it."""

import hashlib
import io
import json
import os
import sqlite3
import tarfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load, save
from tests.store.small import MODEL, TOKENIZER, NumberModel, flip, open_small, quick_folder, state_of, words

from longmem.errors import LongMemError, StoreDamaged, StoreError, StoreLocked
from longmem.store import MemoryStore, NewDocument, Progress, disk
from longmem.store import catalog as catalogs

HIGHER = NumberModel()
HIGHER.memory_layers = (2,)


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
    for count in (1, 100):
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
    with pytest.raises(StoreLocked, match=rf"process {os.getpid()} on \S+ \(`.*`\) has been writing .*mode='read'"):
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
    ("name", "how", "message"),
    [
        ("memory", {"dtype": "int8"}, "was made with dtype=float32, not int8; leave dtype away"),
        ("memory", {"model": NumberModel(seed=1)}, r"by backbone numbers \(numbers-2-4-0, layers 1\), this model is"),
        (
            "memory",
            {"model": HIGHER},
            r"layers 1\), this model is numbers \(numbers-2-4-0, layers 2\); keys of one mean",
        ),
        ("memory", {"model": "models/small"}, r"model \(a str\) must be a loaded model that reads memory: LongMem"),
        ("memory", {"tokenizer": "models/small"}, r"tokenizer \(a str\) must be a loaded tokenizer: AutoTokenizer"),
        ("memory", {"mode": "append"}, "mode .'append'. must be 'write' or 'read'"),
        ("none", {"mode": "read"}, "no memory store here"),
        ("none", {"model": None, "tokenizer": None}, "a new store needs the model"),
        ("none", {"segment_tokens": 7}, r"segment_tokens \(7\) must be a multiple of chunk_size \(2\)"),
        ("none", {"chunk_size": 80}, r"segment_tokens \(0\) must be at least one chunk_size .80."),
        ("none", {"segment_tokens": 80}, r"segment_tokens \(80\) must not exceed the backbone's window of 64"),
        ("none", {"dtype": "float8"}, r"dtype \('float8'\) must be one of float32"),
        ("lost", {}, r"holds other files \(kv-000001.bin\); restore catalog.sqlite"),
        ("format1", {}, "format 1, .*`longmem memory export` of longmem 0.1.*`longmem memory import`"),
        ("format9", {"mode": "read"}, "use a newer longmem"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_one_line(tmp_path: Path, name: str, how: Any, message: str) -> None:
    open_small(tmp_path / "memory").close()
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "kv-000001.bin").write_text("")
    for version in (1, 9):
        (tmp_path / f"format{version}").mkdir()
        with closing(sqlite3.connect(tmp_path / f"format{version}" / "catalog.sqlite")) as db:
            db.executescript(f"CREATE TABLE meta (key TEXT, value TEXT); PRAGMA user_version = {version}")
    with pytest.raises(StoreError, match=message) as caught:
        MemoryStore.open(tmp_path / name, **{"model": MODEL, "tokenizer": TOKENIZER, **how})
    assert "\n" not in str(caught.value) and not (tmp_path / "none").exists()
    open_small(tmp_path / "memory").close()  # the lock was let go


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


# what is asked for


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda store: store.append("bob", "text", name="ids"), "was added as token ids; append the same"),
        (lambda store: store.forget("alice"), "a name, where, before, or everything; nothing was forgotten"),
        (lambda store: store.add_documents("alice", [], workers=0), "must be a number from 1 on, 'ray' or 'ray:N'"),
        (lambda store: store.add_documents("alice", [], workers="ray:0"), r"workers \('ray:0'\) must be a number"),
        (lambda store: store.export("nobody", store.path.parent / "out.tar"), "no documents to export"),
        (lambda store: store.export("alice", store.path.parent), "a folder; name a file"),
        (lambda store: store.bank("alice", documents=["d9"]), "no document 'd9'"),
        (lambda store: store.bank("alice", documents="d1"), r"write \['d1'\]"),
        (lambda store: store.bank("bob").provenance(0, 99), r"chunk \(99\) is not there; the bank has 78"),
    ],
)
def test_what_a_store_cannot_do_is_said_in_one_line(
    store: MemoryStore, act: Callable[[MemoryStore], object], message: str
) -> None:
    fill(store)
    store.add_document("bob", ids=[1, 2, 3], name="ids")
    before = state_of(store)
    with pytest.raises(LongMemError, match=message) as caught:
        act(store)
    assert "\n" not in str(caught.value) and state_of(store) == before


def test_names_that_look_the_same_are_the_same(store: MemoryStore) -> None:
    composed, apart = (unicodedata.normalize(form, "Zoë.txt") for form in ("NFC", "NFD"))
    assert store.add_document(apart, "hello there", name=apart).name == composed
    assert store.add_document(composed, "hello there", name=composed).status == "unchanged"
    assert store.namespaces() == [composed]
    for name in (composed, apart):
        assert store.text(name, name) == "hello there"
        assert store.bank(name, documents=[name]).tokens.tolist() == [12]
    assert [(each.name, each.tokens) for each in store.forget(apart, name=apart)] == [(composed, 12)]


# damage


def unlink(file: Path, _: int) -> None:
    file.unlink()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize(
    ("file", "damage", "place", "kinds", "message"),
    [
        ("kv", flip, 0, {"piece"}, "not what was written"),
        ("keys", flip, -1, {"piece"}, "not what was written"),
        ("keys", os.truncate, 100, {"file", "piece"}, "100 bytes where"),
        ("kv", unlink, 0, {"file", "piece"}, "data file is missing"),
    ],
)
def test_damaged_data_is_found_stops_what_needs_it_and_is_encoded_again(
    tmp_path: Path, dtype: Any, file: str, damage: Any, place: int, kinds: set[str], message: str
) -> None:
    path = tmp_path / "memory"
    with open_small(path, dtype=dtype) as store:
        fill(store)
        store.forget("alice", name="d1")
        before = state_of(store)
    damage(path / f"{file}-000001.bin", place)
    with open_small(path) as store:
        problems = store.verify().problems
        assert {each.kind for each in problems} == kinds and (len(problems) == 1 or len(kinds) == 2)
        assert all(f"{file}-000001.bin" in each.where + each.what and "--repair" in each.what for each in problems)
        with pytest.raises(StoreDamaged, match=message):
            store.compact() if kinds == {"piece"} else store.bank("alice")
        report = store.verify(repair=True)
        assert report.clean and report.rebuilt_tokens > 0
        assert store.verify().problems == [] and state_of(store) == before
        store.compact()
        assert state_of(store) == before


def test_compacting_removes_what_adds_and_compacts_that_failed_left_in_the_files(store: MemoryStore) -> None:
    fill(store)
    before, left = state_of(store), b"keys and values of a secret"
    with next(store.path.glob("kv-*.bin")).open("ab") as file:
        file.write(left)
    store.compact()
    assert left not in next(store.path.glob("kv-*.bin")).read_bytes() and state_of(store) == before
    store.forget("alice", name="d1")
    with patch.object(disk, "reached", lambda name: 1 // (name != "compact.copied")), pytest.raises(ZeroDivisionError):
        store.compact()
    for namespace in ("alice", "bob"):
        store.forget(namespace, everything=True)
    store.compact()
    assert not [path for path in store.path.glob("k*.bin") if path.stat().st_size]


@pytest.mark.parametrize(
    "sql", ["UPDATE piece SET token_ids = x'010203'", "UPDATE document SET metadata = '{'", "PRAGMA user_version = 2"]
)
def test_a_catalog_that_cannot_be_read_is_said_in_one_line(store: MemoryStore, sql: str) -> None:
    fill(store)
    store.close()
    path = store.path / "catalog.sqlite"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(sql)
    if "PRAGMA" in sql:
        path.write_bytes(path.read_bytes()[:4096] + b"\0" * (path.stat().st_size - 4096))
    with pytest.raises(StoreDamaged, match=r"catalog.sqlite[^\n]*$"), open_small(store.path) as again:
        state_of(again)


@pytest.mark.parametrize(
    ("sql", "kind"),
    [
        ("DELETE FROM part WHERE ordinal = 1", "document"),
        ("DELETE FROM piece", "document"),
        ("UPDATE document SET metadata = '{'", "catalog"),
        ("UPDATE piece SET token_ids = x'010203'", "text"),
        ("UPDATE piece SET text = '?' || substr(text, 2)", "text"),
    ],
)
def test_a_catalog_whose_rows_do_not_fit_together_is_found(store: MemoryStore, sql: str, kind: str) -> None:
    fill(store)
    with closing(sqlite3.connect(store.path / "catalog.sqlite")) as db, db:
        db.execute(sql)
    report = store.verify(repair=True)
    assert {problem.kind for problem in report.problems} == {kind} and not report.clean


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
        assert ours == [{**each, "namespace": "alice"} for each in theirs]
        other.add_document("alice", "another", name="d1")
        with pytest.raises(StoreError, match=r"has another document 'd1'.*nothing was imported"):
            other.import_(tmp_path / "out.tar")
        assert [each.name for each in other.documents("alice")] == ["d1"] and other.verify().clean
        assert store.export("alice", tmp_path / "out.tar", ["d1"])[0].name == "d1"
        store.add_document("carol", "until then", name="note", expires=time.time() + 60)
        store.export("carol", tmp_path / "out.tar")
        with patch("time.time", return_value=time.time() + 90):  # expired on its way
            assert other.import_(tmp_path / "out.tar")[0].status == "added" and not other.has("carol", "note")


def flip_second_piece(files: dict[str, bytes], _: dict[str, Any]) -> None:
    name = list(files)[1]  # after one that is whole
    files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])


def change_a_text(files: dict[str, bytes], manifest: dict[str, Any]) -> None:
    """And the sum of its piece's bytes."""
    name = list(files)[1]
    arrays = load(files[name])
    arrays["text"][:1].add_(1)
    files[name] = save(arrays)
    manifest["contents"][Path(name).stem] = hashlib.sha256(files[name]).hexdigest()


@pytest.mark.parametrize(
    ("change", "there", "message"),
    [
        (flip_second_piece, {}, "bytes have changed"),
        (change_a_text, {}, "text are not those of its digest"),
        (lambda _, manifest: manifest.clear(), {}, "no whole export of a memory store"),
        (
            lambda _, manifest: manifest.update(format="longmem-export-9"),
            {},
            "reads longmem-export-2, longmem-export-1",
        ),
        (lambda _, manifest: manifest.update(contents={}), {}, "is incomplete; nothing was imported"),
        (lambda *_: None, {"dtype": "float16"}, r"dtype=float32 .*this one has float16.*add the text itself"),
        (lambda *_: None, {"model": NumberModel(seed=1)}, "fingerprint=numbers-2-4-0"),
    ],
)
def test_an_export_that_is_damaged_or_of_another_backbone_is_refused_and_nothing_imported(
    store: MemoryStore, tmp_path: Path, change: Callable[[Any, Any], None], there: Any, message: str
) -> None:
    fill(store)
    path = tmp_path / "out.tar"
    store.export("alice", path)
    with tarfile.open(path) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}  # type: ignore[union-attr]
    manifest = json.loads(files["manifest.json"])
    change(files, manifest)
    files["manifest.json"] = json.dumps(manifest).encode()
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with open_small(tmp_path / "to", **there) as other:
        with pytest.raises(StoreError, match=message) as caught:
            other.import_(path)
        assert "\n" not in str(caught.value) and other.namespaces() == [] and other.verify().clean
        with other.catalog.read():
            assert other.catalog.pieces() == []  # also no text of those that were whole
