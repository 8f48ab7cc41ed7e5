"""``method = "memtrm"``: one word in a recipe trains the backbone itself, with its memory, in the same loop."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.test_distributed import losses, trained
from tests.training.test_train_command import write
from transformers import AutoModelForCausalLM, AutoTokenizer

from longmem import AlibiGPTForCausalLM, AttentionKV, LongMem, MemoryBank, MemTRM
from longmem.data.stream import SegmentBatch
from longmem.errors import CheckpointError, ConfigError
from longmem.modeling.backbone import fingerprint_of
from longmem.training.adapt import Adaptation, _build_memtrm
from longmem.training.checkpoint import list_checkpoints
from longmem.training.estimate import estimate
from longmem.training.loop import train
from longmem.training.recipe import Recipe

Make = Callable[..., Recipe]
Records = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def memtrm(adapt: Make) -> Make:
    """An adaptation recipe with the one word changed."""

    def make(name: str = "run", **changes: dict[str, Any]) -> Recipe:
        return adapt(name, **changes).model_copy(update={"method": "memtrm"})

    return make


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[Adaptation]:
    """The tasks that runs make."""
    found: list[Adaptation] = []
    made = Adaptation.__init__

    def remember(self: Adaptation, *arguments: Any, **settings: Any) -> None:
        made(self, *arguments, **settings)
        found.append(self)

    monkeypatch.setattr(Adaptation, "__init__", remember)
    return found


def test_it_learns_and_its_final_folder_loads_by_itself(memtrm: Make, backbone_dir: Path) -> None:
    recipe = memtrm(optim={"steps": 40, "accumulate": 1, "dropout": 0.0, "rows": 4})
    result = train(recipe, quiet=True)
    assert sum(result.losses[-5:]) / 5 < sum(result.losses[:5]) / 5 - 0.1
    assert result.evaluation["loss"] < result.evaluation["loss_backbone"]
    assert result.evaluation["loss_memory_off"] != result.evaluation["loss"]
    assert result.model_dir is not None
    model = MemTRM.from_pretrained(result.model_dir)
    start = AlibiGPTForCausalLM.from_pretrained(backbone_dir)
    assert model.config.start_fingerprint == fingerprint_of(start) != model.fingerprint
    assert (model.memory_layer, model.config.num_retrieved) == (1, 8)
    named = str(model.config.start_name_or_path)
    assert (result.model_dir / named).resolve() == backbone_dir.resolve(), "so that both can move"
    assert len(AutoTokenizer.from_pretrained(result.model_dir)) == 260
    assert isinstance(AutoModelForCausalLM.from_pretrained(result.model_dir / "backbone"), AlibiGPTForCausalLM)
    assert not any((model.memory_share - 0.5).abs() < 1e-4), "every gate has learned"


def test_every_weight_is_trained_and_the_backbone_on_disk_is_not(
    memtrm: Make, backbone_dir: Path, tasks: list[Adaptation]
) -> None:
    files = {file.name: file.read_bytes() for file in backbone_dir.iterdir()}
    train(memtrm(), quiet=True)
    model = tasks[0].longmem
    before = load_file(backbone_dir / "model.safetensors")
    after = {name.removeprefix("backbone.model."): weight for name, weight in model.named_parameters()}
    assert set(after) - set(before) == {"memory_gate"}
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert not unchanged
    assert {file.name: file.read_bytes() for file in backbone_dir.iterdir()} == files


def test_the_loss_of_the_backbone_is_taken_before_it_is_trained(memtrm: Make, adapt: Make, records: Records) -> None:
    """It is that of the frozen backbone beside it, at every evaluation."""
    coupled, frozen = memtrm("coupled"), adapt("frozen")
    train(coupled, quiet=True)
    train(frozen, quiet=True)
    found = [[r["loss_backbone"] for r in records(recipe.out_dir, "eval")] for recipe in (coupled, frozen)]
    assert len(found[0]) == 2
    assert found[0] == pytest.approx(found[1], abs=1e-6)


@pytest.mark.parametrize(("method", "stale"), [("longmem", False), ("memtrm", True)])
def test_what_lies_in_its_memory_is_older_than_its_weights(
    method: str, stale: bool, adapt: Make, tasks: list[Adaptation], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[AttentionKV, SegmentBatch]] = []

    def remember(bank: MemoryBank, kv: AttentionKV, batch: SegmentBatch) -> None:
        written.append((kv, batch))
        bank.add(kv, documents=batch.documents, offsets=batch.offsets)

    monkeypatch.setattr("longmem.training.adapt.remember", remember)
    recipe = adapt(optim={"accumulate": 1, "dropout": 0.0}, eval={"every": 0}).model_copy(update={"method": method})
    train(recipe, quiet=True)
    task, (kv, batch) = tasks[0], written[2]
    assert task.bank is not None
    assert (task.bank.fingerprint is None) == stale
    now = task.longmem.encode(batch.ids, batch.mask)
    assert torch.equal(kv.keys, now.keys) != stale
    if stale:
        # not another model's, either: a few steps old
        assert torch.nn.functional.cosine_similarity(kv.keys, now.keys, dim=-1).mean() > 0.5


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_a_resumed_run_is_the_one_that_was_never_interrupted(optimiser: str, memtrm: Make, records: Records) -> None:
    whole, cut = (memtrm(name, optim={"steps": 12, "optimiser": optimiser}) for name in ("whole", "cut"))
    train(whole, quiet=True)
    train(cut, quiet=True)
    shutil.rmtree(cut.out_dir / "final")
    for path in list_checkpoints(cut.out_dir / "checkpoints"):
        if int(path.name.removeprefix("step-")) > 4:
            shutil.rmtree(path)
    torch.manual_seed(12345)
    assert len(train(cut, resume=True, quiet=True).losses) == 8
    for kind in ("train", "eval"):
        mine, theirs = (
            [
                {k: v for k, v in r.items() if not k.startswith(("seconds", "tokens_per"))}
                for r in records(run.out_dir, kind)
            ]
            for run in (cut, whole)
        )
        assert mine == theirs
    models = [load_file(run.out_dir / "final" / "backbone" / "model.safetensors") for run in (whole, cut)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_several_segments_in_one_step_train_what_as_many_passes_do(memtrm: Make) -> None:
    one = memtrm("one", optim={"accumulate": 3, "segments": 1, "dropout": 0.0, "steps": 4})
    three = memtrm("three", optim={"accumulate": 1, "segments": 3, "dropout": 0.0, "steps": 4})
    first, second = (train(recipe, quiet=True) for recipe in (one, three))
    assert first.losses == pytest.approx(second.losses, abs=2e-4)


def test_the_control_trains_the_same_backbone_without_memory(memtrm: Make, records: Records) -> None:
    recipe = memtrm(sidenet={"memory": False}, optim={"accumulate": 1})
    result = train(recipe, quiet=True)
    assert "memory_fill" not in records(recipe.out_dir, "train")[-1]
    assert result.model_dir is not None
    torch.testing.assert_close(MemTRM.from_pretrained(result.model_dir).memory_share, torch.full((4,), 0.5))


def test_gates_begin_where_the_recipe_says(adapt: Make, memtrm: Make, tasks: list[Adaptation]) -> None:
    for make in (adapt, memtrm):
        train(make(make.__qualname__.split(".")[0], sidenet={"gate": 0.1}, optim={"steps": 1, "lr": 1e-9}), quiet=True)
        torch.testing.assert_close(tasks[-1].longmem.memory_share, torch.full((4,), 0.1), atol=1e-5, rtol=0)
    assert [type(task.longmem) for task in tasks] == [LongMem, MemTRM]


def test_the_word_can_be_set_on_the_command_line_and_is_checked(adapt: Make, pretrain: Make, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('task = "adapt"\n[data]\npaths = ["x"]\n[backbone]\npath = "y"\n[optim]\nsteps = 1\n')
    assert Recipe.load(path).method == "longmem"
    assert Recipe.load(path, ["method=memtrm"]).method == "memtrm"
    with pytest.raises(ConfigError, match=r"method \('memtrn'\) should be 'longmem' or 'memtrm'"):
        Recipe.load(path, ["method=memtrn"])
    with pytest.raises(ConfigError, match=r"sidenet\.gate \(1\) should be less than 1"):
        Recipe.load(path, ["sidenet.gate=1"])
    settings = pretrain().model_dump(mode="json") | {"method": "memtrm"}
    with pytest.raises(ConfigError, match=r"method \('memtrm'\) is for task = 'adapt'; pre-training has no memory"):
        Recipe.parse(settings)


def test_a_run_is_not_resumed_with_the_other_method(adapt: Make, memtrm: Make) -> None:
    train(adapt(), quiet=True)
    with pytest.raises(CheckpointError, match="method was 'longmem', is 'memtrm'"):
        train(memtrm(), resume=True, quiet=True)


def test_recomputing_is_refused_where_the_backbone_cannot(memtrm: Make) -> None:
    with pytest.raises(ConfigError, match="AlibiGPTForCausalLM cannot recompute layer by layer"):
        train(memtrm(optim={"gradient_checkpointing": True}), quiet=True)


def test_the_calculator_counts_all_weights_one_search_and_one_bank(memtrm: Make, adapt: Make) -> None:
    recipe = memtrm(optim={"steps": 1})
    model = _build_memtrm(recipe)
    found, frozen = (estimate(each, "a100-80gb") for each in (recipe, adapt(optim={"steps": 1})))
    assert found.trained == sum(p.numel() for p in model.parameters()) == found.parameters + 4
    assert found.bytes["optimiser"] == 8 * found.trained
    assert "backbone" not in found.bytes and "SideNet" not in found.flops
    for part in ("bank", "search scratch", "logits"):
        assert found.bytes[part] == frozen.bytes[part]
    layer = sum(p.numel() for p in model.backbone.family.layers[0].parameters())
    local, search, read = 4 * 16 * 32, 2 * 32 * 64 // 4, 4 * 8 * 32
    assert found.flops == {
        "layers": 3.0 * 4 * (2 * layer + local),
        "head": 3.0 * 2 * (260 * 32 + 260),
        "probe": 3.0 * 2 * 4 * 32 * 32,
        "search": search,
        "memory attention": 3.0 * read,
    }
    again = memtrm(optim={"steps": 1, "gradient_checkpointing": True})
    # every layer once more, but not the one that reads memory
    assert estimate(again, "a100-80gb").flops["layers"] - found.flops["layers"] == 3 * (2 * layer + local)
    assert estimate(again, "a100-80gb").reads == found.reads


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_what_one_trains(parallel: str, memtrm: Make, tmp_path: Path, records: Records) -> None:
    changes = {"steps": 4, "dropout": 0.0, "parallel": parallel}
    one, two = (memtrm(f"with-{rows}", optim={**changes, "rows": rows}) for rows in (4, 2))
    train(one, quiet=True)
    trained(write(two, tmp_path / "two.toml"), "--quiet")
    for kind in ("train", "eval"):
        assert losses(records, two, kind) == pytest.approx(losses(records, one, kind), abs=1e-4)
    backbones = [record["loss_backbone"] for run in (one, two) for record in records(run.out_dir, "eval")]
    assert backbones == pytest.approx([backbones[0]] * len(backbones), abs=1e-5)
    mine, theirs = (MemTRM.from_pretrained(run.out_dir / "final") for run in (two, one))
    assert mine.config.start_fingerprint == theirs.config.start_fingerprint
    weights = dict(theirs.named_parameters())
    # Adam's steps are of size 1e-2 whatever the gradient: where that is rounding alone, its sign is
    assert all(((mine - weights[name]).abs() < 1e-3).float().mean() > 0.98 for name, mine in mine.named_parameters())
