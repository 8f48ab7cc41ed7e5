"""Which layers are worth remembering, whether a backbone copies, and ``longmem layers`` from a folder to JSON."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.family_table import FAMILIES, V, make_backbone
from transformers import PreTrainedTokenizerFast

from longmem import AlibiGPTForCausalLM, TrainingFree
from longmem.cli.main import main
from longmem.data.tokens import train_tokenizer
from longmem.errors import ConfigError, DataError
from longmem.evaluation.layers import best_layers, conclusion, copying, layers_report, measure_layers, text_rows

SMALL: dict[str, Any] = {"num_retrieved": 8, "chunk_size": 2, "quiet": True}


@pytest.fixture
def folder(tiny_backbone: AlibiGPTForCausalLM, tmp_path: Path) -> Path:
    tiny_backbone.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["layers", *map(str, arguments)])
    return int(stopped.value.code or 0)


def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, V, (20,), generator=generator).repeat(3) for _ in range(2)]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_measured_at_every_layer_that_can_be_remembered(name: str) -> None:
    model = make_backbone(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = layers_report(model, texts()[0][None], num_retrieved=16)
    layers = report["memory_layers"]
    assert report["allowed"] == layers == [layer for each in report["effect"]["single"] for layer in each["layers"]]
    assert [copied["source"] for copied in report["copying"]] == ["text", "random"]
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_the_best_set_grows_by_the_layer_that_adds_most() -> None:
    model = make_backbone("llama")
    found = measure_layers(model, texts(), **SMALL)
    worths = [each["worth"] for each in found["sets"]]
    assert found["sets"][0] == max(found["single"], key=lambda effect: effect["worth"])
    assert worths == sorted(worths) and found["best"] == (found["sets"][-1]["layers"] if worths[-1] > 0 else None)
    sizes = [set(each["layers"]) for each in found["sets"]]
    assert all(one < more for one, more in pairwise(sizes))
    copied = measure_layers(model, texts(), stride=2, **SMALL)
    assert [each["layers"] for each in copied["single"]] == [(1,), (3,)]
    assert copied["single"][0]["nats"] == pytest.approx(found["single"][1]["nats"], abs=1e-6), "alone as among others"


def test_from_backbone_takes_the_best_layers_and_measures_them_once(tmp_path: Path) -> None:
    model, kept = make_backbone("llama"), tmp_path / "layers.json"
    best = measure_layers(model, texts(), **SMALL)["best"]
    for _ in range(2):
        made = TrainingFree.from_backbone(model, memory_layers=best_layers(texts(), None, kept=kept, **SMALL))
        assert made.memory_layers == (best or (2,))
    kept.write_text('{"best": [0, 1]}')
    assert best_layers([], None, kept=kept)(model) == (0, 1)


def test_facts_are_measured_where_there_is_a_tokenizer() -> None:
    model = make_backbone("llama")
    model.resize_token_embeddings(300)
    tokenizer = train_tokenizer(["My dog is called Comet."] * 20, 280)
    found = measure_layers(model, (), tokenizer, quiet=True)
    assert found["alone"]["nats"].keys() == {"facts"} and found["single"][0]["nats"] != found["alone"]["nats"]
    with pytest.raises(ConfigError, match="nothing to measure with"):
        measure_layers(model)


def test_copying_is_the_loss_of_each_pass_over_the_same_tokens(tiny_backbone: AlibiGPTForCausalLM) -> None:
    ids = texts()[0][None, :16]  # half of the window
    with torch.no_grad():
        logits = tiny_backbone(ids.repeat(1, 2)).logits[0].log_softmax(-1)
    expected = [-logits[start : start + 15].gather(1, ids[0, 1:, None]).mean().item() for start in (0, 16)]
    text, drawn = copying(tiny_backbone, ids)
    assert [text["first_loss"], text["second_loss"]] == pytest.approx(expected, rel=1e-4)
    assert text["distance"] == drawn["distance"] == 16 and drawn["first_loss"] != text["first_loss"]


def test_the_command_prints_tables_and_writes_json(
    folder: Path, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    byte_tokenizer.save_pretrained(folder)
    small = ("--rows", 2, "--stride", 2)
    assert run(folder, *small, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "none, all in the window" in printed and "second time" in printed
    written = json.loads((tmp_path / "out" / "layers.json").read_text())
    assert conclusion(written) in printed
    assert (written["num_layers"], written["allowed"], written["default"]) == (4, [1, 3], 3)
    assert written["effect"]["alone"]["nats"].keys() == {"text", "facts"}
    assert written["header"]["config"]["num_retrieved"] == 64


def test_what_cannot_be_measured_is_told_in_one_line(
    tiny_backbone: AlibiGPTForCausalLM, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match=r"--data has 5 tokens, 128 are needed; give more text"):
        text_rows(["short"], byte_tokenizer, 2, 128)
    with pytest.raises(ConfigError, match=r"num_retrieved \(50\) must be a multiple of chunk_size \(4\)"):
        layers_report(tiny_backbone, texts()[0][None], num_retrieved=50)
    assert conclusion({"recommended": None, "default": 3}).startswith("no layer is worth reading")
    assert conclusion({"recommended": [1, 3], "default": 3}) == "remember 1, 3 (the paper's rule gives 3)"
