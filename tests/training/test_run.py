"""Runs from their recipe to their end: what is learned, said, saved, and left alone."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from tests.calling import Command
from tests.family_table import tiny_gpt
from tests.training.conftest import ASK, Make, records, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from longmem import AlibiGPTForCausalLM, LongMem, MemTRM
from longmem.data.tokens import train_tokenizer
from longmem.errors import ConfigError, LongMemError
from longmem.training.adapt import LongMemTrainer
from longmem.training.recipe import Recipe
from longmem.training.run import build_trainer, train

LONG = {"steps": 40, "accumulate": 1, "dropout": 0.0, "rows": 4}


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[LongMemTrainer]:
    """The trainers that runs make, with the weights that they began with."""
    found: list[LongMemTrainer] = []

    def made(*given: Any, **settings: Any) -> Any:
        found.append(build_trainer(*given, **settings))
        found[-1].before = {name: weight.clone() for name, weight in found[-1].longmem.state_dict().items()}
        return found[-1]

    monkeypatch.setattr("longmem.training.run.build_trainer", made)
    return found


def alone(recipe: Recipe) -> Any:
    """Its trainer, which has trained nothing yet."""
    return build_trainer(recipe, PartialState(cpu=True), quiet=True)


def test_pre_training_learns_and_its_model_loads_like_any_other(pretrain: Make) -> None:
    recipe = pretrain(optim={"steps": 60, "rows": 8, "dropout": 0.0}, data={"repeat_fraction": 0.0})
    result = train(recipe, quiet=True)
    assert sum(result.losses[-5:]) / 5 < result.losses[0] - 0.5
    assert result.model_dir == recipe.out_dir / "final"
    model = AutoModelForCausalLM.from_pretrained(result.model_dir)
    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    assert isinstance(model, AlibiGPTForCausalLM)
    assert (model.config.vocab_size, model.config.max_position_embeddings) == (len(tokenizer), 16)
    with pytest.raises(ConfigError, match=r"holds an earlier run; add --resume to go on, --overwrite to remove it"):
        train(recipe, quiet=True)


def test_adaptation_learns_in_the_sidenet_alone_and_tells_how(
    adapt: Make, trainers: list[Any], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longmem.progress.EVERY", {True: 0.0, False: 0.0})
    out, path = tmp_path / "run", write(adapt(optim=LONG, log={"every": 4}), tmp_path / "recipe.toml")
    assert command("train", path, "--check") == (0, f"{path}: adapt, no problems found\n", "")
    estimated = command("train", path, "--estimate", "a100-80gb").out.splitlines()
    assert [line.split()[0] for line in estimated] == ["parameters", "memory", "work", "time", "speed", "cost"]
    assert not out.exists(), "nothing is trained"

    status, shown, said = command("train", path)
    assert (status, shown) == (0, f"{out}/final\n")
    before, after = trainers[0].before, trainers[0].longmem.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(trainers[0].longmem.trainable_parameter_names()), "no byte of the backbone"
    kept = {path.name for path in (out / "checkpoints").iterdir()}
    assert kept == {f"checkpoint-{step}" for step in (24, 28, 32, 36, 40)}, "the newest five"
    for folder in (out / "final", out / "checkpoints" / "checkpoint-24"):
        assert LongMem.from_pretrained(folder).memory_layers == (1,)
    named = json.loads((out / "final" / "config.json").read_text())["backbone_name_or_path"]
    assert named == "../../backbone", "so that both can move"
    assert len(AutoTokenizer.from_pretrained(out / "final")) == 260

    lines = [line for line in said.splitlines() if line.startswith("step ") and "tok/s" in line]
    found, measured = records(out, "train"), records(out, "eval")
    assert [record["step"] for record in found] == [*range(4, 41, 4)] and len(lines) == 10
    assert lines[1].startswith("step 8/40 · loss ")
    assert said.splitlines()[-1].startswith("finished: 40 steps, 2,560 tokens")
    for line in (
        "adapting a SideNet of ", "adapt run: 2 of 40 steps (5 %), ", "validating: 128 of 128 tokens (100 %), ",
        "validating the backbone: 128 of ", "validating without memory: 128 of ",
    ):  # fmt: skip
        assert line in said
    wanted = {"step", "tokens", "loss", "perplexity", "lr", "grad_norm", "tokens_per_second", "memory_fill", "share"}
    assert wanted <= set(found[1]) and found[1]["tokens"] == 512
    assert found[1]["perplexity"] == pytest.approx(math.exp(found[1]["loss"])) and len(found[1]["share"]) == 4
    assert 0 < found[0]["memory_fill"] <= found[1]["memory_fill"] <= 1
    assert found[-1]["loss"] < found[0]["loss"] - 0.1 and measured[-1]["loss"] < measured[-1]["loss_backbone"]
    assert "loss_memory_off" in measured[-1] and "loss_memory_off" not in measured[0]

    done = command("train", path, "--set", "optim.steps=2", "--json", "--quiet", "--overwrite")
    assert (done.status, done.err) == (0, "") and "loss" in done.json["evaluation"]
    made = [done.json[name] for name in ("step", "tokens", "model_dir")]
    assert made == [2, 128, f"{out}/final"]


def test_a_memtrm_learns_with_memory_older_than_its_weights(adapt: Make, trainers: list[Any], tmp_path: Path) -> None:
    backbone = tmp_path / "backbone"
    files = {file.name: file.read_bytes() for file in backbone.iterdir()}
    frozen = alone(adapt("frozen", optim=LONG)).evaluate()["eval_loss_backbone"]
    told = {"log": {"tensorboard": True}, "sidenet": {"recency": 0.5}}
    result = train(adapt("coupled", method="memtrm", optim=LONG, **told), quiet=True)
    assert sum(result.losses[-5:]) / 5 < sum(result.losses[:5]) / 5 - 0.1
    assert result.evaluation["loss"] < result.evaluation["loss_backbone"]
    assert result.evaluation["loss_backbone"] == pytest.approx(frozen, abs=1e-6), "before it was trained"
    assert result.evaluation["loss_memory_off"] != result.evaluation["loss"]
    assert any((result.out_dir / "tensorboard").glob("events.*"))
    assert {file.name: file.read_bytes() for file in backbone.iterdir()} == files
    before, after = trainers[0].before, trainers[0].longmem.state_dict()
    assert not any(torch.equal(before[name], after[name]) for name in trainers[0].longmem.trainable_parameter_names())
    assert trainers[0].bank.fingerprint is None
    model = MemTRM.from_pretrained(result.out_dir / "final")
    assert model.memory_layers == (1,) and model.config.start_fingerprint != model.fingerprint
    assert (model.config.recency, float(model.config.gate)) == (0.5, 0.5)
    named = json.loads((result.out_dir / "final" / "config.json").read_text())["start_name_or_path"]
    assert named == "../../backbone", "so that both can move"


def test_a_sidenet_goes_on_from_another_one_over_the_named_revision(
    adapt: Make, trainers: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = adapt("first", optim={"steps": 2}, sidenet={"recency": 1.5})
    train(first, quiet=True)
    load, asked = AutoModelForCausalLM.from_pretrained, []
    spy = lambda name, revision=None, **how: (asked.append(revision), load(name, **how))[1]  # noqa: E731
    monkeypatch.setattr("longmem.modeling.loading.AutoModelForCausalLM.from_pretrained", spy)
    start = {"sidenet": {"start": str(first.out_dir / "final"), "num_retrieved": 16}}
    other = {"revision": "v2", "dtype": "bfloat16"}
    second = adapt("second", optim={"steps": 2, "lr": 1e-12, "weight_decay": 0.0}, backbone=other, **start)
    train(second, quiet=True)
    assert asked == ["v2"] and trainers[1].longmem.backbone.model.dtype == torch.bfloat16
    models = [LongMem.from_pretrained(run.out_dir / "final") for run in (first, second)]
    assert (models[1].config.num_retrieved, models[1].config.recency) == (16, 1.5), "a recipe may change the first"
    assert models[1].config.backbone_name_or_path == models[0].config.backbone_name_or_path
    assert models[1].config.backbone_revision == "v2"
    for one, two in zip(models[0].trainable_parameters(), models[1].trainable_parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-6)


def test_auto_remembers_the_layers_whose_memory_is_worth_most_on_the_text(adapt: Make) -> None:
    recipe = adapt(sidenet={"memory_layers": "auto"}, backbone={"device_map": "auto"}, optim={"steps": 1})
    result = train(recipe, quiet=True)
    found = json.loads((recipe.out_dir / "layers.json").read_text())
    assert [each["layers"] for each in found["single"]] == [[1], [3]], "those that the SideNet copies"
    assert found["alone"]["nats"].keys() == {"facts", "text"} and result.model_dir is not None
    assert LongMem.from_pretrained(result.model_dir).memory_layers == tuple(found["best"] or [3])


@pytest.mark.parametrize("boundary", ["keep", "reset"])
def test_a_row_that_resets_reads_nothing_of_its_last_document(boundary: str, adapt: Make) -> None:
    trainer, found = alone(adapt(sidenet={"boundary": boundary})), []
    for _ in range(40):
        batch = trainer.next_batch()
        with torch.no_grad():
            out, _ = trainer.read(trainer.longmem, batch, trainer.bank)
        found += (trainer.bank.tokens[batch.starts] > 0).tolist()
        trainer.bank.add(out.kv, documents=batch.documents, offsets=batch.offsets)
    assert found[:2] == [False, False] and len(found) > 2
    assert set(found[2:]) == {boundary == "keep"}


def test_the_control_trains_as_long_without_memory(adapt: Make) -> None:
    optim = {"accumulate": 1}
    first, second = (train(adapt(f"{m}", sidenet={"memory": m}, optim=optim), quiet=True) for m in (True, False))
    assert (first.step, first.tokens) == (second.step, second.tokens)
    assert "memory_fill" not in records(second.out_dir, "train")[-1]
    assert "loss_memory_off" not in second.evaluation
    assert not LongMem.from_pretrained(str(second.model_dir)).sidenet.memory_gate.any(), "it takes no part"
    # the first segments find nothing, so both runs begin alike
    assert first.losses[0] == pytest.approx(second.losses[0], abs=1e-3)


@pytest.mark.parametrize("task", ["pretrain", "adapt"])
def test_bf16_gives_nearly_the_losses_of_fp32(task: str, recipes: dict[str, Make]) -> None:
    make, short = recipes[task], {"steps": 3, "dropout": 0.0}
    full, half = (train(make(p, optim={**short, "precision": p}), quiet=True).losses for p in ("fp32", "bf16"))
    assert full != half
    assert half == pytest.approx(full, abs=0.05)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_run_over_a_quantised_backbone_saves_a_sidenet_that_loads(bits: str, adapt: Make, backbone_dir: Path) -> None:
    tiny_gpt(hidden_size=64).save_pretrained(backbone_dir)  # bitsandbytes packs 64 numbers of a row together
    result = train(adapt(backbone={"quantised": bits}, optim={"steps": 6, "dropout": 0.0}), quiet=True)
    assert result.losses[-1] < result.losses[0]
    loaded = LongMem.from_pretrained(str(result.model_dir), device_map={"": "cpu"})
    assert loaded.config.backbone_config.quantization_config is not None


def test_a_time_box_ends_the_run_with_the_rate_at_zero(pretrain: Make) -> None:
    optim = {"steps": None, "max_minutes": 0.03, "warmup": 0.0}
    result = train(pretrain(optim=optim, eval={"every": 0}, checkpoint={"every": 0}), quiet=True)
    rates = [record["lr"] for record in records(result.out_dir, "train")]
    assert result.model_dir is not None and 1.8 <= result.seconds < 10
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.2 * rates[0]


def test_the_repositorys_tiny_recipes_run_on_other_text(tmp_path: Path, text_dir: Path) -> None:
    recipes = Path(__file__).parents[2] / "recipes"
    shared = [f'data.paths=["{text_dir}"]', 'data.held_out=["held.txt"]', "optim.steps=6", "optim.rows=2"]
    train(Recipe.load(recipes / "tiny-cpu.toml", [*shared, f"run.out_dir={tmp_path}/tiny"]), quiet=True)
    where = [f"run.out_dir={tmp_path}/side", f"backbone.path={tmp_path}/tiny/final"]
    train(Recipe.load(recipes / "tiny-cpu-sidenet.toml", [*shared, *where]), quiet=True)
    assert LongMem.from_pretrained(tmp_path / "side" / "final").memory_layers == (1,)


HALF = {"backbone": {"dtype": "float16"}, "optim": {"precision": "bf16"}}


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("pretrain", {"optim": {"lr": 1e30, "clip": 0.0, "warmup": 0.0}}, "the loss is nan at step "),
        ("pretrain", {"data": {"window": 99_999}}, "which is less than two windows of data.window (99999)"),
        ("pretrain", {"model": {"vocab_size": 10}}, "model.vocab_size (10) must be at least the tokenizer's (280)"),
        ("adapt", {"needles": ASK | {"context": 4096}}, "not more than a fact is hidden in (needles.context (4096)"),
        ("adapt", HALF, "'bf16' do not go together on a CPU"),
        ("adapt", {"backbone": {"path": "/nowhere"}}, "/nowhere: no tokenizer"),
        ("adapt", {"data": {"tokenizer": "large"}}, "large: a tokenizer of 268 tokens, the model knows 260: "),
    ],
)
def test_what_a_run_cannot_do_is_said_in_one_line(
    task: str, changes: Any, message: str, recipes: dict[str, Make], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train_tokenizer(["another model's text"] * 9, 268).save_pretrained("large")
    with pytest.raises(LongMemError) as raised:
        train(recipes[task](**changes), quiet=True)
    assert message in str(raised.value) and "\n" not in str(raised.value)
