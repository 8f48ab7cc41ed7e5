"""Opening: one writer, many readers, the right backbone, read-only folders, old and new schemas."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from tests.store.small import MODEL, TOKENIZER, NumberModel, open_small, state_of, words

from longmem.errors import StoreDamaged, StoreError, StoreFull, StoreLocked
from longmem.store import MemoryStore, catalog, sqlite
from longmem.store.lock import LOCK, read_holder
from longmem.store.migrations import MIGRATIONS
from longmem.store.seal import SEAL


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with two documents, closed."""
    with open_small(tmp_path / "memory") as store:
        store.add_document("alice", words(1, 300), name="a", time=1.0)
        store.add_document("bob", words(2, 100), name="b", time=2.0)
    return tmp_path / "memory"


def found(folder: Path) -> object:
    with open_small(folder, mode="read", model=None) as store:
        return state_of(store)


def test_a_second_writer_is_refused_with_the_process_that_holds_it(folder: Path) -> None:
    with open_small(folder) as store:
        with pytest.raises(StoreLocked, match=f"process {os.getpid()} on .* has been writing to this store since 20"):
            open_small(folder)
        store.add_document("alice", words(3, 30), name="c")
    with open_small(folder) as store:
        assert [info.name for info in store.documents("alice")] == ["a", "c"]


def test_another_process_that_writes_is_named(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.store.small import open_small\n"
        "store = open_small(Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert writer.stdin is not None and writer.stdout is not None
    with writer:
        assert writer.stdout.readline() == "open\n"
        with pytest.raises(StoreLocked, match=f"process {writer.pid} on"):
            open_small(folder)
        assert found(folder)
        writer.kill()
    with open_small(folder) as store:  # a killed writer holds nothing
        assert store.namespaces() == ["alice", "bob"]


def test_a_forked_child_neither_writes_nor_keeps_the_lock(folder: Path) -> None:
    store = open_small(folder)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover
        try:
            store.forget("alice", everything=True)
        except StoreError as error:
            os.write(write, str(error).encode())
        finally:
            signal.pause()
    said = os.read(read, 1000).decode()
    store.close()
    try:
        with open_small(folder) as other:  # while the child lives
            assert other.namespaces() == ["alice", "bob"]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert "opened before this process was forked" in said


def test_the_lock_file_says_who_wrote_last(folder: Path) -> None:
    holder = read_holder(folder)
    assert holder is not None and holder.pid == os.getpid() and holder.commits > 2
    (folder / LOCK).write_text("torn")
    assert read_holder(folder) is None and found(folder)


def test_a_reader_changes_nothing(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with open_small(folder, mode="read") as store:
        state_of(store)
        for change in (
            lambda: store.add_document("alice", "text", name="x"),
            lambda: list(store.add_documents("alice", [])),
            lambda: store.append("alice", "text", name="a"),
            lambda: store.forget("alice", everything=True),
            store.compact,
            lambda: store.verify(repair=True),
            lambda: store.import_("archive.tar"),
        ):
            with pytest.raises(StoreError, match="opened to read; open it with mode='write'"):
                change()
        assert store.verify().clean
    after = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {name: data for name, data in after.items() if name in before} == before
    # SQLite may leave its two files beside the log, without anything in them
    assert set(after) - set(before) <= {"catalog.sqlite-wal", "catalog.sqlite-shm"}
    assert not after.get("catalog.sqlite-wal")


@pytest.mark.parametrize("with_log", [False, True])
def test_a_folder_that_cannot_be_written_can_be_read(folder: Path, tmp_path: Path, with_log: bool) -> None:
    expected = found(folder)
    if with_log:  # the copy of a store whose writer was killed
        with open_small(folder) as store:
            store.add_document("alice", words(3, 200), name="c", time=3.0)
            expected = state_of(store)
            shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*-shm"))
        folder = tmp_path / "copy"
        assert (folder / "catalog.sqlite-wal").stat().st_size
    else:
        for side in ("-wal", "-shm"):
            (folder / f"catalog.sqlite{side}").unlink(missing_ok=True)
    connect = sqlite.connect

    def without_side_files(path: Path, mode: sqlite.Mode) -> sqlite3.Connection:
        if mode == "ro" and path.parent == folder:  # as SQLite answers where it cannot make them
            raise StoreError(f"{path}: unable to open database file")
        return connect(path, mode)

    with patch.object(catalog, "connect", without_side_files), open_small(folder, mode="read", model=None) as store:
        assert state_of(store) == expected and store.verify().problems == []
        assert store.version() == store.version()
    assert not list(folder.glob("*-shm"))


def test_readers_of_a_read_only_folder_notice_a_writer_that_may_write_there(folder: Path) -> None:
    for side in ("-wal", "-shm"):
        (folder / f"catalog.sqlite{side}").unlink(missing_ok=True)
    connect, refuse = sqlite.connect, True

    def without_side_files(path: Path, mode: sqlite.Mode) -> sqlite3.Connection:
        if mode == "ro" and refuse:
            raise StoreError(f"{path}: unable to open database file")
        return connect(path, mode)

    with patch.object(catalog, "connect", without_side_files):
        reader = open_small(folder, mode="read", model=None)
        version, before = reader.version(), state_of(reader)
        refuse = False
        with open_small(folder) as store:
            store.forget("alice", everything=True)
            assert reader.version() != version and reader.namespaces() == ["bob"] != list(before)
        reader.close()


def test_many_readers_and_threads_see_the_same(folder: Path) -> None:
    expected, seen = found(folder), []
    with open_small(folder, mode="read", model=None) as store:
        threads = [threading.Thread(target=lambda: seen.append(state_of(store))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen == [expected] * 4


def test_a_long_snapshot_of_its_own_keeps_nobody_waiting(folder: Path) -> None:
    seen: list[object] = []
    with open_small(folder) as store, store._room.catalog.snapshot(own=True) as snapshot:
        other = threading.Thread(target=lambda: seen.append(store.forget("alice", everything=True).documents))
        other.start()
        other.join(20)
        assert seen == [[("a", 301)]] and store.namespaces() == ["bob"]
        assert snapshot.namespaces() == ["alice", "bob"]


def test_another_backbone_is_refused_by_name(folder: Path) -> None:
    other = NumberModel(seed=1)
    with pytest.raises(
        StoreError, match=r"written by backbone numbers \(numbers-2-4-0, layer 1\), this model is numbers"
    ):
        open_small(folder, model=other)
    other = NumberModel()
    other.memory_layer = 2
    with pytest.raises(StoreError, match=r"layer 1\), this model is numbers \(numbers-2-4-0, layer 2\)"):
        open_small(folder, mode="read", model=other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float16"}, "made with dtype=float32, not float16"),
        ({"chunk_size": 4}, "made with chunk_size=2, not 4"),
        ({"segment_tokens": 16}, "made with segment_tokens=8, not 16"),
        ({"dtype": "float8"}, "must be one of float32, float16, bfloat16, int8"),
        ({"mode": "append"}, "must be 'write' or 'read'"),
        ({"batch_tokens": 0}, "must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(folder: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        MemoryStore.open(folder, model=MODEL, tokenizer=TOKENIZER, **settings)  # type: ignore[arg-type]
    with open_small(folder) as store:  # nothing keeps it locked
        assert store.writable


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segment_tokens": 7}, "must be a positive multiple of chunk_size .2.; try segment_tokens=8"),
        ({"segment_tokens": 66}, "must not exceed the backbone's window of 64"),
        ({"chunk_size": 0}, "multiple of chunk_size"),
        ({"create": False}, "no memory store here"),
        ({"mode": "read"}, "no memory store here"),
        ({"model": None}, "a new store needs the model"),
    ],
)
def test_a_store_that_cannot_be_made_leaves_nothing(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        MemoryStore.open(tmp_path / "new", **{"model": MODEL, **settings})  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_a_new_store_takes_its_sizes_from_the_model(tmp_path: Path) -> None:
    with MemoryStore.open(tmp_path / "new", model=MODEL) as store:
        layout = store.layout
    assert (layout.chunk_size, layout.segment_tokens, layout.dtype, layout.backbone) == (2, 64, "float16", "numbers")
    assert (layout.heads_kv, layout.head_dim, layout.memory_layer, layout.format) == (2, 4, 1, 1)


def test_folders_with_other_things_in_them_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    with pytest.raises(StoreError, match=r"no memory store, and it holds other files \(a.txt\)"):
        open_small(tmp_path / "letters")
    with pytest.raises(StoreError, match="a file, not a store's folder"):
        open_small(tmp_path / "letters" / "a.txt")
    (folder / "catalog.sqlite").unlink()
    with pytest.raises(StoreDamaged, match=r"catalog\.sqlite is missing beside data files"):
        open_small(folder)
    assert list((folder / "segments").iterdir())


def test_closing_twice_and_using_what_is_closed(folder: Path) -> None:
    store = open_small(folder)
    store.close()
    store.close()
    for use in (store.namespaces, store.version, store.compact):
        with pytest.raises(StoreError, match="closed"):
            use()


def test_what_unfinished_writes_left_is_removed_by_the_next_writer_only(folder: Path) -> None:
    (folder / "staging" / "half").write_bytes(b"x")
    orphan = folder / "segments" / "00000000000000ff.safetensors"
    orphan.write_bytes(b"x")
    (folder / "segments" / "notes.txt").write_text("not ours")
    found(folder)
    assert orphan.exists()
    with open_small(folder) as store:
        assert not orphan.exists() and not list((folder / "staging").iterdir())
        assert [problem.where for problem in store.verify().problems] == ["segments/notes.txt"]


# schemas


@pytest.fixture
def newer() -> Iterator[None]:
    """A version of longmem with another step of the schema."""
    MIGRATIONS.append(lambda connection: connection.execute("CREATE INDEX by_time ON documents (added)") and None)
    yield
    MIGRATIONS.pop()


def test_a_store_of_an_older_schema_is_brought_up_to_date_by_the_next_writer(
    folder: Path, request: pytest.FixtureRequest
) -> None:
    before = found(folder)
    request.getfixturevalue("newer")
    with pytest.raises(StoreError, match="schema 1, this version reads 2; open it to write once"):
        found(folder)
    with open_small(folder) as store:
        assert state_of(store) == before and store.verify().clean
    assert found(folder) == before and (folder / SEAL).exists()


def test_a_store_of_a_newer_schema_is_refused(tmp_path: Path, newer: None) -> None:
    with open_small(tmp_path / "memory"):
        pass
    step = MIGRATIONS.pop()
    try:
        for mode in ("read", "write"):
            with pytest.raises(StoreError, match="schema 2, this version knows 1; use a newer longmem"):
                open_small(tmp_path / "memory", mode=mode)
    finally:
        MIGRATIONS.append(step)


def test_a_migration_that_fails_leaves_the_old_schema(folder: Path) -> None:
    before = found(folder)

    def fails(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE half (a INTEGER)")
        connection.execute("CREATE TABLE half (a INTEGER)")

    MIGRATIONS.append(fails)
    try:
        with pytest.raises(StoreError):
            open_small(folder)
    finally:
        MIGRATIONS.pop()
    assert found(folder) == before


# seal, log, and what is lost


def test_a_closed_store_is_sealed_and_a_writer_breaks_the_seal(folder: Path) -> None:
    seal = json.loads((folder / SEAL).read_text())
    assert seal["bytes"] == (folder / "catalog.sqlite").stat().st_size and len(seal["sha256"]) == 64
    with open_small(folder) as store:
        assert (folder / SEAL).exists()  # as long as it only looks
        store.forget("alice", name="a")
        assert not (folder / SEAL).exists()
    assert (folder / SEAL).exists()


def test_a_store_that_a_reader_kept_from_being_sealed_opens_all_the_same(folder: Path) -> None:
    with open_small(folder, mode="read", model=None) as reader, reader.snapshot():
        with open_small(folder) as store:
            store.add_document("alice", words(4, 50), name="c")
        assert not (folder / SEAL).exists()
    with open_small(folder) as store:
        assert len(store.documents("alice")) == 2


def test_a_lost_write_ahead_log_is_noticed(folder: Path, tmp_path: Path) -> None:
    with open_small(folder) as store:
        store.add_document("alice", words(3, 200), name="c")
        shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*-shm"))
    copy = tmp_path / "copy"
    log = copy / "catalog.sqlite-wal"
    log.write_bytes(log.read_bytes()[: log.stat().st_size // 2])
    for mode in ("read", "write"):
        with pytest.raises(StoreDamaged, match=r"transactions where .* were committed"):
            open_small(copy, mode=mode)
    with open_small(copy, check=False) as store:
        report = store.verify(repair=True)
        assert {problem.kind for problem in report.problems} >= {"lost transactions"} and report.clean
    with open_small(copy) as store:
        assert [info.name for info in store.documents("alice")] == ["a"]


@pytest.mark.parametrize("limit", [60_000, 100_000, 200_000, 400_000])
def test_a_full_disk_changes_nothing_and_work_goes_on_once_there_is_room(folder: Path, limit: int) -> None:
    from tests.store.test_files import size_limit

    store = open_small(folder)
    before, said = state_of(store), None
    with size_limit(limit):
        try:
            store.add_document("alice", words(5, 3000), name="big")
        except StoreFull as error:
            said = error
    if limit < 400_000:
        assert said is not None and "\n" not in str(said)
        assert state_of(store) == before and not list((folder / "staging").iterdir())
    assert store.add_document("alice", words(5, 3000), name="big").status in ("added", "unchanged")
    assert store.verify().clean
    store.close()
    assert (folder / SEAL).exists()
