"""Law 15: a resumed run is the run that was never interrupted; checkpoints are complete or absent."""

import shutil
import signal
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.conftest import ASK, Make, records

from longmem.errors import CheckpointError, ConfigError
from longmem.training.recipe import Recipe
from longmem.training.run import train
from longmem.training.trainer import StreamTrainer, list_checkpoints


def history(recipe: Recipe) -> list[dict[str, Any]]:
    """What a run wrote into its metrics, without the times."""
    times = ("seconds", "tokens_per")
    found = [each for kind in ("train", "eval") for each in records(recipe.out_dir, kind)]
    return [{key: value for key, value in each.items() if not key.startswith(times)} for each in found]


def weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    return load_file(next((recipe.out_dir / "final").rglob("*.safetensors")))


def saved(recipe: Recipe) -> list[str]:
    """The checkpoints that are complete."""
    return [path.name for path in list_checkpoints(recipe.out_dir / "checkpoints")]


def crash_after(recipe: Recipe, step: int) -> None:
    """What a power cut leaves of a finished run: the checkpoints up to this step."""
    shutil.rmtree(recipe.out_dir / "final")
    for name in saved(recipe):
        if int(name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(recipe.out_dir / "checkpoints" / name)


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("pretrain", {"optim": {"optimiser": "muon"}}),
        ("adapt", {"optim": {"optimiser": "muon"}, "sidenet": {"boundary": "reset", "memory_layers": [1, 2]}}),
        ("adapt", {"method": "memtrm"}),
        ("adapt", {"sidenet": {"memory": False}}),
        ("adapt", {"needles": ASK}),
    ],
    ids=["pretrain", "two layers", "memtrm", "control", "needles"],
)
def test_a_resumed_run_has_the_losses_and_weights_of_an_uninterrupted_one(
    task: str, changes: dict[str, Any], recipes: dict[str, Make]
) -> None:
    optim = {"steps": 10, **changes.get("optim", {})}
    whole, cut = (recipes[task](name, **{**changes, "optim": optim}) for name in ("whole", "cut"))
    train(whole, quiet=True)
    train(cut, quiet=True)
    crash_after(cut, 4)
    torch.manual_seed(12345)
    result = train(cut, resume=True, quiet=True)
    assert len(result.losses) == 6
    assert history(cut) == history(whole)
    expected, found = weights(whole), weights(cut)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 3), (signal.SIGTERM, 4)])  # an evaluation is due at 4
def test_a_signal_saves_and_stops_and_the_run_goes_on_as_if_nothing_had_been(
    number: signal.Signals,
    step: int,
    adapt: Make,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, stopped = adapt("whole"), adapt("stopped")
    train(whole, quiet=True)
    batch = StreamTrainer.next_batch

    def interrupted(self: Any) -> Any:
        if self.state.global_step == step - 1 and not raised:
            raised.append(number)
            signal.raise_signal(number)
        return batch(self)

    raised: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(StreamTrainer, "next_batch", interrupted)
        result = train(stopped)
    assert (result.step, result.model_dir) == (step, None)
    assert not (stopped.out_dir / "final").exists()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"stopped by a signal: {step} steps, {64 * step} tokens")
    assert last.endswith("checkpoint saved, go on with --resume")
    assert train(stopped, resume=True, quiet=True).model_dir is not None
    assert history(stopped) == history(whole)


def test_a_finished_run_can_be_given_a_larger_budget_or_none_but_no_other_data_or_model(
    pretrain: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longmem.progress.EVERY", {True: 0.0, False: 0.0})
    train(pretrain(optim={"steps": 4}), quiet=True)
    nothing = train(pretrain(optim={"steps": 4}), resume=True, quiet=True)
    assert (nothing.step, nothing.losses) == (4, [])
    with pytest.raises(CheckpointError) as raised:
        train(pretrain(data={"window": 8}, model={"layers": 3}), resume=True, quiet=True)
    line = str(raised.value)
    assert "checkpoint-4: of another run: data.window was 16, is 8; model.layers was 2, is 3; undo that" in line
    longer = pretrain(optim={"steps": 9}, checkpoint={"every": 3, "keep_last": 9}, log={"every": 5})
    with (longer.out_dir / "metrics.jsonl").open("a") as file:
        file.write("\0\0\n")  # a disk that lost power
    result = train(longer, resume=True)
    assert (result.step, len(result.losses)) == (9, 2)
    said = capsys.readouterr().err
    assert "pre-training " in said and "resumed at step 4, " in said and "pretrain run: 6 of 9 steps (66 %), " in said
    assert saved(longer) == ["checkpoint-4", "checkpoint-6", "checkpoint-9"], "it does what it is told now"


def test_the_best_weights_are_kept_and_patience_ends_the_run_also_one_that_was_resumed(adapt: Make) -> None:
    optim = {"steps": 60, "lr": 0.3, "schedule": "constant", "clip": 0.0, "accumulate": 1}
    every = {"every": 2, "keep_last": 30}
    recipe = adapt(optim=optim, eval={"every": 2, "best": True, "patience": 3}, checkpoint=every)
    result = train(recipe, quiet=True)
    assert result.step < 60
    losses = [float(record["loss"]) for record in records(recipe.out_dir, "eval")]
    best = 2 * (losses.index(min(losses)) + 1)
    assert best < result.step
    kept = weights(recipe)
    of_best = load_file(recipe.out_dir / "checkpoints" / f"checkpoint-{best}" / "sidenet.safetensors")
    assert all(torch.equal(kept[name], of_best[name]) for name in kept)
    crash_after(recipe, result.step - 2)
    assert train(recipe, resume=True, quiet=True).step == result.step


def test_a_checkpoint_with_a_file_cut_short_or_of_another_method_is_refused_with_the_way_out(adapt: Make) -> None:
    recipe = adapt()
    train(recipe, quiet=True)
    with pytest.raises(CheckpointError, match="method was 'longmem', is 'memtrm'"):
        train(adapt(method="memtrm"), resume=True, quiet=True)
    state = ("optimizer.pt", "scheduler.pt", "rank-0-of-1.pt", "rng_state.pth", "trainer_state.json")
    said = {f"{name}: damaged; delete": name for name in state}
    said[r"not the weights of this model \(.*\); delete it"] = "sidenet.safetensors"
    for message, name in said.items():
        file = recipe.out_dir / "checkpoints" / "checkpoint-8" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-100])
        with pytest.raises(CheckpointError, match=f"checkpoint-8.*{message}.* to resume from an older") as raised:
            train(recipe, resume=True, quiet=True)
        assert "\n" not in str(raised.value)
        file.write_bytes(whole)


@pytest.mark.parametrize(("step", "left"), [(3, []), (6, ["checkpoint-3"])])
def test_a_disk_that_is_full_is_one_line_and_leaves_the_checkpoint_before_or_none(
    step: int, left: list[str], adapt: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, save = adapt(checkpoint={"every": 3}), torch.save

    def full(state: Any, file: Any, *rest: Any, **more: Any) -> None:
        if f"checkpoint-{step}/rank" in str(file):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 6541504 vs 6541392")
        save(state, file, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(
            CheckpointError, match=r"cannot be written \(.enforce.*; make room, then go on with --resume"
        ):
            train(recipe, quiet=True)
    assert (recipe.out_dir / "checkpoints" / f"checkpoint-{step}").is_dir() and saved(recipe) == left
    assert train(recipe, resume=True, quiet=True).step == 8
    shutil.rmtree(recipe.out_dir / "checkpoints")
    with pytest.raises(ConfigError, match=r"an earlier run; no checkpoint to go on from; add --overwrite to remove it"):
        train(recipe, resume=True, quiet=True)  # the model is not removed
