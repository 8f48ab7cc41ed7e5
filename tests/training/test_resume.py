"""Law 15: a resumed run is the run that was never interrupted; checkpoints are complete or absent."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from longmem.errors import CheckpointError
from longmem.memory import MemoryBank
from longmem.training import loop
from longmem.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from longmem.training.loop import train
from longmem.training.recipe import Recipe

Make = Callable[..., Recipe]
Records = Callable[..., list[dict[str, Any]]]


def history(records: list[dict[str, Any]]) -> list[tuple[int, float, float]]:
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records]


def weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    return load_file(next((recipe.out_dir / "final").glob("*.safetensors")))


def crash_after(recipe: Recipe, step: int) -> None:
    """What a power cut leaves of a finished run: the checkpoints up to this step."""
    shutil.rmtree(recipe.out_dir / "final")
    for path in list_checkpoints(recipe.out_dir / "checkpoints"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("task", ["pretrain", "adapt"])
def test_a_resumed_run_has_the_losses_and_weights_of_an_uninterrupted_one(
    task: str, optimiser: str, request: pytest.FixtureRequest, records: Records
) -> None:
    make: Make = request.getfixturevalue(task)
    whole, cut = (make(name, optim={"steps": 12, "optimiser": optimiser}) for name in ("whole", "cut"))
    train(whole, quiet=True)
    train(cut, quiet=True)
    crash_after(cut, 4)
    torch.manual_seed(12345)
    result = train(cut, resume=True, quiet=True)
    assert len(result.losses) == 8
    assert history(records(cut.out_dir, "train")) == history(records(whole.out_dir, "train"))
    assert records(cut.out_dir, "eval") == records(whole.out_dir, "eval")
    expected, found = weights(whole), weights(cut)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_without_its_bank_a_resumed_run_would_differ(
    adapt: Make, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = adapt("cut")
    train(recipe, quiet=True)
    before = history(records(recipe.out_dir, "train"))
    crash_after(recipe, 4)
    monkeypatch.setattr(MemoryBank, "load_state_dict", lambda self, state: None)
    train(recipe, resume=True, quiet=True)
    assert history(records(recipe.out_dir, "train")) != before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_and_the_run_goes_on_as_if_nothing_had_been(
    number: signal.Signals,
    adapt: Make,
    records: Records,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, stopped = adapt("whole"), adapt("stopped")
    train(whole, quiet=True)
    step = loop._Run.step

    def interrupted(self: Any, *arguments: Any) -> None:
        step(self, *arguments)
        if self.at.step == 3:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "step", interrupted)
        result = train(stopped)
    assert (result.step, result.model_dir) == (3, None)
    assert not (stopped.out_dir / "final").exists()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("stopped by a signal: 3 steps, 192 tokens")
    assert last.endswith("checkpoint saved, go on with --resume")
    assert train(stopped, resume=True, quiet=True).model_dir is not None
    assert history(records(stopped.out_dir, "train")) == history(records(whole.out_dir, "train"))


def test_resuming_without_a_checkpoint_begins_anew(pretrain: Make) -> None:
    assert train(pretrain(optim={"steps": 2}), resume=True, quiet=True).step == 2


def test_a_finished_run_can_be_given_a_larger_budget(pretrain: Make) -> None:
    train(pretrain(optim={"steps": 4}), quiet=True)
    result = train(pretrain(optim={"steps": 6}), resume=True, quiet=True)
    assert (result.step, len(result.losses)) == (6, 2)


def test_a_run_with_other_data_or_model_is_not_resumed(pretrain: Make) -> None:
    train(pretrain(), quiet=True)
    with pytest.raises(CheckpointError) as raised:
        train(pretrain(data={"window": 8}, model={"layers": 3}), resume=True, quiet=True)
    line = str(raised.value)
    assert "step-00000008: of another run: data.window was 16, is 8; model.layers was 2, is 3; undo that" in line


def test_only_the_newest_checkpoints_are_kept(pretrain: Make) -> None:
    recipe = pretrain(optim={"steps": 9}, checkpoint={"every": 2, "keep_last": 2})
    train(recipe, quiet=True)
    names = [path.name for path in list_checkpoints(recipe.out_dir / "checkpoints")]
    assert names == ["step-00000008", "step-00000009"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Two checkpoints; the path of the second."""
    for step in (1, 2):
        path = save_checkpoint(
            tmp_path,
            step,
            weights={"w": torch.arange(1000.0)},
            trainer={"progress": {"step": step}},
            rank={"bank": torch.zeros(10)},
            keep_last=2,
            accelerator=Accelerator(),
        )
    return path


def test_a_checkpoint_gives_back_what_was_saved(saved: Path) -> None:
    state = load_checkpoint(saved)
    assert (state.step, state.trainer) == (2, {"progress": {"step": 2}})
    assert torch.equal(state.weights["w"], torch.arange(1000.0))
    assert torch.equal(state.ranks[0]["bank"], torch.zeros(10))


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "rank-0.pt", "checkpoint.json"])
def test_a_checkpoint_cut_in_half_is_named_with_the_way_out(saved: Path, name: str) -> None:
    file = saved / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(saved)
    line = str(raised.value)
    assert "\n" not in line
    assert name in line
    assert line.endswith("delete step-00000002 to resume from step-00000001")


def test_a_checkpoint_whose_bytes_changed_is_refused(saved: Path) -> None:
    file = saved / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="its bytes have changed since it was written"):
        load_checkpoint(saved)


def test_a_crash_while_writing_leaves_the_checkpoint_before(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(
            saved.parent, 3, weights={}, trainer={}, rank={}, keep_last=1, accelerator=Accelerator()
        )  # fmt: skip
    assert [path.name for path in list_checkpoints(saved.parent)] == ["step-00000001", "step-00000002"]
    assert load_checkpoint(saved).step == 2


def test_another_number_of_processes_gets_the_parts_of_all(saved: Path) -> None:
    state = load_checkpoint(saved, process=1, world=2)
    assert state.processes == 1 and len(state.ranks) == 1


def test_parts_that_are_not_all_in_one_folder_are_no_checkpoint(tmp_path: Path, saved: Path) -> None:
    class Two(Accelerator):
        num_processes = 2  # type: ignore[assignment]

    with pytest.raises(CheckpointError, match="1 of 2 processes wrote their part here"):
        save_checkpoint(tmp_path, 3, weights={}, trainer={}, rank={}, keep_last=1, accelerator=Two())
