"""MemTRM and training-free memory attention, compared with LongMem on the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from longmem import AlibiGPTConfig, AlibiGPTForCausalLM, CheckpointError, LongMem, MemoryBank, MemTRM, TrainingFree
from longmem.cli.main import main
from longmem.data.text import Document
from longmem.data.tokenizer import train_tokenizer
from longmem.evaluation.bootstrap import Bootstrap
from longmem.evaluation.documents import TokenizedDocument, tokenize_documents
from longmem.evaluation.perplexity import PerplexitySettings, perplexity
from longmem.evaluation.plots import plot_all
from longmem.evaluation.systems import Comparison, sized

TEXT = "Words of a small text, and more words of it; then the same words again. "
TOKENIZER = train_tokenizer([TEXT], 290)
SETTINGS = PerplexitySettings(window=16, rows=2, block=32, bootstrap=Bootstrap(resamples=50))
SHAPE: dict[str, Any] = {"chunk_size": 2, "num_retrieved": 8, "memory_size": 64}


def backbone(seed: int = 0) -> AlibiGPTForCausalLM:
    torch.manual_seed(seed)
    config = AlibiGPTConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=16,
        initializer_range=0.3,
    )
    return AlibiGPTForCausalLM(config).eval()


def disturbed(model: Any, seed: int = 1) -> Any:
    """Stands for a trained model."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.train().trainable_parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def longmem() -> LongMem:
    made: LongMem = disturbed(LongMem.from_backbone(backbone(), **SHAPE))
    return made


def memtrm(seed: int = 0) -> MemTRM:
    made: MemTRM = disturbed(MemTRM.from_backbone(backbone(seed), **SHAPE), seed=2)
    return made


def documents(*repeats: int) -> list[TokenizedDocument]:
    texts = [Document(f"{i}.txt", f"{i} " + TEXT * n, "") for i, n in enumerate(repeats)]
    return tokenize_documents(texts, TOKENIZER)


def nll_of(found: Any, system: str, protocol: str) -> list[float]:
    return [document.nll[protocol][system] for document in found.documents]


def compared(sizes: tuple[int, ...] = (8, 64)) -> tuple[Comparison, dict[str, nn.Module]]:
    side, trained = longmem(), memtrm()
    free = TrainingFree.from_backbone(side.backbone.model, gate=0.3, **SHAPE)
    comparison = Comparison.of_longmem(side, sizes).with_memtrm(trained, sizes).with_training_free(free, sizes)
    return comparison, {"memtrm": trained, "training_free_0.3": free, "memory": side}


@torch.no_grad()
def test_every_system_scores_as_its_model_alone() -> None:
    comparison, models = compared()
    (document,) = documents(3)
    found = perplexity(comparison, [document], SETTINGS)
    assert list(found.systems) == [
        "backbone", "memory_off", "memory_8", "memory_64", "memtrm_off", "memtrm_8", "memtrm_64",
        "training_free_0.3_8", "training_free_0.3_64",
    ]  # fmt: skip
    ids = document.ids
    for protocol, stride in (("segments", 16), ("sliding", 8)):
        for name in [name for name in found.systems if name not in ("backbone", "memory_off")]:
            kind, size = sized(name) or ("memtrm", None)
            model: Any = models[kind]
            bank = None if size is None else MemoryBank.for_model(model, rows=1, capacity_tokens=size)
            expected, held, start, scored = 0.0, list[Tensor](), 0, 0
            while scored < len(ids) - 1:
                end = min(start + 16, len(ids) - 1)
                out = model(ids[None, start:end], memory=bank)
                each = out.logits[0, scored - start :].log_softmax(-1).gather(1, ids[scored + 1 : end + 1, None])
                expected -= each.sum().item()
                held.append(torch.stack([out.kv.keys, out.kv.values])[:, :, :, scored - start :])
                start, scored = start + stride, end
                if bank is not None:
                    bank.reset()
                    bank.add(type(out.kv)(*torch.cat(held, dim=3)[:, :, :, :start]))
            assert nll_of(found, name, protocol) == pytest.approx([expected], rel=1e-5), (protocol, name)


def test_rows_of_a_batch_score_as_alone_and_records_go_on(tmp_path: Path) -> None:
    several = documents(4, 1, 2)
    comparison = compared((16,))[0]
    together = perplexity(comparison, several, SETTINGS, records=tmp_path / "records.jsonl")
    for i, document in enumerate(several):
        alone = perplexity(comparison, [document], SETTINGS)
        for system in together.systems:
            for protocol in together.protocols:
                np.testing.assert_allclose(
                    nll_of(together, system, protocol)[i], nll_of(alone, system, protocol)[0], rtol=1e-5
                )
    written = (tmp_path / "records.jsonl").read_text()
    again = perplexity(comparison, several, SETTINGS, records=tmp_path / "records.jsonl")
    assert (tmp_path / "records.jsonl").read_text() == written, "nothing is measured twice"
    assert nll_of(again, "memtrm_16", "sliding") == nll_of(together, "memtrm_16", "sliding")
    other = Comparison.of_longmem(longmem(), [16]).with_memtrm(disturbed(memtrm(), seed=9), [16])
    perplexity(other, several, SETTINGS, records=tmp_path / "records.jsonl")
    new = (tmp_path / "records.jsonl").read_text().removeprefix(written).split()
    assert len([line for line in new if "memtrm" in line]) == 2 * 2 * 3, "other weights are another system"


def test_a_shut_gate_is_the_backbone() -> None:
    several = documents(4, 2)
    comparison = Comparison.of_backbone(backbone())
    free = TrainingFree.from_backbone(comparison.model, gate=0, **SHAPE)
    found = perplexity(comparison.with_training_free(free, [64]), several, SETTINGS)
    for protocol in found.protocols:
        np.testing.assert_allclose(
            nll_of(found, "training_free_0_64", protocol), nll_of(found, "backbone", protocol), rtol=1e-6
        )


def test_differences_are_against_backbone_the_same_without_memory_and_the_others_of_the_same_size() -> None:
    assert compared()[0].pairs[8:] == [
        ("memory_8", "memory_off"),
        ("memory_64", "memory_off"),
        ("memtrm_8", "memtrm_off"),
        ("memtrm_64", "memtrm_off"),
        ("memory_8", "memtrm_8"),
        ("memory_64", "memtrm_64"),
        ("memory_8", "training_free_0.3_8"),
        ("memory_64", "training_free_0.3_64"),
    ]


def test_curves_show_every_kind_of_memory(tmp_path: Path) -> None:
    found = perplexity(compared()[0], documents(3, 2), SETTINGS)
    files = plot_all(found, tmp_path)
    assert [file.name for file in files] == ["perplexity-by-position.png", "perplexity-by-memory-size.png"]


def test_models_of_another_backbone_are_refused_by_name() -> None:
    comparison = Comparison.of_longmem(longmem(), [64])
    with pytest.raises(CheckpointError, match=r"trained from backbone \w+ \(\w*\), the others stand on \w+; compare"):
        comparison.with_memtrm(memtrm(seed=7), [64])
    with pytest.raises(CheckpointError, match=r"backbone is \w+, the others stand on \w+; compare models of one"):
        comparison.with_training_free(TrainingFree.from_backbone(backbone(7), **SHAPE), [64])


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, a SideNet and a MemTRM trained from it, a MemTRM of another one, settings, and two documents."""
    home = tmp_path_factory.mktemp("home")
    for seed, name in enumerate(("backbone", "other-backbone")):
        backbone(seed).save_pretrained(home / name)
        TOKENIZER.save_pretrained(home / name)
    disturbed(LongMem.from_backbone(home / "backbone", **SHAPE)).save_pretrained(home / "side" / "final")
    for start, name in (("backbone", "memtrm"), ("other-backbone", "foreign")):
        disturbed(MemTRM.from_backbone(home / start, **SHAPE)).save_pretrained(home / name / "final")
    TrainingFree.from_backbone(home / "backbone", gate=[0.1, 0.2, 0.3, 0.4], **SHAPE).save_pretrained(home / "free")
    (home / "texts").mkdir()
    for i in range(2):
        (home / "texts" / f"{i}.txt").write_text(TEXT * (i + 2))
    return home


def status(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main(["eval", "perplexity", *map(str, arguments)])
    return int(done.value.code or 0)


def test_the_command_compares_them_side_by_side(home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    common = ["--data", home / "texts", "--batch", 2, "--resamples", 20, "--memory-sizes", "8,64", "--out", tmp_path]
    given = [
        "--memtrm", home / "memtrm", "--training-free", "0.1", "--training-free", home / "free"
    ]  # fmt: skip
    assert status("--model", home / "side", *common, *given) == 0
    shown = capsys.readouterr().out
    for words in ("MemTRM, memory off", "MemTRM, 64 tokens", "training-free 0.1, 8 tokens", "training-free 0.25, 64"):
        assert words in shown
    result = json.loads((tmp_path / "perplexity.json").read_text())
    assert {"memtrm_64", "memtrm_off", "training_free_0.1_8", "training_free_0.25_64"} <= set(result["systems"])
    assert result["header"]["config"]["training_free"] == ["0.1", str(home / "free")]
    heads = result["header"]["models"]
    assert heads["training_free_0.1_8"]["backbone"] == heads["backbone"]["backbone"] != heads["memtrm_8"]["backbone"]
    assert heads["training_free_0.1_8"]["memory_layers"] == heads["memory_8"]["memory_layers"]


@pytest.mark.parametrize(
    ("model", "options", "systems"),
    [
        ("memtrm", [], ["backbone", "memtrm_off", "memtrm_64"]),
        ("memtrm", ["--training-free", "0.5"], ["backbone", "memtrm_off", "memtrm_64", "training_free_0.5_64"]),
        ("free", ["--memory-sizes", "8"], ["backbone", "training_free_0.25_8"]),
        ("backbone", ["--training-free", "0.5", "--memory-sizes", "8"], ["backbone", "training_free_0.5_8"]),
    ],
)
def test_a_baseline_is_measured_without_a_longmem_too(
    model: str, options: list[str], systems: list[str], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", home / "texts" / "0.txt", "--protocol", "sliding", "--resamples", 20, "--json"]
    assert status("--model", home / model, *data, *options) == 0, capsys.readouterr().err
    assert list(json.loads(capsys.readouterr().out)["systems"]) == systems


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ("side", ["--memtrm", "foreign"], "this MemTRM was trained from backbone"),
        ("side", ["--memtrm", "side"], "not a MemTRM checkpoint; --memtrm takes one trained with method = 'memtrm'"),
        ("side", ["--training-free", "1.5"], "gate (1.5) must be between 0 (memory unread) and 1"),
        ("side", ["--training-free", "backbone"], "no training-free settings; --training-free takes a share"),
        ("side", ["--training-free", "0.1", "--training-free", "0.10"], "training-free 0.1 is compared twice"),
        ("memtrm", ["--control", "side"], "--control needs a LongMem checkpoint"),
        ("memtrm", ["--backbone", "other-backbone"], "this MemTRM was trained from backbone"),
        ("memtrm", ["--memory-sizes", "7"], "memory size (7) must be a multiple of chunk_size (2); try 8"),
        ("backbone", ["--memory-sizes", "8"], "--memory-sizes needs a LongMem checkpoint"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(
    model: str, options: list[str], says: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [home / option if (home / option).exists() else option for option in options]
    assert status("--model", home / model, "--data", home / "texts", *named) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert says in line
