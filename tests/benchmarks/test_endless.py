"""The endless bench runs, and what it generates is what the same steps without a cache give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import endless


def test_a_short_run_equals_its_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--tokens", "100", "--window", "16", "--session", "64"]
    result = endless.main([*sizes, "--out", str(tmp_path / "endless.json")])
    assert result["equal_to_reference_without_cache"] is True and result["different_tokens"] > 10
    assert result["session_tokens_at_end"] == 64 and len(result["seconds_per_token"]) == 6
    assert json.loads((tmp_path / "endless.json").read_text())["window_move"] == 8
    assert "equal to the reference: True" in capsys.readouterr().out
