"""Forgetting: gone at once from every reader, from the disk with compact, and it can be checked."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from tests.store.small import open_small, state_of, words

from longmem.errors import StoreError
from longmem.store import ForgetReport, MemoryStore, NewDocument, adding, compacting


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryStore]:
    with open_small(tmp_path / "memory") as opened:
        yield opened


def names(store: MemoryStore, namespace: str = "alice") -> list[str]:
    return [info.name for info in store.documents(namespace)]


def filled(store: MemoryStore) -> MemoryStore:
    for number in range(4):
        store.add_document(
            "alice",
            words(number, 100 + 50 * number),
            name=f"{number}",
            time=10.0 * number,
            metadata={"odd": number % 2},
        )
    store.add_document("bob", words(1, 150), name="same as 1", time=1.0)
    return store


def files_hold(folder: Path, needle: str) -> bool:
    """Whether some 20 bytes of a text stand anywhere; the store must be closed."""
    data = b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())
    text = needle.encode()
    return any(text[start : start + 20] in data for start in range(0, len(text) - 20, 7))


@pytest.mark.parametrize(
    ("condition", "left"),
    [
        ({"name": "2"}, ["0", "1", "3"]),
        ({"where": {"odd": 1}}, ["0", "2"]),
        ({"before": 20.0}, ["2", "3"]),
        ({"before": 20.0, "where": {"odd": 0}}, ["1", "2", "3"]),
        ({"everything": True}, []),
        ({"where": {"odd": 2}}, ["0", "1", "2", "3"]),
    ],
)
def test_what_meets_all_conditions_is_forgotten_and_nothing_else(
    store: MemoryStore, condition: dict[str, object], left: list[str]
) -> None:
    filled(store)
    bob = state_of(store)["bob"]
    report = store.forget("alice", **condition)  # type: ignore[arg-type]
    assert names(store) == left and len(report.documents) == 4 - len(left)
    assert state_of(store)["bob"] == bob
    assert report.tokens == sum(tokens for _, tokens in report.documents)
    assert ("alice" in store.namespaces()) == bool(left)


def test_what_is_older_than_so_many_seconds_is_forgotten(store: MemoryStore) -> None:
    now = time.time()
    for name, age in (("old", 7200.0), ("new", 60.0)):
        store.add_document("alice", words(1, 30), name=name, time=now - age)
    assert store.forget("alice", older_than=3600.0).documents == [("old", 31)] and names(store) == ["new"]
    assert store.forget("alice", older_than=0.0, before=now - 100.0).documents == []


def test_nothing_is_forgotten_without_a_condition_or_a_document(store: MemoryStore) -> None:
    filled(store)
    with pytest.raises(StoreError, match="forget needs to know what"):
        store.forget("alice")
    with pytest.raises(StoreError, match="has no document '7' to forget"):
        store.forget("alice", name="7")
    assert names(store) == ["0", "1", "2", "3"]


def test_readers_miss_it_at_once(store: MemoryStore) -> None:
    filled(store)
    with open_small(store.path, mode="read", model=None) as reader:
        version = reader.version()
        assert names(reader) == ["0", "1", "2", "3"] and reader.version() == version
        store.forget("alice", name="0")
        assert reader.version() != version and names(reader) == ["1", "2", "3"]


def test_a_snapshot_stays_as_it_is_while_others_forget_and_compact(store: MemoryStore) -> None:
    filled(store)
    with open_small(store.path, mode="read", model=None) as reader:
        with reader.snapshot() as snapshot:
            before = [row.name for row in snapshot.documents("alice")]
            store.forget("alice", everything=True)
            with patch.object(compacting, "READER_SECONDS", 0.1):
                assert not store.compact().emptied  # the snapshot holds the log back
            assert [row.name for row in snapshot.documents("alice")] == before == ["0", "1", "2", "3"]
            assert names(reader) == before  # inside the block it is the same state
        assert names(reader) == []
    assert store.compact().emptied


def test_after_compact_the_bytes_are_gone(tmp_path: Path) -> None:
    text, other = words(50, 900), words(51, 900)
    with open_small(tmp_path / "memory") as store:
        store.add_document("alice", text, name="secret", metadata={"note": "a secret of nobody else"})
        store.add_document("alice", other, name="kept")
        before = state_of(store)["alice"][1]
        report = store.forget("alice", name="secret")
        unclean = store.verify(absent=report, absent_text=text)
        assert {problem.kind for problem in unclean.problems} == {"present"}
        done = store.compact()
        assert done.tokens == len(text) + 1 and done.bytes_after < done.bytes_before and done.emptied
        assert store.verify(absent=report, absent_text=text).problems == []
        assert state_of(store)["alice"] == [before]
    assert not files_hold(tmp_path / "memory", text) and not files_hold(tmp_path / "memory", "a secret of nobody else")
    assert files_hold(tmp_path / "memory", other)


def test_what_others_hold_stays_and_is_told_apart(store: MemoryStore) -> None:
    filled(store)
    bob = state_of(store)["bob"]
    report = store.forget("alice", everything=True)
    store.compact()
    found = store.verify(absent=report)
    # seven contents were forgotten; bob has the two of document 1
    assert found.clean and (len(report.contents), found.kept) == (7, 2)
    assert state_of(store) == {"bob": bob}


def test_a_report_survives_json_and_holds_no_text(store: MemoryStore) -> None:
    filled(store)
    report = store.forget("alice", name="3")
    text = report.to_json()
    again = ForgetReport.from_json(text)
    assert again == report and not any(word in text for word in words(3, 250).split()[2:])
    store.compact()
    assert store.verify(absent=again).clean
    with pytest.raises(StoreError, match="not a report"):
        ForgetReport.from_json('{"format": "other"}')


def test_a_report_of_another_store_is_refused(store: MemoryStore, tmp_path: Path) -> None:
    filled(store)
    report = store.forget("alice", name="3")
    with open_small(tmp_path / "other") as other, pytest.raises(StoreError, match="report is of store"):
        other.verify(absent=report)


def test_text_that_is_left_somewhere_is_found(store: MemoryStore) -> None:
    filled(store)
    report = store.forget("alice", name="3")
    store.compact()
    (store.path / "staging" / "left").write_bytes(b"x" * 1000 + words(3, 250).encode())
    problems = store.verify(absent=report, absent_text=words(3, 250)).problems
    assert sorted(problem.kind for problem in problems) == ["present", "present", "staging"]
    here = store.verify(absent_text=words(2, 200)[30:90]).problems
    assert any("document '2' (alice)" in problem.where for problem in here)


def test_forgotten_text_can_be_added_again(store: MemoryStore) -> None:
    filled(store)
    before = state_of(store)["alice"][1]["chunks"]
    store.forget("alice", name="1")
    store.add_document("alice", words(1, 150), name="1")
    store.compact()
    assert [each["chunks"] for each in state_of(store)["alice"] if each["name"] == "1"] == [before]


def test_expired_documents_are_seen_by_nobody_and_removed_by_compact(tmp_path: Path) -> None:
    soon = time.time() + 0.4
    with open_small(tmp_path / "memory") as store:
        store.add_document("alice", words(1, 300), name="soon", expires=soon)
        store.add_document("alice", words(2, 300), name="later", expires=4e9)
        store.add_document("bob", words(3, 300), name="long ago", expires=1.0)
        assert store.namespaces() == ["alice"] and names(store, "bob") == []
        with pytest.raises(StoreError, match="no document 'long ago'"):
            store.text("bob", "long ago")
        while time.time() <= soon:
            time.sleep(0.05)
        assert names(store) == ["later"] and store.stats().expired == 2
        assert store.add_document("alice", words(4, 30), name="soon").status == "added"
        assert store.compact().documents == 1
        assert store.stats().expired == 0 and store.verify().clean
    assert not files_hold(tmp_path / "memory", words(1, 300)) and not files_hold(tmp_path / "memory", words(3, 300))


def test_an_expired_document_can_be_forgotten_with_a_report(store: MemoryStore) -> None:
    store.add_document("alice", words(1, 300), name="old", expires=1.0)
    assert store.forget("alice", name="old").documents == [("old", 301)]
    assert store.stats().expired == 0


def test_small_files_become_one_and_nothing_else_changes(store: MemoryStore) -> None:
    for number in range(9):
        store.add_document("alice", words(number, 100), name=f"{number}", time=float(number))
    before = state_of(store)
    report = store.compact()
    assert (report.files_before, report.files_after, report.tokens) == (9, 1, 0)
    assert state_of(store) == before and store.verify().clean
    again = store.compact()
    assert (again.files_before, again.files_after) == (1, 1)


def test_large_files_without_anything_dead_are_left_alone(store: MemoryStore) -> None:
    with patch.object(adding, "FILE_BYTES", 9_000), patch.object(compacting, "FILE_BYTES", 9_000):
        list(store.add_documents("alice", (NewDocument(f"{n}", words(n, 120)) for n in range(10))))
        before = {path.name for path in (store.path / "segments").iterdir()}
        store.compact()
        assert {path.name for path in (store.path / "segments").iterdir()} == before and len(before) > 4
        store.forget("alice", name="4")
        store.compact()
        after = {path.name for path in (store.path / "segments").iterdir()}
        assert len(before & after) >= len(before) - 1 and store.verify().clean


def test_appending_leaves_dead_segments_that_compact_removes(store: MemoryStore) -> None:
    store.add_document("alice", ids=range(3), name="talk")
    for number in range(20):
        store.append("alice", ids=range(number, number + 5), name="talk")
    before = state_of(store)
    assert store.stats().dead_tokens
    store.compact()
    assert state_of(store) == before and store.stats().files == 1 and store.verify().clean


def test_compact_leaves_another_namespace_all_that_it_shares(store: MemoryStore) -> None:
    shared = words(1, 500)
    store.add_document("alice", shared, name="a")
    store.add_document("bob", shared, name="b")
    bob = state_of(store)["bob"]
    store.forget("alice", everything=True)
    store.compact()
    assert state_of(store) == {"bob": bob}
    store.forget("bob", everything=True)
    store.compact()
    assert store.stats().files == 0 and store.stats().namespaces == 0
