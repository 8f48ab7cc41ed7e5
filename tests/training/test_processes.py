"""DDP and FSDP2: several processes train what one process with all their rows trains."""

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
from tests.training.test_checkpoints import crash_after
from tests.training.test_train_command import write
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from longmem.errors import ConfigError
from longmem.training.models import wants_sharding
from longmem.training.recipe import Recipe
from longmem.training.trainer import list_checkpoints

Make = Callable[..., Recipe]
Records = Callable[..., list[dict[str, Any]]]

ROWS = 4
# the backbone's matrix products in bf16 round differently for another number of rows
FP32, BF16 = 2e-5, 2e-2
COMMON = {"steps": 3, "dropout": 0.0, "accumulate": 2}
SLOW = pytest.mark.slow
RECOMPUTE = {"gradient_checkpointing": True}


def cases(adapt: Make, pretrain: Make, families: Callable[[str], str]) -> dict[str, tuple[Make, dict[str, Any], float]]:
    """Name -> what makes the recipe, its changes, how close gradients must be."""
    bf16 = {"dtype": "bfloat16"}
    return {
        "ddp": (adapt, {"optim": {"parallel": "ddp"}}, FP32),
        "ddp-bf16": (adapt, {"optim": {"parallel": "ddp", **RECOMPUTE}, "backbone": bf16}, BF16),
        "ddp-control": (adapt, {"optim": {"parallel": "ddp"}, "sidenet": {"memory": False}}, FP32),
        "ddp-memtrm": (adapt, {"optim": {"parallel": "ddp"}, "method": "memtrm"}, FP32),
        "ddp-pretrain": (pretrain, {"optim": {"parallel": "ddp"}}, FP32),
        "fsdp": (adapt, {"optim": {"parallel": "fsdp"}}, FP32),
        "fsdp-bf16": (adapt, {"optim": {"parallel": "fsdp", **RECOMPUTE}, "backbone": bf16}, BF16),
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
        "fsdp-pretrain": (pretrain, {"optim": {"parallel": "fsdp", "optimiser": "muon", "muon_lr": 1e-5}}, FP32),
    }


def launch(*command: object, processes: int = 2) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([*start, *map(str, command)], env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-6000:]


def furthest(mine: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> float:
    """Largest difference in a step, as a share of that step's largest gradient."""
    assert [set(step) for step in mine] == [set(step) for step in theirs]
    found = []
    for one, other in zip(mine, theirs, strict=True):
        largest = max(float(grad.abs().max()) for grad in other.values())
        found.append(max(float((one[name] - other[name]).abs().max()) for name in other) / largest)
    return max(found)


QUICK = ("ddp", "ddp-memtrm", "fsdp-llama", "fsdp-gpt2-softmax")


@pytest.mark.parametrize(
    ("processes", "quick"), [(2, True), pytest.param(2, False, marks=SLOW), pytest.param(4, False, marks=SLOW)]
)
def test_processes_compute_the_gradients_of_one(
    processes: int, quick: bool, adapt: Make, pretrain: Make, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
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
        if quick != (name in QUICK) and processes == 2:
            continue
        for rows, run in ((ROWS, f"one-{name}"), (ROWS // processes, name)):
            # texts that end in the middle of a segment: rows have unequally many targets
            settings = {"data": {"piece_tokens": 40}, "eval": {"every": 0}, **changes}
            parallel = {} if rows != ROWS else {"parallel": "auto"}
            recipe = make(run, **{**settings, "optim": {**COMMON, **changes["optim"], "rows": rows, **parallel}})
            if run == name:
                write(recipe, together / f"{name}.toml")
            else:
                expected[name], tolerance[name] = gradients(recipe), close
    launch(Path(__file__).with_name("gradients.py"), together, processes=processes)
    far = {name: furthest(torch.load(together / f"{name}.gradients"), expected[name]) for name in expected}
    assert {name: share for name, share in far.items() if share > tolerance[name]} == {}, far


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_each_process_keeps_and_resumes_its_own_memory(
    parallel: str, adapt: Make, tmp_path: Path, records: Records
) -> None:
    optim = {"steps": 4, "parallel": parallel}
    whole, cut = (adapt(name, optim=optim, checkpoint={"every": 2}) for name in ("whole", "cut"))
    paths = {recipe.run.name: write(recipe, tmp_path / f"{recipe.run.name}.toml") for recipe in (whole, cut)}
    for path in paths.values():
        launch("-m", "longmem", "train", path, "--quiet")
    crash_after(cut, 2)
    (left,) = list_checkpoints(cut.out_dir / "checkpoints")
    assert {path.name for path in left.glob("rank-*")} == {"rank-0-of-2.pt", "rank-1-of-2.pt"}
    launch("-m", "longmem", "train", paths["cut"], "--quiet", "--resume")
    losses = [[record["loss"] for record in records(recipe.out_dir, "train")] for recipe in (whole, cut)]
    assert losses[0] == losses[1]
    refused = subprocess.run(
        [sys.executable, "-m", "longmem", "train", str(paths["cut"]), "--resume", "--set", "optim.parallel=ddp"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert refused.returncode == 1
    assert "written by 2 processes, there are 1; start as many" in refused.stderr


def test_a_launch_file_decides_where_the_recipe_says_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not wants_sharding("auto")
    assert wants_sharding("fsdp")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert wants_sharding("auto")
    with pytest.raises(ConfigError, match=r"set optim\.parallel = 'auto'"):
        wants_sharding("ddp")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ConfigError, match="longmem needs FSDP2: fsdp_version: 2"):
        wants_sharding("auto")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="launched for DEEPSPEED"):
        wants_sharding("auto")
