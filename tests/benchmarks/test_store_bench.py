"""The store's bench runs, and says what it was asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import store


def test_the_store_bench_measures_every_step_and_keeps_the_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "store.json"
    store.main(["--sizes", "4096", "--open", "70000", "--rounds", "2", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["command"] == f"python -m benchmarks.store --sizes 4096 --open 70000 --rounds 2 --out {out}"
    assert set(found["4096"]) == {"now"}, "there is no other version to compare with"
    assert all(part["median"] >= 0 for part in found["4096"]["now"].values())
    assert set(found["open_seconds"]) == {"65536", "70000"}
    assert "4096 tokens  " in capsys.readouterr().out
