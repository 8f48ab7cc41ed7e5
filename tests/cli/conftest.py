"""What the tests of the command line share: models, texts and a store on disk, and the command as a function."""

import io
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tests.calling import Command
from tests.family_table import tiny_gpt

from longmem import LongMem
from longmem.__main__ import cli
from longmem.data.tokens import train_tokenizer


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any, made_text: Callable[..., str]) -> Path:
    """Random, over bytes: ``backbone``, ``other``, and ``side/final`` over the first; ``wrong``, another tokenizer."""
    home = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("backbone", "other")):
        tiny_gpt(seed).save_pretrained(home / name)
        byte_tokenizer.save_pretrained(home / name)
    torch.manual_seed(7)
    side = LongMem.from_backbone(home / "backbone", chunk_size=4, num_retrieved=8, memory_size=64)
    side.save_pretrained(home / "side" / "final")
    train_tokenizer([made_text(500)], 300).save_pretrained(str(home / "wrong"))
    (home / "wrong" / "long.txt").write_text(made_text(500))
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


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, models: Path, made_text: Callable[..., str]) -> Path:
    """What ``notes`` and ``filled`` are copies of."""
    home = tmp_path_factory.mktemp("home")
    (home / "notes" / "inner").mkdir(parents=True)
    (home / "notes" / "one.txt").write_text(made_text(30, 0))
    (home / "notes" / "two.md").write_text(" ".join(f"{number * 7919 % 99991:x}" for number in range(60)))
    (home / "notes" / "inner" / "three.txt").write_text(made_text(5, 2))
    add = ["memory", "add", str(home / "notes"), "--store", str(home / "memory"), "--model", str(models / "side")]
    marked = "-n bob --exclude two.md --metadata kind=note --metadata year=1843"
    for options in ("--namespace ada", marked):
        assert CliRunner().invoke(cli, [*add, *options.split()]).exit_code == 0
    return home


@pytest.fixture
def notes(tmp_path: Path, home: Path) -> Path:
    """Three texts of different lengths; ``two.md`` has no phrase with the others in common."""
    return shutil.copytree(home / "notes", tmp_path / "notes")


@pytest.fixture
def filled(tmp_path: Path, home: Path, memory: Command, model: Path, notes: Path) -> Path:
    """A store ``memory/`` with these three in the namespace ``ada``, and two of them in ``bob`` with metadata."""
    return shutil.copytree(home / "memory", tmp_path / "memory")
