"""Recipes over backbones that are quantised or spread."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

from longmem import LongMem
from longmem.errors import BackboneError, ConfigError
from longmem.training.adapt import Adaptation
from longmem.training.loop import make_accelerator, prepare, train
from longmem.training.recipe import Recipe

Make = Callable[..., Recipe]
Records = Callable[..., list[dict[str, Any]]]
WITHOUT = importlib.util.find_spec("bitsandbytes") is None


@pytest.mark.skipif(WITHOUT, reason="bitsandbytes is not installed: pip install bitsandbytes")
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_run_over_a_quantised_backbone_saves_a_sidenet_that_loads(bits: str, adapt: Make, records: Records) -> None:
    recipe = adapt(backbone={"quantised": bits}, optim={"steps": 6, "dropout": 0.0})
    result = train(recipe, quiet=True)
    losses = [record["loss"] for record in records(recipe.out_dir, "train")]
    assert losses[-1] < losses[0]
    assert result.model_dir is not None
    loaded = LongMem.from_pretrained(result.model_dir, backbone_kwargs={"device_map": {"": "cpu"}})
    assert type(loaded.backbone.model.transformer.h[0].attn.q_proj).__name__.startswith("Linear")
    assert loaded.config.backbone_config.quantization_config is not None


@pytest.mark.skipif(not WITHOUT, reason="bitsandbytes is installed")
def test_without_bitsandbytes_a_run_ends_in_one_line(adapt: Make) -> None:
    with pytest.raises(BackboneError, match="which is not installed"):
        train(adapt(backbone={"quantised": "4bit"}), quiet=True)


def test_a_run_over_a_spread_backbone_is_the_same_run(adapt: Make, records: Records) -> None:
    plain, spread = adapt("plain"), adapt("spread", backbone={"device_map": "auto"})
    losses = []
    for recipe in (plain, spread):
        train(recipe, quiet=True)
        losses.append([record["loss"] for record in records(recipe.out_dir, "train")])
    assert losses[0] == losses[1]


def test_a_spread_backbone_is_one_process_alone(adapt: Make) -> None:
    recipe = adapt(backbone={"device_map": "auto"})
    recipe.out_dir.mkdir()
    task = prepare(recipe, make_accelerator(recipe))
    assert isinstance(task, Adaptation)
    with pytest.raises(ConfigError, match="there are 2 processes; start one, or leave it away"):
        Adaptation(recipe, task.tokenizer, task.stream.corpus, None, task.device, 0, 2)


def test_what_cannot_go_together_is_said_at_once(adapt: Make) -> None:
    with pytest.raises(ConfigError) as raised:
        adapt(backbone={"quantised": "4bit", "device_map": "auto"}, optim={"parallel": "fsdp"})
    said = str(raised.value)
    assert "backbone.quantised ('4bit') and optim.parallel = 'fsdp'" in said
    assert "backbone.device_map ('auto') and optim.parallel = 'fsdp'" in said
