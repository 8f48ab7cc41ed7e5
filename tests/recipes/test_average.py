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


def test_every_weight_is_the_mean_and_the_last_ones_settings_stay(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    def side(seed: int, backbone: int = 0, **settings: Any) -> str:
        """The folder of a SideNet of random weights over a tiny backbone."""
        folder, under = tmp_path / f"side-{seed}", tmp_path / f"backbone-{backbone}"
        tiny_gpt(backbone).save_pretrained(under)
        settings = {"memory_layer": 3, "fusion": "token", "num_retrieved": 8, "chunk_size": seed + 1, **settings}
        model = LongMem.from_backbone(under, **settings)
        torch.manual_seed(seed)
        for parameter in model.sidenet.parameters():
            torch.nn.init.normal_(parameter)
        model.save_pretrained(folder)
        byte_tokenizer.save_pretrained(str(folder))
        return str(folder)

    folders, out = [side(0), side(1)], tmp_path / "mean"
    first, second = (LongMem.from_pretrained(folder).sidenet.state_dict() for folder in folders)
    for shares, gates_of_last, part in (None, False, 0.5), ([1.0, 3.0], True, 0.75):
        average(folders, out, shares, gates_of_last)
        mean = LongMem.from_pretrained(out)
        for name, weight in mean.sidenet.state_dict().items():
            share = 1.0 if gates_of_last and "gate" in name else part
            assert torch.allclose(weight, (1 - share) * first[name] + share * second[name], atol=1e-6), name
        assert mean.config.chunk_size == 2 and (out / "tokenizer.json").is_file()
    for message, other in {"has another backbone": {"backbone": 1}, "layer is 3, that of": {"memory_layer": 1}}.items():
        with pytest.raises(CheckpointError, match=f"side-0: .*{message}"):
            average([folders[0], side(3, **other)], out)
