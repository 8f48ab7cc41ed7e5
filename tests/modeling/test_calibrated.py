"""``TrainingFree`` with ``fusion="token"``: a reader of several layers whose gates can be trained and saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.family_table import V, make_backbone
from torch import Tensor

from longmem import MemoryBank, TrainingFree
from longmem.config import MemTRMConfig
from longmem.errors import CheckpointError, ConfigError
from longmem.modeling.training_free import GATES

LAYERS = (1, 3)
SETTINGS = {"memory_layers": LAYERS, "chunk_size": 2, "num_retrieved": 8}


def _reader(name: str = "llama", **settings: object) -> TrainingFree:
    return TrainingFree.from_backbone(make_backbone(name), fusion="token", **{**SETTINGS, **settings})


def _disturb(model: TrainingFree) -> None:
    assert model.gates is not None
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.gates.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))


def _ids(seed: int, length: int = 12) -> Tensor:
    return torch.randint(3, V, (2, length), generator=torch.Generator().manual_seed(seed))


def _bank(model: TrainingFree) -> MemoryBank:
    bank = MemoryBank.for_model(model, rows=2, capacity_tokens=64)
    bank.add(model.encode(_ids(0, 20)))
    return bank


@pytest.mark.parametrize("name", ["llama", "qwen3", "alibi_gpt"])
def test_at_the_start_it_is_one_softmax(name: str) -> None:
    token, softmax = (
        TrainingFree.from_backbone(make_backbone(name), fusion=fusion, **SETTINGS) for fusion in ("token", "softmax")
    )
    with torch.no_grad():
        ours, theirs = (m(_ids(1), memory=_bank(m)).logits for m in (token, softmax))
    torch.testing.assert_close(ours, theirs)


def test_an_empty_bank_is_no_bank_bit_for_bit() -> None:
    model = _reader()
    _disturb(model)
    with torch.no_grad():
        empty = model(_ids(1), memory=MemoryBank.for_model(model, rows=2, capacity_tokens=64)).logits
        assert torch.equal(empty, model(_ids(1)).logits)
        assert not torch.equal(empty, model(_ids(1), memory=_bank(model)).logits)


def test_only_the_gates_are_trained_and_every_number_of_them_learns() -> None:
    model = _reader()
    before = {name: tensor.clone() for name, tensor in model.backbone.model.state_dict().items()}
    assert all(name.startswith("gates.") for name in model.trainable_parameter_names())
    assert sum(p.numel() for p in model.trainable_parameters()) == len(LAYERS) * (3 * 4 + 3 * 4 * 8)
    ids = _ids(1)
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
    model(ids, labels=ids, memory=_bank(model)).loss.backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in model.trainable_parameters())
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.model.state_dict().items())


def test_saved_and_loaded_it_gives_the_same_logits(tmp_path: Path) -> None:
    backbone = make_backbone("llama")
    backbone.save_pretrained(tmp_path / "backbone")
    model = TrainingFree.from_backbone(tmp_path / "backbone", fusion="token", **SETTINGS)
    _disturb(model)
    model.save_pretrained(tmp_path / "reader")
    assert (tmp_path / "reader" / GATES).stat().st_size < 4096
    again = TrainingFree.from_pretrained(tmp_path / "reader")
    with torch.no_grad():
        expected = model(_ids(1), memory=_bank(model)).logits
        assert torch.equal(again(_ids(1), memory=_bank(again)).logits, expected)
    (tmp_path / "reader" / GATES).unlink()
    with pytest.raises(CheckpointError, match=rf"it needs config\.json and {GATES}"):
        TrainingFree.from_pretrained(tmp_path / "reader")


def test_a_memorizing_transformer_has_no_such_gates() -> None:
    with pytest.raises(ConfigError, match=r'fusion \("token"\) is not for MemTRMConfig'):
        MemTRMConfig(fusion="token")
