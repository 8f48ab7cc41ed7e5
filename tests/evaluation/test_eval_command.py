"""``longmem eval perplexity`` from files to table, JSON and curves, and its one-line errors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from longmem import AlibiGPTConfig, AlibiGPTForCausalLM, LongMem
from longmem.cli.main import main
from longmem.data.tokenizer import train_tokenizer

TEXT = "Words of a small text, and more words of it; then the same words again. "


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, a SideNet over it, a control, one over another backbone, and three documents."""
    home = tmp_path_factory.mktemp("home")
    tokenizer = train_tokenizer([TEXT], 290)
    for seed, name in enumerate(("backbone", "other-backbone")):
        torch.manual_seed(seed)
        shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 32}
        AlibiGPTForCausalLM(AlibiGPTConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    for name, backbone in (("side/final", "backbone"), ("control", "backbone"), ("foreign", "other-backbone")):
        model = LongMem.from_backbone(home / backbone, chunk_size=4, num_retrieved=8, memory_size=64)
        with torch.no_grad():
            for parameter in model.trainable_parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(home / name)
    (home / "texts").mkdir()
    for i, name in enumerate(("one__a", "one__b", "two__a")):
        (home / "texts" / f"{name}.txt").write_text(TEXT * (i + 2))
    return home


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as done:
        main(["eval", "perplexity", *map(str, arguments)])
    assert not done.value.code, capsys.readouterr().err
    return capsys.readouterr().out


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as done:
        main(["eval", "perplexity", *map(str, arguments)])
    assert done.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


def test_result_table_and_curves_from_a_run_folder(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--memory-sizes", "16,64", "--control", home / "control", "--group-by-prefix", "__", "--batch", 2]
    data = ["--data", home / "texts", "--resamples", 50]
    shown = run(capsys, "--model", home / "side", *data, *options, "--out", out)
    for words in ("backbone alone", "SideNet, memory off", "SideNet trained without memory", "LongMem, 16 tokens"):
        assert words in shown
    for words in ("segments of 32", "sliding window, 32 by 16", "two (1)", "3 documents of 2 projects"):
        assert words in shown
    result = json.loads((out / "perplexity.json").read_text())
    assert set(result["systems"]) == {"backbone", "memory_off", "control", "memory_16", "memory_64"}
    assert result["header"]["samples"]["documents"] == 3
    assert {file.name for file in out.iterdir()} == {
        "perplexity.json",
        "records.jsonl",
        "perplexity-by-position.png",
        "perplexity-by-memory-size.png",
    }
    again = json.loads(run(capsys, "--model", home / "side", *data, *options, "--out", out, "--json"))
    assert again["protocols"] == result["protocols"]


def test_a_backbone_by_itself_is_measured_too(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--model",
        home / "backbone",
        "--data",
        home / "texts" / "one__a.txt",
        "--protocol",
        "sliding",
        "--json",
    ]
    result = json.loads(run(capsys, *arguments, "--stride", 8, "--window", 24))
    assert list(result["systems"]) == ["backbone"]
    assert (result["protocols"]["sliding"]["window"], result["protocols"]["sliding"]["stride"]) == (24, 8)


def test_documents_and_their_length_can_be_limited(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", home / "side", "--data", home / "texts", "--num-documents", 2, "--max-tokens", 30, "--json"]
    result = json.loads(run(capsys, *arguments))
    assert [(d["id"], d["tokens"]) for d in result["documents"]] == [("one__a.txt", 29), ("one__b.txt", 29)]


def test_wrong_paths_are_named(home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    texts = ["--data", home / "texts"]
    assert error_of(capsys, "--model", home / "side", "--data", tmp_path / "no.txt").startswith(
        f"{tmp_path}/no.txt: no such"
    )
    (tmp_path / "empty.txt").write_text("  \n")
    assert "empty" in error_of(capsys, "--model", home / "side", "--data", tmp_path / "empty.txt")
    assert error_of(capsys, "--model", tmp_path / "no", *texts).startswith(f"{tmp_path}/no: no such folder; name a")
    assert error_of(capsys, "--model", tmp_path, *texts).startswith(f"{tmp_path}: no model here (no config.json in it")


def test_checkpoints_of_another_backbone_are_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["--data", home / "texts"]
    line = error_of(capsys, "--model", home / "side", "--control", home / "foreign", *texts)
    assert "foreign" in line
    assert "was made over backbone" in line
    assert "was made over backbone" in error_of(
        capsys, "--model", home / "side", "--backbone", home / "other-backbone", *texts
    )
    assert error_of(capsys, "--model", home / "side", "--control", home / "backbone", *texts).endswith(
        "not a LongMem checkpoint; --control takes a SideNet trained without memory"
    )


def test_a_damaged_checkpoint_is_refused(home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copytree(home / "side" / "final", tmp_path / "cut")
    weights = tmp_path / "cut" / "sidenet.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "not a complete LongMem checkpoint" in error_of(
        capsys, "--model", tmp_path / "cut", "--data", home / "texts"
    )


def test_settings_that_contradict_each_other_are_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["--data", home / "texts"]
    assert error_of(capsys, "--model", home / "side", *texts, "--memory-sizes", "64,18") == (
        "memory size (18) must be a multiple of chunk_size (4); try 16"
    )
    assert error_of(capsys, "--model", home / "side", *texts, "--memory-sizes=-4") == (
        "memory size (-4) must not be below 0, which is memory switched off; try 4"
    )
    assert error_of(capsys, "--model", home / "backbone", *texts, "--memory-sizes", "64").startswith(
        "--memory-sizes needs a LongMem checkpoint; "
    )
    assert error_of(capsys, "--model", home / "side", *texts, "--stride", "40") == (
        "stride (40) must be between 1 and the window (32); try 16"
    )


@pytest.mark.parametrize("option", ["--protocol=rolling", "--protocol=", "--window=1", "--batch=0", "--resamples=0"])
def test_a_wrong_value_is_refused_by_its_option_before_anything_is_read(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["eval", "perplexity", "--model", "nowhere", "--data", "nowhere", option])
    assert done.value.code == 2
    assert f"'{option.split('=')[0]}'" in capsys.readouterr().err


def test_a_pattern_that_matches_no_document_is_named_with_the_ids_there_are(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_of(capsys, "--model", home / "side", "--data", home / "texts", "--include", "three*")
    assert "three*" in line and "one__a.txt, one__b.txt, two__a.txt" in line


@pytest.mark.parametrize("columns", [40, 400])
def test_no_number_is_cut_in_a_pipe(
    columns: int, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    given = ["--model", home / "side", "--control", home / "control", "--training-free", "0.5"]
    shown = run(capsys, *given, "--data", home / "texts", "--memory-sizes", "16,64", "--resamples", 20)
    edges = re.findall(r"\[[+-][^\]]*\]", shown)
    assert len(edges) > 20
    assert all(re.fullmatch(r"\[[+-]\d+\.\d\d, [+-]\d+\.\d\d\]", edge) for edge in edges)
    assert "…" not in shown
    assert (max(map(len, shown.splitlines())) > 100) == (columns == 400)


def test_a_device_that_is_not_here_is_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["--model", home / "side", "--data", home / "texts"]
    for device in ("gpu", "meta", "cuda:99"):
        line = error_of(capsys, *texts, "--device", device)
        assert line.startswith(f"device ({device}) cannot be used (")
        assert line.endswith("; try --device cpu")


def test_the_tokenizer_of_a_larger_model_is_refused(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = " ".join(f"word{number}" for number in range(200))
    larger = train_tokenizer([words], 400)
    larger.save_pretrained(tmp_path)
    line = error_of(capsys, "--model", home / "side", "--data", home / "texts", "--tokenizer", tmp_path)
    assert line.startswith(f"{tmp_path}: a tokenizer of {len(larger)} tokens, the model knows ")
    assert line.endswith("; name the right one with --tokenizer")


def test_checkpoints_that_are_no_checkpoints_are_named(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(home / "backbone", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    line = error_of(capsys, "--model", tmp_path / "cut", "--data", home / "texts")
    assert line.startswith(f"backbone '{tmp_path}/cut' could not be loaded (")
    (tmp_path / "cut" / "config.json").write_text("[1]")
    assert error_of(capsys, "--model", tmp_path / "cut", "--data", home / "texts").startswith(
        f"{tmp_path}/cut/config.json: no object at its top"
    )


def test_a_seed_below_zero_is_refused_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for task in ("perplexity", "ablate", "needle", "harness"):
        with pytest.raises(SystemExit) as done:
            main(["eval", task, "--seed=-1"])
        assert done.value.code == 2
        assert "'--seed': -1 is not in the range x>=0" in capsys.readouterr().err


def test_a_harness_without_tasks_or_with_a_file_of_them_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "task.yaml").touch()
    for more, status, said in (
        (["--tasks", ""], 1, "--tasks (none) must name at least one"),
        (["--tasks", "x", "--include", tmp_path / "task.yaml"], 2, "is a file"),
    ):
        with pytest.raises(SystemExit) as done:
            main(["eval", "harness", "--model", "x", *map(str, more)])
        assert done.value.code == status
        assert said in capsys.readouterr().err


def test_an_empty_group_sign_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_of(capsys, "--model", home / "side", "--data", home / "texts", "--group-by-prefix", "")
    assert line == "the sign that ends a group's name must not be empty; try --group-by-prefix __"


def test_text_errors_speak_of_options_not_of_a_recipe(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "lines.jsonl").write_text('{"body": "x"}\n')
    for name in ("nothing.txt", "latin.txt", "lines.jsonl"):
        line = error_of(capsys, "--model", home / "side", "--data", tmp_path / name)
        assert line.startswith(f"{tmp_path}/{name}")
        assert "data." not in line
        assert "recipe" not in line
