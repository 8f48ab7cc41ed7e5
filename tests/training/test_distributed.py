"""Several processes train what one process with all rows trains."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.training.test_resume import crash_after, weights
from tests.training.test_train_command import write

from longmem.training.checkpoint import list_checkpoints
from longmem.training.loop import train
from longmem.training.recipe import Recipe

Make = Callable[..., Recipe]
Records = Callable[..., list[dict[str, Any]]]


def launch(recipe: Path, *arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", "longmem", "train", str(recipe), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)


def trained(recipe: Path, *arguments: str, processes: int = 2) -> None:
    done = launch(recipe, *arguments, processes=processes)
    assert done.returncode == 0, done.stderr[:3000]


def losses(records: Records, recipe: Recipe, kind: str = "train") -> list[float]:
    return [record["loss"] for record in records(recipe.out_dir, kind)]


@pytest.mark.parametrize(
    ("task", "parallel"),
    [
        ("adapt", "fsdp"),
        pytest.param("adapt", "ddp", marks=pytest.mark.slow),
        pytest.param("pretrain", "ddp", marks=pytest.mark.slow),
        pytest.param("pretrain", "fsdp", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_what_one_trains(
    task: str, parallel: str, tmp_path: Path, request: pytest.FixtureRequest, records: Records
) -> None:
    make: Make = request.getfixturevalue(task)
    # texts end in the middle of segments and practice rows score few tokens: processes have unequally many targets
    changes = {"steps": 4, "dropout": 0.0, "accumulate": 2, "parallel": parallel}
    one, two = (make(f"with-{rows}", optim={**changes, "rows": rows}, data={"piece_tokens": 40}) for rows in (4, 2))
    train(one, quiet=True)
    trained(write(two, tmp_path / "two.toml"), "--quiet")
    expected, found = (records(recipe.out_dir, "train") for recipe in (one, two))
    assert [record["tokens"] for record in found] == [record["tokens"] for record in expected]
    for kind in ("train", "eval"):
        assert losses(records, two, kind) == pytest.approx(losses(records, one, kind), abs=1e-4)
    mine, theirs = weights(two), weights(one)
    assert set(mine) == set(theirs)
    # Adam's steps are of size 1e-2 whatever the gradient: where that is rounding alone, its sign is
    assert all(((mine[name] - theirs[name]).abs() < 1e-3).float().mean() > 0.98 for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_each_process_keeps_and_resumes_its_own_memory(
    parallel: str, adapt: Make, tmp_path: Path, records: Records
) -> None:
    optim = {"steps": 4, "parallel": parallel}
    whole, cut = (adapt(name, optim=optim, checkpoint={"every": 2}) for name in ("whole", "cut"))
    for recipe in (whole, cut):
        trained(write(recipe, tmp_path / f"{recipe.run.name}.toml"), "--quiet")
    crash_after(cut, 2)
    (left,) = list_checkpoints(cut.out_dir / "checkpoints")
    assert {path.name for path in left.glob("rank-*")} == {"rank-0.pt", "rank-1.pt"}
    trained(tmp_path / "cut.toml", "--quiet", "--resume")
    assert losses(records, cut) == losses(records, whole)


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_rows(adapt: Make, tmp_path: Path, records: Records) -> None:
    common = {"steps": 6, "dropout": 0.0}
    whole = adapt("whole", optim={**common, "rows": 4}, checkpoint={"every": 2})
    train(whole, quiet=True)
    two = adapt("cut", optim={**common, "rows": 2}, checkpoint={"every": 2})
    trained(write(two, tmp_path / "two.toml"), "--quiet")
    for step, rows, processes in ((4, 1, 4), (2, 4, 1)):
        crash_after(two, step)
        recipe = adapt("cut", optim={**common, "rows": rows, "parallel": "fsdp"}, checkpoint={"every": 2})
        trained(write(recipe, tmp_path / "cut.toml"), "--quiet", "--resume", processes=processes)
        assert losses(records, recipe) == pytest.approx(losses(records, whole), abs=1e-4)
        assert records(recipe.out_dir, "train")[-1]["step"] == 6
    crash_after(two, 2)
    refused = launch(tmp_path / "two.toml", "--resume", "--set", "optim.rows=3", processes=1)
    assert refused.returncode == 1
    assert "has 4 rows in 2 processes, this run 3 in each of 1; set optim.rows = 4" in refused.stderr
