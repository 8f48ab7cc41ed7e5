"""The examples run."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.family_table import make_backbone
from transformers import PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def backbone(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Llama over bytes, as wide as bitsandbytes needs it."""
    make_backbone("llama", vocab_size=260, hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "backbone")
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


def test_a_spread_backbone(backbone: Path) -> None:
    said = run("large_backbone.py", backbone, "--device-map", "auto")
    assert "segment 6:" in said and "trained parameters on cpu" in said


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install bitsandbytes"
)
def test_a_quantised_backbone(backbone: Path) -> None:
    assert "trained parameters on cpu" in run("large_backbone.py", backbone, "--bits", "4bit")


def test_the_example_goes_from_layer_to_generation_on_a_page() -> None:
    said = run("your_model.py")
    assert "layers whose keys can be remembered: [0, 1, 2, 3, 4, 5, 6, 7]" in said
    assert "layer 5 is remembered, read by SideNet layer 2" in said
    match = re.search(r"4,096 tokens take ([\d,]+) bytes by arithmetic, ([\d,]+) in the bank", said)
    assert match is not None
    by_hand, real = (int(number.replace(",", "")) for number in match.groups())
    assert by_hand == 4096 * 2 * 16 * 2 * 4 + 1024 * 2 * 16 * 4
    assert by_hand < real < 1.05 * by_hand
    assert "GiB per device" in said and " on a100-80gb for " in said
    assert "segment 3: loss" in said and "384 tokens remembered" in said
    assert re.search(r"generated: \[\d+(, \d+){7}\]", said)
