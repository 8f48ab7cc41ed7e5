"""Export and import: the same documents and the same tensors elsewhere, or nothing."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tests.store.small import NumberModel, open_small, state_of, words

from longmem.errors import StoreError
from longmem.store import MemoryStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryStore]:
    with open_small(tmp_path / "memory", dtype="int8") as opened:
        opened.add_document("alice", words(1, 500), name="a", source="a.txt", metadata={"x": 1}, time=1.0, expires=4e9)
        opened.add_document("alice", ids=range(70), name="b", time=2.0)
        opened.append("alice", ids=range(9), name="b")
        opened.add_document("alice", words(1, 500), name="same as a", time=3.0)
        opened.add_document("alice", "over", name="expired", expires=1.0)
        opened.add_document("bob", words(2, 50), name="c")
        yield opened


def without_ids(state: dict[str, Any], namespace: str) -> list[dict[str, Any]]:
    return [{**each, "id": 0, "namespace": ""} for each in state[namespace]]


@pytest.mark.parametrize("with_model", [True, False])
def test_what_is_exported_is_imported_to_the_last_bit(store: MemoryStore, tmp_path: Path, with_model: bool) -> None:
    exported = store.export("alice", tmp_path / "out" / "alice.tar")
    assert [info.name for info in exported] == ["a", "b", "same as a"]
    with open_small(tmp_path / "other", dtype="int8") as other:
        other.add_document("carol", words(1, 500), name="had it already")
    with open_small(tmp_path / "other", model=NumberModel() if with_model else None) as other:
        receipts = other.import_(tmp_path / "out" / "alice.tar", "dora")
        assert [(receipt.name, receipt.status) for receipt in receipts] == [
            ("a", "added"), ("b", "added"), ("same as a", "added")
        ]  # fmt: skip
        assert without_ids(state_of(other), "dora") == without_ids(state_of(store), "alice")
        assert other.verify().clean
        again = other.import_(tmp_path / "out" / "alice.tar", "dora")
        assert {receipt.status for receipt in again} == {"unchanged"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["alice.tar"]


def test_some_documents_can_be_exported(store: MemoryStore, tmp_path: Path) -> None:
    store.export("alice", tmp_path / "b.tar", ["b"])
    assert [receipt.name for receipt in store.import_(tmp_path / "b.tar", "copy")] == ["b"]
    with pytest.raises(StoreError, match="no document 'z'"):
        store.export("alice", tmp_path / "z.tar", ["z"])
    with pytest.raises(StoreError, match="has no documents to export"):
        store.export("nobody", tmp_path / "z.tar")
    assert not (tmp_path / "z.tar").exists()


def test_any_program_can_read_the_members(store: MemoryStore, tmp_path: Path) -> None:
    store.export("alice", tmp_path / "alice.tar")
    with tarfile.open(tmp_path / "alice.tar") as tar:
        tar.extractall(tmp_path / "out", filter="data")
    (member,) = [path for path in (tmp_path / "out" / "contents").iterdir() if b"<1>" in path.read_bytes()][:1]
    with safe_open(member, "pt") as file:
        assert words(1, 500).startswith(bytes(file.get_tensor("text").tolist()).decode()[:100])
        assert file.get_tensor("kv").shape[0] == len(file.get_tensor("lengths")) == 64


def test_another_backbone_or_layout_is_refused_by_name(store: MemoryStore, tmp_path: Path) -> None:
    store.export("alice", tmp_path / "alice.tar")
    for number, (settings, message) in enumerate(
        [
            ({"dtype": "float16"}, "exported from a store with dtype=int8"),
            ({"dtype": "int8", "model": NumberModel(seed=3)}, "with fingerprint=numbers-2-4-0 .numbers., this one has"),
            ({"dtype": "int8", "segment_tokens": 16}, "with segment_tokens=8"),
        ]
    ):
        with open_small(tmp_path / f"{number}", **settings) as other, pytest.raises(StoreError, match=message):  # type: ignore[arg-type]
            other.import_(tmp_path / "alice.tar")


def test_another_document_of_the_name_keeps_everything_out(store: MemoryStore, tmp_path: Path) -> None:
    store.export("alice", tmp_path / "alice.tar")
    store.add_document("dora", words(5, 60), name="same as a")
    before = state_of(store)
    with pytest.raises(StoreError, match="another document 'same as a'; nothing was imported"):
        store.import_(tmp_path / "alice.tar", "dora")
    assert state_of(store) == before and store.verify().clean


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip_text(data: bytes) -> bytes:
    place = data.index(b"<1>") + 10
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def flip_name(data: bytes) -> bytes:
    return data.replace(b'"longmem-export-1"', b'"longmem-export-9"')


def no_manifest(data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=out, mode="w") as new:
        for member in old.getmembers()[:-1]:
            new.addfile(member, old.extractfile(member))
    return out.getvalue()


@pytest.mark.parametrize("damage", [cut, flip_text, flip_name, no_manifest, lambda data: b"not a tar file"])
def test_a_damaged_archive_changes_nothing(
    store: MemoryStore, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    store.export("alice", tmp_path / "alice.tar")
    (tmp_path / "alice.tar").write_bytes(damage((tmp_path / "alice.tar").read_bytes()))
    with open_small(tmp_path / "other", dtype="int8") as other:
        with pytest.raises(StoreError) as caught:
            other.import_(tmp_path / "alice.tar")
        assert "\n" not in str(caught.value) and "alice.tar" in str(caught.value)
        assert other.namespaces() == [] and other.stats().files == 0 and other.verify().problems == []


def test_a_missing_archive_is_one_clear_line(store: MemoryStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"none\.tar: No such file or directory while reading"):
        store.import_(tmp_path / "none.tar")
