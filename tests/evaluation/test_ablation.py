"""One setting changed at a time: as models made with that setting, paired by document, resumed, saved and drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from longmem import AlibiGPTConfig, AlibiGPTForCausalLM, CheckpointError, ConfigError, LongMem
from longmem.cli.main import main
from longmem.data.text import Document
from longmem.data.tokenizer import train_tokenizer
from longmem.evaluation.ablation import AblationResult, Choices, Trained, ablate
from longmem.evaluation.ablation_training import plan_runs
from longmem.evaluation.bootstrap import Bootstrap
from longmem.evaluation.documents import TokenizedDocument, tokenize_documents
from longmem.evaluation.perplexity import PerplexitySettings, perplexity
from longmem.evaluation.systems import Comparison
from longmem.evaluation.variants import Int8Bank, varied
from longmem.memory import MemoryBank
from longmem.store.precision import pack, unpack
from longmem.types import AttentionKV

TEXT = "Words of a small text, and more words of it; then the same words again. "
TOKENIZER = train_tokenizer([TEXT], 290)
SETTINGS = PerplexitySettings(window=16, protocols=("sliding",), rows=2, block=32, bootstrap=Bootstrap(resamples=50))
SHAPE: dict[str, Any] = {"chunk_size": 4, "num_retrieved": 8, "memory_size": 64}


def backbone(seed: int = 0) -> AlibiGPTForCausalLM:
    torch.manual_seed(seed)
    config = AlibiGPTConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=16, initializer_range=0.3,
    )  # fmt: skip
    return AlibiGPTForCausalLM(config).eval()


def longmem(seed: int = 0, **settings: Any) -> LongMem:
    """Disturbed, so that it stands for a trained model; the same weights under other settings."""
    model = LongMem.from_backbone(backbone(seed), **{**SHAPE, **settings})
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def documents(*repeats: int) -> list[TokenizedDocument]:
    return tokenize_documents([Document(f"{i}.txt", f"{i} " + TEXT * n, "") for i, n in enumerate(repeats)], TOKENIZER)


def score(result: AblationResult, axis: str, value: str) -> float:
    (found,) = [v for a in result.axes if a.name == axis for v in a.values if v.value == value]
    return found.scores["sliding"].perplexity


def alone(model: LongMem, some: list[TokenizedDocument], size: int = 64) -> float:
    """Perplexity of the model with its own settings."""
    found = perplexity(Comparison.of_longmem(model, [size]), some, SETTINGS)
    return found.protocols["sliding"].all.system(f"memory_{size}").perplexity


def test_each_value_scores_as_a_model_made_with_it() -> None:
    some, model = documents(4, 2), longmem()
    choices = Choices(
        chunk_size=(2,), num_retrieved=(4,), memory_size=(16,), memory_dtype=("float32",), gate_share=(0.0, 0.3)
    )
    axes = ("chunk_size", "num_retrieved", "memory_size", "memory_dtype", "gate_share")
    result = ablate(model, some, SETTINGS, choices, axes=axes)
    default = alone(model, some)
    assert score(result, "chunk_size", "4") == score(result, "memory_dtype", "float32") == pytest.approx(default)
    assert score(result, "gate_share", "as trained") == pytest.approx(default)
    assert score(result, "chunk_size", "2") == pytest.approx(alone(longmem(chunk_size=2), some))
    assert score(result, "num_retrieved", "4") == pytest.approx(alone(longmem(num_retrieved=4), some))
    assert score(result, "memory_size", "16") == pytest.approx(alone(model, some, 16))
    forced = longmem()
    with torch.no_grad():
        forced.sidenet.memory_gate.fill_(torch.logit(torch.tensor(0.3)))
    assert score(result, "gate_share", "0.3") == pytest.approx(alone(forced, some))
    assert score(result, "gate_share", "0") == pytest.approx(result.without["memory_off"]["sliding"].perplexity)
    marked = [value for axis in result.axes for value in axis.values if value.default]
    assert len(marked) == len(axes)
    assert all(value.scores["sliding"].percent == 0 for value in marked)
    (small,) = [v for a in result.axes if a.name == "memory_size" for v in a.values if v.value == "16"]
    assert small.scores["sliding"].percent == pytest.approx(100 * (alone(model, some, 16) / default - 1))
    assert small.scores["sliding"].documents is not None


def test_a_variant_leaves_its_model_as_it_is() -> None:
    model = longmem()
    gate, config = model.sidenet.memory_gate.clone(), model.config.to_dict()
    other = varied(model, gate_share=1.0, chunk_size=2)
    assert other.memory_share.tolist() == [1.0] * 4
    assert (other.config.chunk_size, model.config.chunk_size) == (2, 4)
    assert torch.equal(model.sidenet.memory_gate, gate) and model.config.to_dict() == config
    assert other.sidenet.layers is model.sidenet.layers


def test_an_int8_bank_holds_what_an_int8_store_gives_back() -> None:
    torch.manual_seed(0)
    kv = AttentionKV(torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8))
    exact, rounded = (kind(1, 12, 2, 8, 4) for kind in (MemoryBank, Int8Bank))
    for bank in (exact, rounded):
        bank.add(kv)
    chunks = exact._slots.storage[0, :3]
    stored = pack(chunks, torch.full((3,), 4), "int8")
    assert torch.equal(rounded._slots.storage[0, :3], unpack(stored.kv, stored.scales, "int8", torch.float32))
    assert torch.equal(rounded._slots.keys, exact._slots.keys)
    assert not torch.equal(rounded._slots.storage, exact._slots.storage)


def test_shared_rows_find_their_neighbours_and_a_single_document_does_not_notice() -> None:
    model, choices = longmem(), Choices(rows=("separate", "shared"))
    lonely = ablate(model, documents(4), SETTINGS, choices, axes=["rows"])
    assert score(lonely, "rows", "shared") == pytest.approx(score(lonely, "rows", "separate"))
    several = ablate(model, documents(4, 3, 2), SETTINGS, choices, axes=["rows"])
    assert score(several, "rows", "shared") != pytest.approx(score(several, "rows", "separate"), rel=1e-6)


def test_an_interrupted_ablation_goes_on_and_shared_rows_are_measured_together(tmp_path: Path) -> None:
    model, some, records = longmem(), documents(4, 3, 2), tmp_path / "records.jsonl"
    choices, axes = Choices(rows=("shared",), memory_size=(16,)), ("rows", "memory_size")
    first = ablate(model, some, SETTINGS, choices, axes=axes, records=records)
    said: list[Any] = []
    again = ablate(model, some, SETTINGS, choices, axes=axes, records=records, progress=lambda *at: said.append(at))
    assert not said and again.axes == first.axes
    lines = [line for line in records.read_text().splitlines() if line]
    lost = next(line for line in lines if json.loads(line)["system"] == "rows=shared")
    records.write_text("\n".join(line for line in lines if line != lost))
    third = ablate(model, some, SETTINGS, choices, axes=axes, records=records, progress=lambda *at: said.append(at))
    assert said[-1][2] == sum(document.scored for document in some), "all documents, and nothing but the shared rows"
    assert third.axes == first.axes


def test_trained_sidenets_are_compared_with_their_baseline_and_told_apart() -> None:
    model, some = longmem(), documents(3, 2)
    other = LongMem.from_backbone(model.backbone.model, **SHAPE, memory_layer=1).eval()
    trained = [
        Trained("memory_layer", "3", model, baseline=True),
        Trained("memory_layer", "1", other),
        Trained("mine", "x", other),
    ]
    result = ablate(model, some, SETTINGS, Choices(), axes=[], trained=trained)
    layer, mine = result.axes
    assert [(v.value, v.default, v.differs) for v in layer.values] == [
        ("3", True, ""), ("1", False, "memory_layer 1 (default 3)"),
    ]  # fmt: skip
    assert layer.trained and [v.value for v in mine.values] == ["default", "x"]
    assert score(result, "memory_layer", "1") == pytest.approx(alone(other, some))
    with pytest.raises(CheckpointError, match=r"x: its backbone is \w+, the default's \w+; compare SideNets of one"):
        ablate(model, some, SETTINGS, Choices(), axes=[], trained=[Trained("mine", "x", longmem(seed=7))])


def test_two_systems_of_one_name_are_refused() -> None:
    model, some = longmem(), documents(2)
    same = [Trained("mine", "x", model), Trained("mine", "x", longmem(memory_layer=1))]
    with pytest.raises(ConfigError, match="mine=x comes twice; name each value once, and each --also by another label"):
        ablate(model, some, SETTINGS, Choices(), axes=[], trained=same)
    trained = [Trained("chunk_size", "2", model)]
    with pytest.raises(ConfigError, match="chunk_size=2 comes twice"):
        ablate(model, some, SETTINGS, Choices(chunk_size=(2,)), axes=["chunk_size"], trained=trained)


def test_values_that_break_a_rule_are_all_named() -> None:
    wrong = Choices(chunk_size=(3,), num_retrieved=(6,), memory_size=(30,), memory_dtype=("int4",), gate_share=(2.0,))
    with pytest.raises(ConfigError) as error:
        ablate(longmem(), documents(2), SETTINGS, wrong)
    assert len(error.value.problems) == 5
    with pytest.raises(ConfigError, match="gate share cannot be forced with fusion = 'softmax'"):
        ablate(longmem(fusion="softmax"), documents(2), SETTINGS, Choices(gate_share=(0.5,)))
    with pytest.raises(ConfigError, match=r"axis \(depth\) must be among chunk_size"):
        ablate(longmem(), documents(2), SETTINGS, Choices(), axes=["depth"])


RECIPE = """
task = "adapt"
[run]
name = "small"
[backbone]
path = "{backbone}"
[data]
paths = ["{text}"]
window = 16
[sidenet]
chunk_size = 4
num_retrieved = 8
memory_size = 64
[optim]
steps = 900
rows = 2
precision = "fp32"
[eval]
every = 0
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, a SideNet over it, texts, and a recipe."""
    home = tmp_path_factory.mktemp("home")
    backbone().save_pretrained(home / "backbone")
    TOKENIZER.save_pretrained(home / "backbone")
    LongMem.from_backbone(home / "backbone", **SHAPE).save_pretrained(home / "side" / "final")
    (home / "texts").mkdir()
    for i in range(2):
        (home / "texts" / f"{i}.txt").write_text(TEXT * (i + 3))
    (home / "recipe.toml").write_text(RECIPE.format(backbone=home / "backbone", text=home / "texts"))
    return home


def test_runs_of_a_recipe_differ_in_one_setting_and_share_the_budget(home: Path, tmp_path: Path) -> None:
    runs = plan_runs(home / "recipe.toml", 64, {"memory_layer": [1, 3], "init": ["copy", "zero"]}, tmp_path)
    assert [(run.axis, run.label) for run in runs] == [
        ("", ""),
        ("memory_layer", "1"),
        ("memory_layer", "3"),
        ("init", "zero"),
    ]
    assert {(run.recipe.optim.tokens, run.recipe.optim.steps) for run in runs} == {(64, None)}
    assert len({run.recipe.out_dir for run in runs}) == 4
    (home / "other.toml").write_text('task = "pretrain"\n')
    with pytest.raises(ConfigError, match="trains no SideNet; ablations need a recipe with task = 'adapt'"):
        plan_runs(home / "other.toml", 64, {}, tmp_path)
    (home / "odd.toml").write_text('optim = 3\ntask = "adapt"\n')
    with pytest.raises(ConfigError, match="optim"):
        plan_runs(home / "odd.toml", 64, {}, tmp_path)


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main(["eval", "ablate", *map(str, arguments)])
    return int(done.value.code or 0)


def test_the_command_measures_trains_draws_and_says_what_is_wrong(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    some = ["--data", home / "texts", "--protocol", "sliding", "--resamples", 20, "--out", out]
    status = call(
        *some, "--model", home / "side", "--of", "chunk_size", "--chunk-sizes", "2", "--also", f"mine={home / 'side'}",
        "--recipe", home / "recipe.toml", "--train-tokens", 64, "--train-inits", "copy,zero",
    )  # fmt: skip
    captured = capsys.readouterr()
    assert status == 0, captured.err
    assert "chunk size (tokens)" in captured.out and "trained for each value" in captured.out
    result = json.loads((out / "ablate.json").read_text())
    assert [axis["name"] for axis in result["axes"]] == ["chunk_size", "other SideNets", "init"]
    assert result["header"]["task"] == "ablate" and result["header"]["config"]["train_tokens"] == [64]
    assert {path.name for path in out.glob("*.png")} >= {"ablate-chunk_size.png", "ablate-chunk_size-dark.png"}
    for wrong, line in (
        (["--recipe", home / "recipe.toml"], "error: --recipe needs --train-tokens"),
        (["--model", home / "side", "--train-inits", "zero"], "error: --train-tokens, --train-layers"),
        (["--model", home / "backbone"], "no LongMem checkpoint; ablations change the settings of one"),
        (["--model", home / "side", "--also", "nothing"], "error: --also (nothing) must be LABEL=FOLDER"),
        ([], "error: name a LongMem with --model"),
    ):
        assert call("--data", home / "texts", *wrong) == 1
        assert line in capsys.readouterr().err
