"""Programs of ``benchmarks/`` run, compare like with like, and keep their numbers."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import bench, store
from benchmarks.ablation import main as ablation
from benchmarks.efficiency import FULL, LONGMEM, WINDOWED
from benchmarks.efficiency import main as efficiency
from benchmarks.real_model import SIZES, jobs, perplexities
from benchmarks.released import ReleasedMemory, ReleasedStep
from tests.parity.released import ReleasedBank

from longmem import CheckpointError, LongMem
from longmem.cli.eval import command


def test_the_released_way_and_ours_compute_the_same_logits_through_evictions() -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 96}
    made = bench.make_model(shape, memory_layer=2).eval()
    with torch.no_grad():
        for parameter in made.trainable_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    bank, theirs = ReleasedBank(2, 256, 4, 8, 4), ReleasedMemory(256, 4, 8, 4)
    draw = torch.Generator().manual_seed(1)
    for _ in range(9):
        ids = torch.randint(4, 96, (2, 30), generator=draw)
        with torch.no_grad():
            ours = made(input_ids=ids, memory=bank, use_cache=False)
            logits, keys, values = ReleasedStep(made, theirs).logits(ids)
        torch.testing.assert_close(ours.logits, logits, atol=2e-5, rtol=1e-4)
        bank.add(ours.kv)
        theirs.add(keys, values)


def test_the_benches_of_steps_and_of_stores_keep_their_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.main(["--quick", "--out", str(tmp_path / "bench.json")])
    kept = json.loads((tmp_path / "bench.json").read_text())
    assert kept["command"] == f"python -m benchmarks.bench --quick --out {tmp_path / 'bench.json'}"
    assert set(kept["step"]["released_over_ours"]) == {"1024", "2048"}
    found = store.main(["--sizes", "4096", "--open", "70000", "--rounds", "2", "--out", str(tmp_path / "store.json")])
    assert {"add", "open", "load", "search_1", "gather_4096"} <= set(found["4096"])
    said = capsys.readouterr().out
    assert "released_over_ours at 2048 tokens" in said and "4096 tokens  " in said


def test_efficiency_is_measured_of_every_system_at_every_context(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = "hidden=32,layers=4,heads=2,kv_heads=1,vocab=64,num_retrieved=8,memory_size=64"
    options = ["--contexts", "16,33", "--window", "16", "--new-tokens", "3", "--repeats", "2", "--no-memory"]
    efficiency(["--random", shape, *options, "--out", str(tmp_path)])
    assert "each new token" in capsys.readouterr().out
    result = json.loads((tmp_path / "efficiency.json").read_text())
    assert [(point["context"], point["system"]) for point in result["points"]] == [
        (context, system) for context in (16, 32) for system in (LONGMEM, FULL, WINDOWED)
    ]


def test_each_value_of_an_ablation_scores_as_a_model_made_with_it(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LongMem.from_pretrained("side/final", num_retrieved=4).save_pretrained(tmp_path / "four")
    asked = "--model side --data texts --protocols sliding --window 16 --resamples 20 --memory-size 64".split()
    for of in ("chunk_size=2", "num_retrieved=4", "memory_size=16", "memory_dtype=float32,int8", "gate_share=0,0.3"):
        asked += ["--of", of]
    asked += ["--out", str(tmp_path), "--also"]
    result = ablation([*asked, f"num_retrieved:made={tmp_path / 'four'}"])
    assert "chunk size (tokens)" in capsys.readouterr().out
    score, usual = {}, set()
    for axis in result["axes"]:
        score |= {(axis["name"], each["value"]): each["scores"]["sliding"]["perplexity"] for each in axis["values"]}
        usual |= {each["scores"]["sliding"]["perplexity"] for each in axis["values"] if each["default"]}
    assert score["num_retrieved", "4"] == pytest.approx(score["num_retrieved", "made"])
    assert score["gate_share", "0"] == pytest.approx(result["without"]["memory_off"]["sliding"]["perplexity"])
    assert score["memory_dtype", "int8"] == pytest.approx(score["memory_dtype", "float32"], rel=0.01)
    assert len(usual) == 1
    with pytest.raises(CheckpointError):
        ablation([*asked, "x=foreign"])


@pytest.mark.parametrize("size", SIZES)
def test_every_job_of_a_real_model_is_a_command_line(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.real_model.model_kind", lambda folder: folder)
    given = argparse.Namespace(
        size=size, data="data", model=["gates=training_free", "adapted=longmem"], backbone="base", control="control",
        device="cpu", dtype="auto", only="*",
    )  # fmt: skip
    found = jobs(given)
    assert len({job.name for job in found}) == len(found)
    for name, *arguments in (job.arguments for job in found):
        if name != "bm25":
            command.commands[name].make_context(name, arguments)
    assert any("--control" in job.arguments for job in found if job.name.endswith("adapted"))
    assert not any("--control" in job.arguments for job in found if job.name.endswith("gates"))


def test_perplexities_of_a_real_model_are_against_windows_on_the_same_documents_drawn_by_project() -> None:
    def result(**nll: tuple[float, float, float]) -> dict[str, Any]:
        return {
            "documents": [
                {"id": name, "tokens": 10, "nll": {"sliding": {system: each[n] for system, each in nll.items()}}}
                for n, name in enumerate(("p__a", "p__b", "q__a"))
            ]
        }

    base = (10.0, 10.0, 10.0)
    longer, gates = result(backbone=(5.0, 5.0, 5.0)), result(backbone=base, memory_8=(0.0, 0.0, 10.0))
    names = ("sliding-books-window1024", "sliding-books-window8192", "sliding-books-gates")
    assert perplexities(dict(zip(names, (result(backbone=base), longer, gates), strict=True)))[2:] == [
        "| books, short, sliding | gates: memory_8 | 3 | 1.396 | -48.7 [-63.2, +0.0] | -15.4 [-39.3, +64.9] |",
        "| books, short, sliding | window1024 | 3 | 2.718 |  | +64.9 [+64.9, +64.9] |",
        "| books, short, sliding | window8192 | 3 | 1.649 | -39.3 [-39.3, -39.3] |  |",
    ]
