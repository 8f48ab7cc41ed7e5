"""The mean of SideNets, as recipes/average.py makes it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from longmem import AlibiGPTConfig, AlibiGPTForCausalLM, LongMem
from longmem.errors import CheckpointError

RECIPE = Path(__file__).parents[2] / "recipes" / "average.py"
SPEC = importlib.util.spec_from_file_location("average", RECIPE)
assert SPEC is not None
assert SPEC.loader is not None
average = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(average)


def side(
    folder: Path, seed: int, tokenizer: PreTrainedTokenizerFast, backbone_seed: int = 0, memory_layer: int = 3
) -> str:
    """A SideNet of random weights over a tiny backbone."""
    shape = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    config = AlibiGPTConfig(vocab_size=260, max_position_embeddings=32, **shape)
    backbone = folder.parent / f"backbone-{backbone_seed}"
    if not backbone.exists():
        torch.manual_seed(backbone_seed)
        AlibiGPTForCausalLM(config).save_pretrained(backbone)
    model = LongMem.from_backbone(str(backbone), memory_layer=memory_layer, chunk_size=seed + 1, num_retrieved=8)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.sidenet.parameters():
            parameter.normal_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return str(folder)


def test_every_weight_is_the_mean_and_the_last_ones_settings_stay(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    folders = [side(tmp_path / f"{seed}", seed, byte_tokenizer) for seed in (0, 1)]
    average.average(folders, tmp_path / "mean")
    first, second = (LongMem.from_pretrained(folder).sidenet.state_dict() for folder in folders)
    mean = LongMem.from_pretrained(tmp_path / "mean")
    for name, weight in mean.sidenet.state_dict().items():
        assert torch.allclose(weight, (first[name] + second[name]) / 2, atol=1e-6), name
    assert mean.config.chunk_size == 2
    assert (tmp_path / "mean" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"backbone_seed": 1}, "a: has another backbone than"),
        ({"memory_layer": 1}, r"memory_layer is 3, that of .*b 1"),
    ],
)
def test_sidenets_that_are_not_alike_are_refused(
    other: dict[str, int], message: str, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    folders = [side(tmp_path / "a", 0, byte_tokenizer), side(tmp_path / "b", 0, byte_tokenizer, **other)]
    with pytest.raises(CheckpointError, match=message):
        average.average(folders, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
