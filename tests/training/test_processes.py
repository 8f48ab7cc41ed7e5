"""DDP and FSDP2: several processes train what one process with all their rows trains.

Launched by torch.distributed.run with a folder, this file runs every ``*.toml`` of it, and writes ``NAME.gradients``.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from tests.family_table import make_backbone
from tests.training.conftest import Make, records, write
from tests.training.test_checkpoints import crash_after
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerCallback

from longmem.errors import CheckpointError, ConfigError
from longmem.training.models import undivided
from longmem.training.recipe import Recipe
from longmem.training.run import build_trainer, train
from longmem.training.trainer import list_checkpoints

ROWS = 4
# the backbone's matrix products in bf16 round differently for another number of rows
FP32, BF16 = 2e-5, 2e-2
COMMON = {"steps": 3, "dropout": 0.0, "accumulate": 2, "clip": 0.0}
HALF: dict[str, Any] = {"optim": {"gradient_checkpointing": True}, "backbone": {"dtype": "bfloat16"}}
CASES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp-bf16": HALF,
    "ddp-control": {"sidenet": {"memory": False}},
    "ddp-memtrm": {"method": "memtrm"},
    "ddp-pretrain": {},
    "fsdp": {},
    "fsdp-bf16": HALF,
    "fsdp-llama": {"optim": {"gradient_checkpointing": True}, "backbone": {"path": "llama"}},
    "fsdp-gpt2-softmax": {"backbone": {"path": "gpt2"}, "sidenet": {"fusion": "softmax", "boundary": "reset"}},
    "fsdp-pretrain": {"optim": {"optimiser": "muon", "muon_lr": 1e-5}},
}
QUICK = ("ddp", "ddp-memtrm", "fsdp-llama", "fsdp-gpt2-softmax")


def gradients(recipe: Recipe) -> list[dict[str, Tensor]]:
    """Of every step of a run that does not clip them."""
    found: list[dict[str, Tensor]] = []
    set_seed(recipe.run.seed)
    trainer = build_trainer(recipe, PartialState(cpu=True), quiet=True)

    class Seen(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            grads = [(name, weight.grad) for name, weight in trainer.trained() if weight.grad is not None]
            found.append({name: undivided(grad).cpu().clone() for name, grad in grads})

    trainer.add_callback(Seen())
    trainer.train()
    return found


def launch(*command: object) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
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


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_processes_compute_the_gradients_of_one(
    quick: bool,
    recipes: dict[str, Make],
    byte_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # backbones are named by their families
    for family in ("llama", "gpt2"):
        make_backbone(family, vocab_size=260).save_pretrained(family)
        byte_tokenizer.save_pretrained(family)
    together = tmp_path / "together"
    together.mkdir()
    expected = {}
    for name in (name for name in CASES if quick == (name in QUICK)):
        changes = CASES[name]
        make, optim = recipes["pretrain" if "pretrain" in name else "adapt"], {**COMMON, **changes.get("optim", {})}
        # texts that end in the middle of a segment: rows have unequally many targets
        settings = {"data": {"piece_tokens": 40}, "eval": {"every": 0}, **changes}
        expected[name] = gradients(make(f"one-{name}", **{**settings, "optim": {**optim, "rows": ROWS}}))
        optim |= {"rows": ROWS // 2, "parallel": name.split("-")[0]}
        write(make(name, **{**settings, "optim": optim}), together / f"{name}.toml")
    launch(__file__, together)
    far = {name: furthest(torch.load(together / f"{name}.gradients"), expected[name]) for name in expected}
    assert {name: share for name, share in far.items() if share > (BF16 if "bf16" in name else FP32)} == {}, far


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_each_process_keeps_and_resumes_its_own_memory(parallel: str, adapt: Make, tmp_path: Path) -> None:
    optim = {"steps": 4, "parallel": parallel}
    whole, cut = (adapt(name, optim=optim, checkpoint={"every": 2}) for name in ("whole", "cut"))
    for recipe in (whole, cut):
        launch("-m", "longmem", "train", write(recipe, tmp_path / f"{recipe.run.name}.toml"), "--quiet")
    crash_after(cut, 2)
    (left,) = list_checkpoints(cut.out_dir / "checkpoints")
    assert {path.name for path in left.glob("rank-*")} == {"rank-0-of-2.pt", "rank-1-of-2.pt"}
    with pytest.raises(CheckpointError, match="written by 2 processes, there are 1; start as many"):
        train(adapt("cut", optim={"steps": 4}), resume=True, quiet=True)
    launch("-m", "longmem", "train", tmp_path / "cut.toml", "--quiet", "--resume")
    losses = [[record["loss"] for record in records(recipe.out_dir, "train")] for recipe in (whole, cut)]
    assert losses[0] == losses[1]


def test_a_launch_that_would_divide_the_model_itself_is_refused(adapt: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=r"launched for DEEPSPEED: that cannot divide .* optim\.parallel = 'fsdp'"):
        train(adapt(), quiet=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for path in sorted(Path(sys.argv[1]).glob("*.toml")):
        steps = gradients(Recipe.load(path))
        if PartialState().is_main_process:
            torch.save(steps, path.with_suffix(".gradients"))
    PartialState().destroy_process_group()  # its threads may not outlive main: the process would abort
