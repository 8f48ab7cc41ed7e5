"""What docs/operations.md says of backups, moves and read-only folders."""

from __future__ import annotations

import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from tests.calling import Command, names

from longmem.store.store import MemoryStore


@pytest.mark.usefixtures("filled")
def test_a_copied_folder_is_a_store_wherever_it_stands(memory: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree("memory", "elsewhere/copy")
    shutil.rmtree("memory")
    monkeypatch.setenv("LONGMEM_STORE", "elsewhere/copy")
    assert memory("verify", "--json").json["clean"] is True
    assert memory("search", "the old map", "-n", "ada").status == 0
    assert memory("add", "notes", "-n", "carl").status == 0


def test_a_backup_beside_a_writer_is_a_store(memory: Command, filled: Path) -> None:
    Path("copy").mkdir()
    with MemoryStore.open(filled) as store:
        store.forget("ada", name="one.txt")  # in the write-ahead log
        source, target = sqlite3.connect(filled / "catalog.sqlite"), sqlite3.connect("copy/catalog.sqlite")
        with target:
            source.backup(target)
        source.close()
        target.close()
        for path in filled.glob("*.bin"):
            shutil.copy(path, "copy")
    assert memory("verify", "--store", "copy", "--json").json["problems"] == []
    assert names(memory("list", "--store", "copy", "-n", "ada", "--json")) == ["inner/three.txt", "two.md"]
    assert memory("compact", "--store", "copy").status == 0


def test_a_catalog_alone_is_all_of_the_text(memory: Command, filled: Path) -> None:
    Path("copy").mkdir()
    shutil.copy(filled / "catalog.sqlite", "copy")
    assert memory("show", "two.md", "-n", "ada", "--text", "--store", "copy").out == Path("notes/two.md").read_text()
    assert memory("verify", "--store", "copy", "--repair").status == 0
    assert memory("verify", "--store", "copy").status == 0
    ours, theirs = (memory("search", "map", "-n", "ada", "--store", each, "--json").json for each in ("copy", filled))
    assert ours == theirs


def test_a_read_only_folder_can_be_read(memory: Command, filled: Path) -> None:
    before = sorted(path.name for path in filled.iterdir())
    filled.chmod(0o555)
    try:
        for arguments in ("list", "stats", "verify", "search map -n ada", "export a.tar -n ada"):
            assert memory(*arguments.split()).status == 0, arguments
        if os.geteuid() != 0:  # root may write anywhere
            assert "allow writing there" in memory("forget", "-n", "ada", "--everything").error
            assert sorted(path.name for path in filled.iterdir()) == before
    finally:
        filled.chmod(0o755)
