"""The examples about training run, and fit on a page."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def backbone(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Llama over bytes."""
    config = AutoConfig.for_model(
        "llama", vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "backbone")
    byte_tokenizer.save_pretrained(str(tmp_path / "backbone"))
    return tmp_path / "backbone"


def run(name: str, *arguments: object) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_training_with_trainer(backbone: Path, made_text: Any, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for seed in range(5):
        (tmp_path / "texts" / f"{seed}.txt").write_text(made_text(60, seed=seed))
    chosen = (backbone, tmp_path / "texts", tmp_path / "out", "--steps", 8, "--window", 32, "--rows", 2)
    assert "eval_loss" in run("train_with_trainer.py", *chosen)
    assert (tmp_path / "out" / "final" / "sidenet.safetensors").exists()
    assert "eval_loss" in run("train_with_trainer.py", *chosen, "--resume")


def test_a_spread_backbone(backbone: Path) -> None:
    said = run("large_backbone.py", backbone, "--device-map", "auto")
    assert "segment 6:" in said and "trained parameters on cpu" in said


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install bitsandbytes"
)
def test_a_quantised_backbone(backbone: Path) -> None:
    assert "trained parameters on cpu" in run("large_backbone.py", backbone, "--bits", "4bit")


@pytest.mark.parametrize("name", ["train_with_trainer.py", "large_backbone.py", "ddp.yaml", "fsdp2.yaml"])
def test_an_example_has_at_most_60_lines(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) <= 60


@pytest.mark.parametrize(("name", "kind"), [("ddp.yaml", "MULTI_GPU"), ("fsdp2.yaml", "FSDP")])
def test_accelerate_reads_the_launch_files(name: str, kind: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(EXAMPLES / name))
    assert config.distributed_type.value == kind
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False
