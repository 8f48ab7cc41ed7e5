"""The arithmetic behind the recipes' headers, against the paper's figures and against models that exist."""

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from longmem import AlibiGPTConfig, LongMem
from longmem.errors import ConfigError
from longmem.training.estimate import estimate
from longmem.training.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def test_the_papers_model_is_counted_to_the_last_parameter_and_its_work_to_the_last_flop() -> None:
    found = estimate(Recipe.load(RECIPES / "paper-558m.toml"), "8x-a100-80gb", AlibiGPTConfig())
    assert (found.parameters, found.trained) == (407_072_768, 151_083_024)
    layer = 4 * 1024 * 1024 + (1024 * 4096 + 4096) + (4096 * 1024 + 1024) + 2 * 1024
    attention = projections = 4 * 1024 * 1024  # 4 x 1,024 tokens x 16 heads x 64
    assert found.flops == {
        "backbone": 24 * (2 * layer + attention) + 2 * projections,
        "trained layers": 3 * 12 * (2 * layer + attention),
        "head": 4 * 51200 * 1024,
        "search": 2 * 16384 * 16 * 64,
        "memory attention": 3 * 4 * 64 * 16 * 64 + 6 * projections,
    }
    # a row of memory: 65,536 tokens x 16 heads x 64 numbers x (key + value) x 2 bytes, and 16,384 float32 chunk keys
    assert found.bytes["bank"] == 8 * 320 * 2**20
    assert found.fits and found.hours == pytest.approx(16, rel=0.05)


def test_what_it_counts_is_what_a_model_has() -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=50, num_hidden_layers=6, **shape)
    settings: dict[str, Any] = {"memory_layers": [1, 3], "init": "delta", "trained": "attention", "fusion": "token"}
    model = LongMem.from_backbone(LlamaForCausalLM(config), **settings)
    optim = {"steps": 10, "precision": "fp32"}
    recipe = {"task": "adapt", "data": {"paths": ["x"]}, "backbone": {"path": "x"}, "sidenet": settings, "optim": optim}
    found = estimate(Recipe.parse(recipe), "2-cpu-cores", config)
    assert found.parameters == sum(p.numel() for p in model.backbone.model.parameters())
    assert found.trained == sum(p.numel() for p in model.trainable_parameters())


def test_a_recipe_that_does_not_fit_says_so_and_quantised_it_may() -> None:
    config = LlamaConfig(num_key_value_heads=8, vocab_size=128256, intermediate_size=14336)
    recipe = Recipe.load(RECIPES / "llama-class.toml")
    small, large = (estimate(recipe, name, config) for name in ("rtx-4090", "h100-80gb"))
    assert not small.fits and "DOES NOT FIT" in "\n".join(small.lines())
    quantised = Recipe.load(RECIPES / "llama-class.toml", ["backbone.quantised=4bit"])
    assert large.fits and estimate(quantised, "h100-80gb", config).gib < large.gib - 8


@pytest.mark.parametrize(
    ("recipe", "machine", "message"),
    [
        ("small-backbone", "tpu", r"hardware \('tpu'\) is not known; try one of 2-cpu-cores, "),
        ("small-backbone", "a100-80gb", r"optim\.tokens and optim\.steps are both missing"),
        ("gpt2-small", "a100-80gb", r"an estimate needs its config\.json"),
    ],
)
def test_an_estimate_needs_a_known_machine_a_budget_and_a_config(
    recipe: str, machine: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        estimate(Recipe.load(RECIPES / f"{recipe}.toml", [f"backbone.path={tmp_path}"]), machine)
