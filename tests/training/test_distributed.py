"""Two processes train what one process with all rows trains."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.training.test_train_command import write

from longmem.training.checkpoint import list_checkpoints
from longmem.training.loop import train
from longmem.training.recipe import Recipe

Make = Callable[..., Recipe]
Records = Callable[..., list[dict[str, Any]]]


def launch(recipe: Path, *arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "longmem"]
    done = subprocess.run(
        [*command, "train", str(recipe), *arguments], env=environment, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stderr[:3000]


@pytest.mark.parametrize("task", [pytest.param("pretrain", marks=pytest.mark.slow), "adapt"])
def test_two_processes_train_what_one_trains(
    task: str, tmp_path: Path, request: pytest.FixtureRequest, records: Records
) -> None:
    make: Make = request.getfixturevalue(task)
    # every process takes the mean over its own targets: equal as long as all have equally many
    changes = {"steps": 3, "dropout": 0.0, "accumulate": 2}
    data = {"repeat_fraction": 0.0}
    one, two = (make(f"with-{rows}", optim={**changes, "rows": rows}, data=data) for rows in (4, 2))
    train(one, quiet=True)
    launch(write(two, tmp_path / "two.toml"), "--quiet")
    expected, found = (records(recipe.out_dir, "train") for recipe in (one, two))
    assert [record["tokens"] for record in found] == [record["tokens"] for record in expected]
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], abs=1e-4)


@pytest.mark.slow
def test_each_process_keeps_and_resumes_its_own_memory(adapt: Make, tmp_path: Path, records: Records) -> None:
    whole, cut = (adapt(name, optim={"steps": 4}, checkpoint={"every": 2}) for name in ("whole", "cut"))
    for recipe in (whole, cut):
        launch(write(recipe, tmp_path / f"{recipe.run.name}.toml"), "--quiet")
    shutil.rmtree(list_checkpoints(cut.out_dir / "checkpoints")[-1])
    (left,) = list_checkpoints(cut.out_dir / "checkpoints")
    assert {path.name for path in left.glob("rank-*")} == {"rank-0.pt", "rank-1.pt"}
    launch(tmp_path / "cut.toml", "--quiet", "--resume")
    expected, found = ([r["loss"] for r in records(recipe.out_dir, "train")] for recipe in (whole, cut))
    assert found == expected
