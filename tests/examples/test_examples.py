"""The examples run."""

import importlib.util
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.family_table import make_backbone
from transformers import PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[2] / "examples"
QUANTISED = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="pip install bitsandbytes")


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("train_with_trainer.py", "backbone texts out --steps 8 --window 32 --rows 2", ["'eval_loss': "]),
        ("large_backbone.py", "backbone --device-map auto", ["segment 6: loss ", "trained parameters on "]),
        pytest.param("large_backbone.py", "backbone --bits 4bit", ["trained parameters on "], marks=QUANTISED),
        (
            "your_model.py",
            "",
            [
                "layers whose keys can be remembered: [0, 1, 2, 3, 4, 5, 6, 7]",
                "layer 5 is remembered, read by SideNet layer 2",
                f"4,096 tokens take {4096 * 2 * 16 * 2 * 4 + 1024 * 2 * 16 * 4:,} bytes by arithmetic, 1,2",
                " on a100-80gb for ",
                "segment 3: loss",
                "384 tokens remembered",
                "generated: [",
            ],
        ),
    ],
)
def test_an_example_runs(
    name: str, arguments: str, says: list[str], tmp_path: Path, made_text: Any, byte_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments.split()])
    wide = {"hidden_size": 64, "intermediate_size": 64}  # as bitsandbytes needs it
    make_backbone("llama", vocab_size=260, **wide).save_pretrained("backbone")
    byte_tokenizer.save_pretrained("backbone")
    Path("texts").mkdir()
    for seed in range(5):
        Path("texts", f"{seed}.txt").write_text(made_text(60, seed=seed))
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    said = capsys.readouterr().out
    assert not [each for each in says if each not in said], said
    assert name != "train_with_trainer.py" or Path("out", "final", "sidenet.safetensors").exists()
