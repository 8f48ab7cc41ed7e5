"""The baselines without a SideNet: ``MemTRM``, trained with its memory, and ``TrainingFree``, whose gates are given.

Laws that all models share are in ``test_laws``.
"""

from pathlib import Path

import pytest
import torch
from tests.family_table import FAMILIES, SETTINGS, disturbed, filled, ids, make_backbone

from longmem import LongMem, MemoryBank, MemTRM, TrainingFree
from longmem.errors import MemoryBankError
from longmem.modeling.weights import fingerprint_of

TWO = {"memory_layers": (1, 3), "chunk_size": 2, "num_retrieved": 8, "fusion": "token"}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_gradient_reaches_the_whole_memtrm_and_through_its_queries(name: str) -> None:
    backbone = make_backbone(name)
    model = MemTRM.from_backbone(backbone, **SETTINGS).train()
    assert set(model.trainable_parameter_names()) == {name for name, _ in model.named_parameters()}
    assert {id(p) for p in backbone.parameters()} | {id(model.memory_gate)} == {id(p) for p in model.parameters()}
    model(ids(), labels=ids(), memory=filled(model, ids(seed=1))).loss.backward()
    # layers above see nothing of it: what only they could tell the memory layer's queries is not there without memory
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert model.memory_gate.grad is not None and (model.memory_gate.grad != 0).all()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    torch.optim.SGD(model.trainable_parameters(), lr=0.1).step()
    changed = [name for name, tensor in backbone.state_dict().items() if not torch.equal(before[name], tensor)]
    assert len(changed) > len(before) / 2


def test_a_trained_memtrm_has_another_fingerprint_and_keeps_where_it_started_from(tmp_path: Path) -> None:
    make_backbone("llama").save_pretrained(tmp_path / "start")
    model = MemTRM.from_backbone(tmp_path / "start", **SETTINGS).train()
    start, bank = model.fingerprint, filled(model, ids())
    model(ids(), memory=bank)
    with torch.no_grad():
        model.memory_gate += 1
        for parameter in model.backbone.parameters():
            parameter += 0.01
    model.eval()
    assert start == LongMem.from_backbone(tmp_path / "start").fingerprint
    assert start != model.fingerprint == fingerprint_of(model.backbone.model)
    with pytest.raises(MemoryBankError, match=rf"{start}.*{model.fingerprint}.*write the text again"):
        model(ids(), memory=bank)
    model.save_pretrained(tmp_path / "model")
    for _ in range(2):
        loaded = MemTRM.from_pretrained(tmp_path / "model")
        assert (loaded.config.start_name_or_path, loaded.config.start_fingerprint) == (str(tmp_path / "start"), start)
        assert loaded.fingerprint == model.fingerprint
        torch.testing.assert_close(loaded.memory_share, torch.full((4,), 1.0).sigmoid())
        # what its memory belongs to is what was trained, and is beside its settings
        assert loaded.config.backbone_name_or_path == str(tmp_path / "model" / "backbone")
        free = TrainingFree.from_backbone(tmp_path / "model" / "backbone", **SETTINGS)
        assert free.fingerprint == loaded.fingerprint
        loaded.save_pretrained(tmp_path / "model")


# TrainingFree with fusion="token": gates that can be trained


@torch.no_grad()
def test_token_gates_read_nothing_from_an_empty_bank_and_are_saved_alone(tmp_path: Path) -> None:
    make_backbone("llama").save_pretrained(tmp_path / "backbone")
    model = disturbed(TrainingFree.from_backbone(tmp_path / "backbone", **TWO), 0.5)
    bank, empty = filled(model, ids(seed=1)), MemoryBank.for_model(model, rows=2, capacity_tokens=64)
    expected = model(ids(), memory=bank).logits
    assert torch.equal(model(ids(), memory=empty).logits, model(ids()).logits)
    assert not torch.equal(expected, model(ids()).logits)
    model.save_pretrained(tmp_path / "reader")
    assert (tmp_path / "reader" / "gates.safetensors").stat().st_size < 4096
    assert torch.equal(TrainingFree.from_pretrained(tmp_path / "reader")(ids(), memory=bank).logits, expected)
