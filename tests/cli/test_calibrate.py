"""``longmem calibrate``: a reader for any causal language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.calling import Command
from tests.family_table import make_backbone

from longmem import TrainingFree
from longmem.data.tokens import train_tokenizer
from longmem.training import calibrate as calibrating

SIZES = ["--window", "16", "--memory", "32", "--passages", "2", "--updates", "2", "--num-retrieved", "8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    backbone = make_backbone("qwen3")
    backbone.resize_token_embeddings(300)
    backbone.config.max_position_embeddings = 4096
    backbone.save_pretrained(folder)
    train_tokenizer(["The rain in Spain falls mainly on the plain."] * 20, 280).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(9):
        (folder / f"{number}.txt").write_text(f"Number {number} is a number of rain in Spain. " * 40, encoding="utf-8")
    return folder


def test_a_reader_is_made_saved_and_loaded(
    command: Command, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, windows = tmp_path / "reader", []
    calibrate = calibrating.calibrate

    def counted(model: Any, texts: Any, valid: Any, *rest: Any) -> Any:
        windows.append({kind: len(passages) for kind, passages in valid.items()})
        return calibrate(model, texts, valid, *rest)

    monkeypatch.setattr(calibrating, "calibrate", counted)
    sizes = (*SIZES, "--validation-windows", "5")
    done = command("calibrate", model, "--data", f"rain={text}", "--layers", "1", "--out", out, *sizes)
    assert done.status == 0 and "backbone alone" in done.out
    assert windows == [{"rain": 5}], "of the two texts that are held out"
    assert TrainingFree.from_pretrained(out).memory_layers == (1,)
    record = json.loads((out / "calibration.json").read_text(encoding="utf-8"))
    assert set(record["alone"]) == {"rain", "facts"} and record["header"]["config"]["memory_layers"] == [1]


def test_layers_that_are_no_numbers_are_refused(command: Command, model: Path, text: Path, tmp_path: Path) -> None:
    done = command("calibrate", model, "--data", text, "--layers", "top", "--out", tmp_path, *SIZES)
    assert '--layers (top) must be "auto" or numbers such as 18,20,23' in done.error
