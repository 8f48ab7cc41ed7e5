"""Calibration trains the gates of a reader, and nothing else; ``longmem calibrate`` makes one for any model."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.calling import Command
from tests.family_table import V, make_backbone
from torch import Tensor

from longmem import MemoryBank, TrainingFree
from longmem.data.tokens import train_tokenizer
from longmem.errors import ConfigError, DataError
from longmem.training import calibrate as calibrating
from longmem.training.calibrate import CLOSED, Calibration, CalibrationSettings, passages_of


def _texts(seed: int) -> dict[str, list[Tensor]]:
    """A passage said again and again: what comes next has been read before."""
    generator = torch.Generator().manual_seed(seed)
    return {"text": [torch.randint(3, V, (40,), generator=generator).repeat(4) for _ in range(3)]}


def _calibrated() -> tuple[TrainingFree, Calibration]:
    settings = CalibrationSettings(window=16, memory=32, updates=6, scored=8, every=3, facts=0.0, learning_rate=0.1)
    reading = {"memory_layers": (1, 2), "chunk_size": 2, "num_retrieved": 8, "fusion": "token"}
    model = TrainingFree.from_backbone(make_backbone("llama"), **reading)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done = calibrating.calibrate(model, _texts(0), _texts(1), None, settings, quiet=True)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(model.trainable_parameter_names()) and all(name.startswith("gates.") for name in changed)
    return model, done


def test_only_the_gates_change_and_text_never_ends_above_the_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, done = _calibrated()
    assert [found.update for found in done.validations] == [0, 3, 6]
    assert done.best is None or done.best.change["text"] <= 0
    again, repeated = _calibrated()
    assert [v.loss for v in repeated.validations] == [v.loss for v in done.validations]
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    # where nothing helps the gates are closed, and the model is its backbone
    monkeypatch.setattr(calibrating.Validation, "text_change", 0.1)
    model, done = _calibrated()
    assert done.best is None and model.gates is not None and (model.gates[0].bias == CLOSED).all()
    ids = _texts(2)["text"][0][None, :16]
    bank = MemoryBank.for_model(model, rows=1, capacity_tokens=64)
    bank.add(model.encode(ids))
    with torch.no_grad():
        torch.testing.assert_close(model(ids, memory=bank).logits, model(ids).logits)


def test_longmem_calibrate_makes_a_reader_that_loads(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, model, text, out = make_backbone("qwen3"), tmp_path / "model", tmp_path / "text", tmp_path / "reader"
    backbone.resize_token_embeddings(300)
    backbone.config.max_position_embeddings = 4096
    backbone.save_pretrained(model)
    train_tokenizer(["The rain in Spain falls mainly on the plain."] * 20, 280).save_pretrained(model)
    text.mkdir()
    for number in range(9):
        (text / f"{number}.txt").write_text(f"Number {number} is a number of rain in Spain. " * 40)
    monkeypatch.setattr(calibrating, "CalibrationSettings", partial(CalibrationSettings, sessions=4))
    sizes = "--window 16 --memory 32 --passages 2 --updates 2 --num-retrieved 8 --validation-windows 5"
    done = command("calibrate", model, "--data", f"rain={text}", "--layers", "1", "--out", out, *sizes.split())
    assert done.status == 0 and "backbone alone" in done.out
    assert TrainingFree.from_pretrained(out).memory_layers == (1,)
    record = json.loads((out / "calibration.json").read_text(encoding="utf-8"))
    assert set(record["alone"]) == {"rain", "facts"} and record["header"]["config"]["memory_layers"] == [1]
    refused = command("calibrate", "x", "--data", "x", "--layers", "top", "--out", tmp_path)
    assert refused.status == 2 and """'top' is neither "auto" nor numbers such as 18,20,23""" in refused.err
    with pytest.raises(DataError, match=r"no document has 5121 tokens"):
        passages_of(["Too short."], None, CalibrationSettings(), 2)
    with pytest.raises(ConfigError, match=r"memory \(40\) must be a multiple of window \(16\)"):
        CalibrationSettings(window=16, memory=40)
