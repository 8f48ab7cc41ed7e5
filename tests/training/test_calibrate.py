"""Calibration trains the gates of a reader, and nothing else."""

from __future__ import annotations

import pytest
import torch
from tests.family_table import V, make_backbone
from torch import Tensor

from longmem import MemoryBank, TrainingFree
from longmem.errors import ConfigError, DataError
from longmem.training import calibrate as calibrating
from longmem.training.calibrate import CLOSED, CalibrationSettings, calibrate

SMALL = CalibrationSettings(window=16, memory=32, updates=6, scored=8, every=3, sessions=4, learning_rate=0.1)


def _texts(seed: int) -> dict[str, list[Tensor]]:
    """A passage said again and again: what comes next has been read before."""
    generator = torch.Generator().manual_seed(seed)
    return {"text": [torch.randint(3, V, (40,), generator=generator).repeat(4) for _ in range(3)]}


def _reader(**settings: object) -> TrainingFree:
    kept = {"memory_layers": (1, 2), "chunk_size": 2, "num_retrieved": 8, "fusion": "token", **settings}
    return TrainingFree.from_backbone(make_backbone("llama"), **kept)


def test_only_the_gates_change_and_text_never_ends_above_the_backbone() -> None:
    model = _reader()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done = calibrate(model, _texts(0), _texts(1), settings=SMALL, quiet=True)
    assert [found.update for found in done.validations] == [0, 3, 6]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith("gates.") for name in changed)
    assert done.best is None or done.best.change["text"] <= 0
    again = _reader()
    assert [v.loss for v in calibrate(again, _texts(0), _texts(1), settings=SMALL, quiet=True).validations] == [
        v.loss for v in done.validations
    ]
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_where_nothing_helps_the_gates_are_closed_and_the_model_is_its_backbone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibrating.Validation, "text_change", 0.1)
    model = _reader()
    done = calibrate(model, _texts(0), _texts(1), settings=SMALL, quiet=True)
    assert done.best is None and model.gates is not None and (model.gates[0].bias == CLOSED).all()
    ids = _texts(2)["text"][0][None, :16]
    bank = MemoryBank.for_model(model, rows=1, capacity_tokens=64)
    bank.add(model.encode(ids))
    with torch.no_grad():
        torch.testing.assert_close(model(ids, memory=bank).logits, model(ids).logits)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r'only fusion "token" has gates to calibrate'):
        calibrate(_reader(fusion="softmax"), _texts(0), _texts(1))
    with pytest.raises(DataError, match=r"text: no document has 5121 tokens"):
        calibrate(_reader(), _texts(0), _texts(1), quiet=True)
    with pytest.raises(ConfigError, match=r"memory \(40\) must be a multiple of window \(16\)"):
        CalibrationSettings(window=16, memory=40)
