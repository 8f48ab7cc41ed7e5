"""Stores that earlier versions wrote are opened by this one, with everything that was in them.

``golden/NAME/`` is a store's folder, ``golden/NAME.json`` what ``state_of`` said of it. ``python -m
tests.store.test_golden NAME`` writes one with this version; do it once for every new schema or format, and never
again.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.store.small import open_small, state_of, words

from longmem.store import ForgetReport, MemoryStore

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.json"))


def fill(store: MemoryStore) -> None:
    """Something of everything."""
    store.add_document("alice", words(1, 300), name="letter", source="letter.txt", metadata={"year": 7}, time=1.0)
    store.add_document("alice", "a note that ends some day", name="note", time=2.0, expires=4e9)
    store.add_document("bob", words(1, 300), name="the same", time=3.0)
    store.add_document("bob", ids=range(77), name="ids", time=4.0)
    store.append("bob", ids=range(30), name="ids")
    store.add_document("bob", words(2, 60), name="replaced", time=5.0)
    store.add_document("bob", words(3, 60), name="replaced", time=6.0, replace=True)


@pytest.fixture(params=NAMES)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any]:
    shutil.copytree(GOLDEN / request.param, tmp_path / "memory")
    for folder in ("segments", "staging"):  # git keeps no empty folders
        (tmp_path / "memory" / folder).mkdir(exist_ok=True)
    return tmp_path / "memory", json.loads((GOLDEN / f"{request.param}.json").read_text())


def test_there_is_a_store_of_every_number_format() -> None:
    assert NAMES == ["schema-1-float16", "schema-1-int8"]


def test_what_was_in_it_is_read_and_every_byte_is_right(golden: tuple[Path, Any]) -> None:
    folder, expected = golden
    with open_small(folder, model=None) as store:  # to write: an older schema is brought up to date
        assert json.loads(json.dumps(state_of(store))) == expected
        report = store.verify()
        assert report.problems == [] and report.documents == 5
    with open_small(folder, mode="read", model=None) as store:
        assert json.loads(json.dumps(state_of(store))) == expected


def test_it_can_be_changed(golden: tuple[Path, Any]) -> None:
    folder, expected = golden
    with open_small(folder) as store:
        store.append("alice", words(9, 40), name="letter")
        assert store.text("alice", "letter") == words(1, 300) + words(9, 40)
        report = ForgetReport.from_json(store.forget("bob", name="the same").to_json())
        store.compact()
        found = store.verify(absent=report)
        assert found.clean and found.kept  # alice's letter begins alike
        left = {each["name"]: each["chunks"] for each in state_of(store)["bob"]}
        before = {each["name"]: each["chunks"] for each in expected["bob"]}
        assert left == {name: chunks for name, chunks in before.items() if name != "the same"}


def write(name: str) -> None:
    """Write a golden store with this version."""
    folder = GOLDEN / name
    with open_small(folder, dtype=name.rpartition("-")[2]) as store:
        fill(store)
        store.compact()
        state = state_of(store)
    (GOLDEN / f"{name}.json").write_text(json.dumps(state, indent=1) + "\n")
    (folder / "writer.lock").unlink()


if __name__ == "__main__":
    write(sys.argv[1])
