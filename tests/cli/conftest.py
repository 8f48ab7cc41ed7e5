"""What the tests of ``longmem memory`` share: models and texts on disk, and the command as a function."""

import io
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.calling import Command
from tests.family_table import tiny_gpt

from longmem import LongMem


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> Path:
    """Random, over bytes: ``backbone``, ``other``; over the first ``side/final``, and ``low``, of another layer."""
    home = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("backbone", "other")):
        tiny_gpt(seed).save_pretrained(home / name)
        byte_tokenizer.save_pretrained(home / name)
    torch.manual_seed(7)
    sizes = {"chunk_size": 4, "num_retrieved": 8, "memory_size": 64}
    LongMem.from_backbone(home / "backbone", **sizes).save_pretrained(home / "side" / "final")
    LongMem.from_backbone(home / "backbone", memory_layer=1, **sizes).save_pretrained(home / "low")
    return home


@pytest.fixture
def memory(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """``memory("add", "notes", ...)`` in an empty folder, where the store is ``memory/``."""
    monkeypatch.chdir(tmp_path)
    return partial(command, "memory")


@pytest.fixture
def model(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LongMem that every command finds by itself."""
    monkeypatch.setenv("LONGMEM_MODEL", str(models / "side"))
    return models / "side"


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """``piped(b"...")``: what standard input is."""
    return lambda data: monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))


@pytest.fixture
def notes(tmp_path: Path, made_text: Callable[..., str]) -> Path:
    """Three texts of different lengths; ``two.md`` has no phrase with the others in common."""
    folder = tmp_path / "notes"
    (folder / "inner").mkdir(parents=True)
    (folder / "one.txt").write_text(made_text(30, 0))
    (folder / "two.md").write_text(" ".join(f"{number * 7919 % 99991:x}" for number in range(60)))
    (folder / "inner" / "three.txt").write_text(made_text(5, 2))
    return folder


@pytest.fixture
def filled(memory: Command, model: Path, notes: Path) -> Path:
    """A store ``memory/`` with these three in the namespace ``ada``, and two of them in ``bob`` with metadata."""
    assert memory("add", notes, "--namespace", "ada").status == 0
    done = memory(
        "add", notes, "-n", "bob", "--exclude", "two.md", "--metadata", "kind=note", "--metadata", "year=1843"
    )
    assert done.status == 0, done
    return notes.parent / "memory"
