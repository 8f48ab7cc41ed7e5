"""The mean of SideNets."""

from pathlib import Path
from typing import Any

import pytest
import torch
from recipes.average import average
from tests.family_table import tiny_gpt
from transformers import PreTrainedTokenizerFast

from longmem import LongMem
from longmem.errors import CheckpointError


def side(
    folder: Path, seed: int, tokenizer: PreTrainedTokenizerFast, backbone: int = 0, memory_layer: int = 3, **more: Any
) -> str:
    """A SideNet of random weights over a tiny backbone."""
    tiny_gpt(backbone).save_pretrained(folder.parent / f"backbone-{backbone}")
    model = LongMem.from_backbone(
        str(folder.parent / f"backbone-{backbone}"),
        memory_layer=memory_layer,
        chunk_size=seed + 1,
        num_retrieved=8,
        **more,
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.sidenet.parameters():
            parameter.normal_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return str(folder)


@pytest.mark.parametrize(("shares", "gates", "part"), [(None, False, 0.5), ([1.0, 3.0], True, 0.75)])
def test_every_weight_is_the_mean_and_the_last_ones_settings_stay(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, shares: list[float] | None, gates: bool, part: float
) -> None:
    fusion = {"fusion": "token"} if gates else {}
    folders = [side(tmp_path / f"{seed}", seed, byte_tokenizer, **fusion) for seed in (0, 1)]
    average(folders, tmp_path / "mean", shares, gates_of_last=gates)
    first, second = (LongMem.from_pretrained(folder).sidenet.state_dict() for folder in folders)
    mean = LongMem.from_pretrained(tmp_path / "mean")
    for name, weight in mean.sidenet.state_dict().items():
        share = 1.0 if gates and "gate" in name else part
        assert torch.allclose(weight, (1 - share) * first[name] + share * second[name], atol=1e-6), name
    assert mean.config.chunk_size == 2
    assert (tmp_path / "mean" / "tokenizer.json").is_file()


def test_sidenets_that_are_not_alike_are_refused(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    first = side(tmp_path / "a", 0, byte_tokenizer)
    for message, other in {"has another backbone": {"backbone": 1}, "layer is 3, that of": {"memory_layer": 1}}.items():
        with pytest.raises(CheckpointError, match=f"a: .*{message}"):
            average([first, side(tmp_path / "b", 0, byte_tokenizer, **other)], tmp_path / "mean")
