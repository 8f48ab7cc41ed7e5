"""A folder of files for every task, with checkpoints of every kind over tiny random backbones."""

import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longmem import LongMem, MemTRM, TrainingFree

SHAPE: dict[str, Any] = {"memory_layer": 2, "chunk_size": 4, "num_retrieved": 16, "memory_size": 512}


@torch.no_grad()
def disturb(model: torch.nn.Module, seed: str, spread: float, trained: set[str] | None = None) -> None:
    """Add noise to every matrix; by its name, so that the order in which parameters are made does not matter."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and (trained is None or name in trained):
            draw = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=spread)


@pytest.fixture(scope="session")
def made_home(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> Path:
    """Over ``backbone`` are ``side``, ``control``, ``memtrm`` and ``free``, over ``other`` the two ``foreign`` ones."""
    home = tmp_path_factory.mktemp("evaluation") / "home"  # the folder's name is part of names in results
    shutil.copytree(Path(__file__).with_name("home"), home)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    for name in ("backbone", "other"):
        backbone = LlamaForCausalLM(config).eval()
        for parameter in backbone.parameters():
            torch.nn.init.constant_(parameter, float(parameter.ndim == 1))
        disturb(backbone, name, 0.25)
        # so that some of what is generated is what is expected
        backbone.lm_head.weight.data[byte_tokenizer(" xynp")["input_ids"]] *= 4
        backbone.save_pretrained(home / name)
        byte_tokenizer.save_pretrained(home / name)
    for name, folder, over in (
        ("side", "side/final", "backbone"),
        ("control", "control", "backbone"),
        ("foreign", "foreign", "other"),
    ):
        side = LongMem.from_backbone(home / over, **SHAPE)
        disturb(side, name, 0.05, set(side.trainable_parameter_names()))
        side.save_pretrained(home / folder)
    for name, over in (("memtrm", "backbone"), ("foreign-memtrm", "other")):
        trained: Any = MemTRM.from_backbone(home / over, **SHAPE)
        disturb(trained, name, 0.02)
        trained.save_pretrained(home / name)
    TrainingFree.from_backbone(home / "backbone", gate=[0.1, 0.2, 0.3, 0.4], **SHAPE).save_pretrained(home / "free")
    return home


@pytest.fixture
def home(made_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """It is the current folder."""
    monkeypatch.chdir(made_home)
    return made_home
