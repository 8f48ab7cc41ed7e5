"""What trainings cost, from the metrics that they leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.training import main, run_of


def test_a_run_is_told_by_its_last_step_and_all_its_losses(tmp_path: Path) -> None:
    lines = [
        {"kind": "train", "step": 10, "tokens": 100, "seconds": 30.0, "loss": 4.0},
        {"kind": "eval", "step": 20, "tokens": 200, "loss": 3.5, "loss_memory_off": 3.75},
        {"kind": "train", "step": 20, "tokens": 200, "seconds": 60.0, "loss": 3.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = main([f"side={tmp_path}", "--out", str(tmp_path / "training.json")])
    assert json.loads((tmp_path / "training.json").read_text()) == result
    run = result["trainings"]["side"]
    assert (run["steps"], run["tokens"], run["seconds"]) == (20, 200, 60.0)
    assert run["train"] == [[10, 4.0], [20, 3.0]]
    assert run["valid"] == [{"step": 20, "loss": 3.5, "loss_memory_off": 3.75}]


def test_a_run_without_a_step_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no step was trained"):
        run_of(tmp_path)


def test_a_run_needs_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "no NAME=RUN_FOLDER" in capsys.readouterr().err
