"""Saving and loading: a SideNet alone, in one file or in shards, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from tests.family_table import FAMILIES, V, make_backbone
from transformers import AutoModelForCausalLM, PreTrainedModel

from longmem import LongMem, LongMemConfig, MemoryBank
from longmem.errors import CheckpointError

SETTINGS: dict[str, Any] = {"chunk_size": 2, "num_retrieved": 8, "memory_size": 64}
INDEX = "sidenet.safetensors.index.json"


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, V, (1, 12), generator=torch.Generator().manual_seed(seed))


def trained(backbone: PreTrainedModel, seed: int = 1, **settings: Any) -> LongMem:
    """Over this backbone, every trained number moved."""
    model = LongMem.from_backbone(backbone, **{**SETTINGS, **settings}).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model: LongMem) -> torch.Tensor:
    bank = MemoryBank.for_model(model)
    bank.add(model.encode(ids(seed=7)))
    return model(ids(), memory=bank).logits


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("sidenet*"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sidenet_saved_alone_is_loaded_beside_a_backbone_loaded_alone(name: str, tmp_path: Path) -> None:
    backbone = make_backbone(name)
    backbone.save_pretrained(tmp_path / "backbone")
    model = trained(backbone)
    expected = logits(model)
    for size, many in (("5GB", False), ("20KB", True)):
        folder = tmp_path / size
        model.save_pretrained(folder, max_shard_size=size)
        assert (folder / INDEX).is_file() is many and (folder / "sidenet.safetensors").is_file() is not many
        kept = {key for file in folder.glob("*.safetensors") for key in load_file(file)}
        assert kept == set(model.sidenet.state_dict())
        loaded_alone = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
        assert torch.equal(logits(LongMem.from_pretrained(folder, backbone=loaded_alone)), expected)


def test_shards_are_loaded_by_the_auto_class_and_are_no_larger_than_asked(tmp_path: Path) -> None:
    make_backbone("llama").save_pretrained(tmp_path / "backbone")
    model = trained(LongMem.from_backbone(tmp_path / "backbone").backbone.model)
    model.config.backbone_name_or_path = str(tmp_path / "backbone")
    model.save_pretrained(tmp_path / "side", max_shard_size=20_000)
    files = list((tmp_path / "side").glob("sidenet-*.safetensors"))
    assert len(files) > 1
    assert all(sum(tensor.nbytes for tensor in load_file(file).values()) <= 20_000 for file in files)
    index = json.loads((tmp_path / "side" / INDEX).read_text())
    assert index["metadata"]["backbone_fingerprint"] == model.fingerprint
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "side")), logits(model))


def test_a_later_save_leaves_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    backbone = make_backbone("llama")
    first, second, third = (trained(backbone, seed=seed) for seed in (1, 2, 3))
    first.save_pretrained(tmp_path, max_shard_size="20KB")
    many = len(shards(tmp_path))
    second.save_pretrained(tmp_path)
    assert shards(tmp_path) == ["sidenet.safetensors"]
    assert torch.equal(logits(LongMem.from_pretrained(tmp_path, backbone=backbone)), logits(second))
    third.save_pretrained(tmp_path, max_shard_size="40KB")
    assert 2 < len(shards(tmp_path)) < many and "sidenet.safetensors" not in shards(tmp_path)
    assert torch.equal(logits(LongMem.from_pretrained(tmp_path, backbone=backbone)), logits(third))


class PowerCut(Exception):
    pass


class Switch:
    """Cuts the power at the n-th thing done to the disk."""

    def __init__(self) -> None:
        self.done, self.last = 0, -1

    def watch(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **named: Any) -> Any:
            if self.done == self.last:
                raise PowerCut
            self.done += 1
            return act(*arguments, **named)

        return watched


@pytest.mark.parametrize("size", ["5GB", "30KB"])
@pytest.mark.parametrize("over", [None, "5GB", "20KB"])
def test_a_save_cut_short_anywhere_leaves_what_was_there_or_nothing_that_loads(
    size: str, over: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings and weights of two saves are never mixed: both models share backbone, shapes and folder."""
    backbone = make_backbone("llama")
    old, new = trained(backbone, seed=1, num_retrieved=4), trained(backbone, seed=2, num_retrieved=8)
    whole = {str(logits(model).tolist()) for model in (old, new)}
    switch = Switch()
    monkeypatch.setattr(safetensors.torch, "save_file", switch.watch(safetensors.torch.save_file))
    monkeypatch.setattr(os, "remove", switch.watch(os.remove))
    monkeypatch.setattr(os, "fsync", switch.watch(os.fsync))
    monkeypatch.setattr(Path, "unlink", switch.watch(Path.unlink))
    monkeypatch.setattr(LongMemConfig, "save_pretrained", switch.watch(LongMemConfig.save_pretrained))
    cuts, outcomes = 0, []
    while True:
        folder = tmp_path / str(cuts)
        switch.last = -1
        if over is not None:
            old.save_pretrained(folder, max_shard_size=over)
        switch.done, switch.last = 0, cuts
        try:
            new.save_pretrained(folder, max_shard_size=size)
        except PowerCut:
            cuts += 1
            try:
                loaded = LongMem.from_pretrained(folder, backbone=backbone)
            except CheckpointError:
                outcomes.append("refused")
            else:
                assert str(logits(loaded).tolist()) in whole
                outcomes.append("loaded")
        else:
            break
    assert cuts >= 5 and "refused" in outcomes
    assert outcomes.count("loaded") == (0 if over is None else 1), "only before the first thing is done"
    assert torch.equal(logits(LongMem.from_pretrained(folder, backbone=backbone)), logits(new))


def _without_a_shard(folder: Path) -> None:
    next(folder.glob("sidenet-00002-*")).unlink()


def _cut_shard(folder: Path) -> None:
    shard = next(folder.glob("sidenet-00002-*"))
    shard.write_bytes(shard.read_bytes()[:-100])


def _change_index(folder: Path, **changed: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changed
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (_without_a_shard, r"names sidenet-00002-of-\d+.safetensors, which is missing"),
        (_cut_shard, "is not a complete LongMem checkpoint"),
        (lambda folder: (folder / INDEX).write_text("{"), "cannot be read"),
        (lambda folder: (folder / INDEX).write_text("[]"), "cannot be read"),
        (lambda folder: _change_index(folder, memory_gate="../other.safetensors"), "is no file of this folder"),
        (lambda folder: _change_index(folder, more="sidenet-00001-of-00002.safetensors"), "not a complete LongMem"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / INDEX).unlink(), "it needs config.json and sidenet.safetensors"),
    ],
)
def test_damaged_shards_are_refused_in_one_line(harm: Callable[[Path], Any], says: str, tmp_path: Path) -> None:
    backbone = make_backbone("llama")
    trained(backbone).save_pretrained(tmp_path, max_shard_size="20KB")
    harm(tmp_path)
    with pytest.raises(CheckpointError, match=says) as problem:
        LongMem.from_pretrained(tmp_path, backbone=backbone)
    assert "\n" not in str(problem.value)


def test_shards_over_another_backbone_are_refused_by_name(tmp_path: Path) -> None:
    model = trained(make_backbone("llama"))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    other = make_backbone("llama", seed=1)
    with pytest.raises(CheckpointError) as problem:
        LongMem.from_pretrained(tmp_path, backbone=other)
    theirs = LongMem.from_backbone(other).fingerprint
    assert model.fingerprint in str(problem.value) and theirs in str(problem.value)
