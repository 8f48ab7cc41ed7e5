"""DDP and FSDP2: processes compute the gradients of one process that has all their rows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.family_table import FAMILIES
from tests.training.gradients import gradients
from tests.training.test_train_command import write
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from longmem.training.recipe import Recipe

Make = Callable[..., Recipe]

ROWS = 4
# the backbone's matrix products in bf16 round differently for another number of rows
FP32, BF16 = 2e-5, 2e-2
COMMON = {"steps": 3, "dropout": 0.0, "accumulate": 2}
RECOMPUTE = {"segments": 2, "gradient_checkpointing": True}


def cases(adapt: Make, pretrain: Make, families: Callable[[str], str]) -> dict[str, tuple[Make, dict[str, Any], float]]:
    """Name -> what makes the recipe, its changes, how close gradients must be."""
    bf16 = {"dtype": "bfloat16"}
    return {
        "ddp": (adapt, {"optim": {"parallel": "ddp"}}, FP32),
        "ddp-bf16": (adapt, {"optim": {"parallel": "ddp", **RECOMPUTE}, "backbone": bf16}, BF16),
        "ddp-control": (adapt, {"optim": {"parallel": "ddp"}, "sidenet": {"memory": False}}, FP32),
        "fsdp": (adapt, {"optim": {"parallel": "fsdp"}}, FP32),
        "fsdp-bf16": (adapt, {"optim": {"parallel": "fsdp", **RECOMPUTE}, "backbone": bf16}, BF16),
        "fsdp-control": (adapt, {"optim": {"parallel": "fsdp"}, "sidenet": {"memory": False}}, FP32),
        "fsdp-llama": (
            adapt,
            {"optim": {"parallel": "fsdp", **RECOMPUTE}, "backbone": {"path": families("llama")}},
            FP32,
        ),
        "fsdp-gpt2-softmax": (
            adapt,
            {
                "optim": {"parallel": "fsdp"},
                "backbone": {"path": families("gpt2")},
                "sidenet": {"fusion": "softmax", "boundary": "reset"},
            },
            FP32,
        ),
        "fsdp-pretrain": (pretrain, {"optim": {"parallel": "fsdp", "optimiser": "muon"}}, FP32),
    }


def launch(folder: Path, processes: int) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    script = str(Path(__file__).with_name("gradients.py"))
    done = subprocess.run([*command, script, str(folder)], env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-6000:]


def furthest(mine: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> float:
    """Largest difference in a step, as a share of that step's largest gradient."""
    assert [set(step) for step in mine] == [set(step) for step in theirs]
    found = []
    for one, other in zip(mine, theirs, strict=True):
        largest = max(float(grad.abs().max()) for grad in other.values())
        found.append(max(float((one[name] - other[name]).abs().max()) for name in other) / largest)
    return max(found)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_compute_the_gradients_of_one(
    processes: int, adapt: Make, pretrain: Make, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def family(name: str) -> str:
        folder = tmp_path / name
        kind, fields = FAMILIES[name]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**fields, "vocab_size": 260}))
        model.save_pretrained(folder)
        byte_tokenizer.save_pretrained(str(folder))
        return str(folder)

    together = tmp_path / "together"
    together.mkdir()
    expected, tolerance = {}, {}
    for name, (make, changes, close) in cases(adapt, pretrain, family).items():
        for rows, run in ((ROWS, f"one-{name}"), (ROWS // processes, name)):
            settings = {**changes, "optim": {**COMMON, **changes["optim"], "rows": rows}}
            # texts that end in the middle of a segment: rows have unequally many targets
            recipe = make(run, **{"data": {"piece_tokens": 40}, **settings})
            if run == name:
                write(recipe, together / f"{name}.toml")
            else:
                expected[name], tolerance[name] = gradients(recipe), close
    launch(together, processes)
    far = {name: furthest(torch.load(together / f"{name}.gradients"), expected[name]) for name in expected}
    assert {name: share for name, share in far.items() if share > tolerance[name]} == {}, far
