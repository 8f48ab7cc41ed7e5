"""``longmem eval icl`` and ``longmem eval squad`` from files to table and JSON, and their one-line errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from longmem import AlibiGPTConfig, AlibiGPTForCausalLM, LongMem
from longmem.cli.main import main

TEXTS = [(f"a {word} film of {number}", number % 2) for number, word in enumerate(["dull", "fine"] * 12)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> Path:
    """A backbone with its SideNet, one set of short texts and two SQuAD files."""
    home = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 96}
    AlibiGPTForCausalLM(AlibiGPTConfig(vocab_size=260, **shape)).save_pretrained(home / "backbone")
    byte_tokenizer.save_pretrained(home / "backbone")
    side = LongMem.from_backbone(home / "backbone", chunk_size=4, num_retrieved=8, memory_size=256)
    side.save_pretrained(home / "side")
    (home / "icl" / "mr").mkdir(parents=True)
    for name, texts in (("train", TEXTS[4:]), ("test", TEXTS[:4])):
        lines = [f'{label},"{text}"' for text, label in texts]
        (home / "icl" / "mr" / f"{name}.csv").write_text("\n".join(lines) + "\n")
    for name in ("train", "dev"):
        qas = [
            {"context": f"{name} {n}", "qas": [{"id": f"{n}", "question": "Which?", "answers": [{"text": name}]}]}
            for n in range(4)
        ]
        content = {"version": "1.1", "data": [{"title": name, "paragraphs": qas}]}
        (home / f"{name}.json").write_text(json.dumps(content))
    return home


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as done:
        main(["eval", *map(str, arguments)])
    assert not done.value.code, capsys.readouterr().err
    return capsys.readouterr().out


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as done:
        main(["eval", *map(str, arguments)])
    assert done.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


def test_icl_from_files_to_table_and_json(home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = ["icl", "--model", home / "side", "--data", home / "icl", "--datasets", "mr"]
    asked += ["--local-shots", "1,2", "--memory-shots", "0,10", "--seeds", "2", "--limit", "0", "--out", tmp_path]
    table = run(capsys, *asked)
    # a demonstration has 46 or 47 bytes: two and a question are too many for a window of 96
    assert "mr: 1 of 2 demonstrations fit the window, on average (backbone, memory_off, memory_256)" in table
    assert "demonstrations for memory are held, on average (memory_256)" in table
    result = json.loads((tmp_path / "icl.json").read_text())
    assert [group["group"] for group in result["groups"]] == [
        "all",
        "mr, 1 + 0",
        "mr, 2 + 0",
        "mr, 1 + 10",
        "mr, 2 + 10",
    ]
    assert list(result["systems"]) == ["backbone", "memory_off", "memory_256"]
    assert result["header"]["seeds"] == [1, 2] and result["header"]["config"]["limit"] is None
    assert result["header"]["config"]["datasets"]["mr"]["files"] == ["mr/train.csv", "mr/test.csv"]
    assert len(result["examples"]) == 4 * 4
    # resumed from its records, it says the same
    again = json.loads(run(capsys, *asked, "--json"))
    assert (again["groups"], again["extra"]) == (result["groups"], result["extra"])


def test_squad_from_files_to_table_and_json(home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = ["squad", "--model", home / "side", "--train", home / "train.json", "--data", home / "dev.json"]
    asked += ["--local-shots", "1", "--memory-shots", "0,2", "--limit", "2", "--max-answer-tokens", "4"]
    table = run(capsys, *asked, "--out", tmp_path)
    assert "exact match in %, higher is better" in table
    result = json.loads((tmp_path / "squad.json").read_text())
    assert [group["group"] for group in result["groups"]] == ["all", "1 + 0", "1 + 2"]
    assert result["header"]["config"]["asked"]["file"] == "dev.json"


def test_errors_are_one_line(home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = ["--model", home / "side"]
    assert "no such folder" in error_of(capsys, "icl", *model, "--data", tmp_path / "nowhere")
    assert "no folder SST-2 in it, only mr" in error_of(capsys, "icl", *model, "--data", home / "icl")
    few = error_of(capsys, "icl", *model, "--data", home / "icl", "--datasets", "mr")
    assert few.startswith("mr: 4 demonstrations in the window and 200 in memory need 204 different ones, there are 20")
    squad = ["squad", *model, "--data", home / "dev.json", "--train"]
    assert "cannot be read" in error_of(capsys, *squad, home / "nowhere.json")
    assert "every passage in it is asked about" in error_of(capsys, *squad, home / "dev.json")
