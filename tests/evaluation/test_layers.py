"""``longmem layers`` from the model's folder to table, JSON and heat map."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.family_table import FAMILIES, V, make_backbone
from transformers import PreTrainedTokenizerFast

from longmem import AlibiGPTForCausalLM
from longmem.cli.main import main
from longmem.data.tokens import train_tokenizer
from longmem.errors import ConfigError, DataError
from longmem.evaluation.layers import conclusion, measure_effect, measure_layers, text_rows
from longmem.evaluation.plots import plot_all
from longmem.modeling.copying import random_tokens

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def folder(tiny_backbone: AlibiGPTForCausalLM, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    tiny_backbone.save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["layers", *map(str, arguments)])
    return int(stopped.value.code or 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_ranked(name: str) -> None:
    model = make_backbone(name)
    report = measure_layers(model, None, distances=(40,), rows=1, num_retrieved=16)
    heads = model.config.get_text_config().num_attention_heads
    assert {*map(str, report["memory_layers"])} <= set(report["scores"])
    assert set(report["allowed"]) <= set(report["memory_layers"])
    assert {len(rank) for ranks in report["ranks"] for rank in ranks["rank"].values()} == {heads}
    assert [copied["distance"] for copied in report["copying"]] == [40]


def test_text_and_random_tokens_are_measured_at_every_distance(tiny_backbone: AlibiGPTForCausalLM) -> None:
    text = random_tokens(260, 2, 200, seed=3)
    report = measure_layers(tiny_backbone, text, distances=(64, 128, 192, 512), num_retrieved=32, segment=64, rows=2)
    assert [(ranks["source"], ranks["distance"]) for ranks in report["ranks"]] == [
        *(("text", distance) for distance in (64, 128, 192)),
        *(("random", distance) for distance in (64, 128, 192, 512)),
    ]
    assert all(ranks["chance"] == 8 / (ranks["distance"] // 4) for ranks in report["ranks"])
    assert report["copying"] == []  # twice 64 tokens exceed the segment


def test_a_backbone_that_does_not_copy_gets_no_recommendation(tiny_backbone: AlibiGPTForCausalLM) -> None:
    report = measure_layers(tiny_backbone, None, distances=(256,))
    assert report["recommended"] is None
    assert conclusion(report) == (
        "no layer stands out from chance: the backbone does not copy from its context yet; train it longer, or keep "
        "the paper's layer 3"
    )


def test_the_command_prints_a_table_and_writes_json_and_heat_map(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(folder, "--distances", "96,128", "--rows", 2, "--segment", 64, "--out", tmp_path / "out")
    printed = capsys.readouterr()
    assert code == 0
    assert "How well keys find what followed an earlier occurrence" in printed.out
    assert "no layer stands out" in printed.out
    assert (tmp_path / "out" / "layers.png").read_bytes().startswith(PNG)
    written = json.loads((tmp_path / "out" / "layers.json").read_text())
    assert written["num_layers"] == 4
    assert written["header"]["task"] == "layers"
    assert written["header"]["config"]["distances"] == [96, 128]


def test_too_little_text_says_how_much_is_needed(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"--data has 5 tokens, 128 are needed; give more text, or smaller --distances"):
        text_rows(["short"], byte_tokenizer, 2, 128)


def test_settings_that_contradict_each_other_are_told_together(tiny_backbone: AlibiGPTForCausalLM) -> None:
    with pytest.raises(ConfigError) as caught:
        measure_layers(tiny_backbone, None, distances=(128,), segment=1, num_retrieved=50)
    assert "num_retrieved (50) must be a multiple of chunk_size (4); try 64 and 4" in str(caught.value)
    assert "segment (1) must be at least 2" in str(caught.value)
    with pytest.raises(ConfigError, match=r"distances \(64\) must all exceed num_retrieved \(64\)"):
        measure_layers(tiny_backbone, None, distances=(64,))


def test_the_heat_map_marks_the_recommended_layer(tiny_backbone: AlibiGPTForCausalLM, tmp_path: Path) -> None:
    report = measure_layers(tiny_backbone, None, distances=(96,), rows=1)
    marked = report | {"recommended": 3}
    (path,) = plot_all(marked, tmp_path / "a")
    assert path.name == "layers.png" and path.read_bytes().startswith(PNG)
    assert conclusion(marked) == "remember layer 3 (the paper's rule gives 3)"
    assert torch.is_grad_enabled()


def test_without_a_tokenizer_random_tokens_are_measured(
    tiny_backbone: AlibiGPTForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_backbone.save_pretrained(tmp_path)
    assert run(tmp_path, "--distances", "96", "--rows", 1, "--json") == 0
    printed = capsys.readouterr()
    assert "measuring random tokens only; --tokenizer names one" in printed.err
    assert {ranks["source"] for ranks in json.loads(printed.out)["ranks"]} == {"random"}


# the effect of reading


def _texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, V, (20,), generator=generator).repeat(3) for _ in range(2)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_every_layer_that_can_be_remembered_is_measured(name: str) -> None:
    model = make_backbone(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = measure_effect(model, _texts(), most=1, window=20, num_retrieved=8, chunk_size=2, quiet=True)
    assert [effect.layers for effect in report.single] == (
        [(1,), (3,)] if name == "gemma3" else [(0,), (1,), (2,), (3,)]
    )
    assert report.best == max(report.single, key=report.worth).layers
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_layer_measured_alone_and_among_others_is_the_same() -> None:
    model, settings = make_backbone("llama"), {"most": 1, "window": 20, "num_retrieved": 8, "chunk_size": 2}
    many = measure_effect(model, _texts(), quiet=True, **settings)  # type: ignore[arg-type]
    one = measure_effect(model, _texts(), layers=[2], quiet=True, **settings)  # type: ignore[arg-type]
    assert one.single[0].text == pytest.approx(many.single[2].text, abs=1e-6)
    assert one.alone == many.alone and one.context == many.context


def test_facts_are_measured_where_there_is_a_tokenizer() -> None:
    model = make_backbone("llama")
    model.resize_token_embeddings(300)
    model.config.max_position_embeddings = 2048
    tokenizer = train_tokenizer(["My dog is called Comet."] * 20, 280)
    report = measure_effect(model, (), tokenizer, layers=[1], most=1, sessions=1, quiet=True)
    assert report.alone.text is None and report.single[0].facts != report.alone.facts


def test_sets_grow_by_the_layer_that_adds_most() -> None:
    settings = {"window": 20, "num_retrieved": 8, "chunk_size": 2}
    report = measure_effect(make_backbone("llama"), _texts(), most=3, quiet=True, **settings)  # type: ignore[arg-type]
    sizes = [set(effect.layers) for effect in report.sets]
    assert [len(size) for size in sizes] == [1, 2, 3] and sizes[0] < sizes[1] < sizes[2]
    assert set(report.best) in sizes
