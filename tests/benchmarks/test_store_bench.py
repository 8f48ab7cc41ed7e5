"""The store's bench runs, and says what it was asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import store


def test_the_store_bench_measures_every_size_and_keeps_the_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = store.main(["--quick", "--folder", str(tmp_path), "--out", str(tmp_path / "store.json")])
    assert set(result["sizes"]) == {"2048", "4096"} == set(result["decode"])
    assert all(one["segment"]["over_matmul"]["median"] > 0 for one in result["sizes"].values())
    # two bytes a number, the mean keys beside them, and a catalog
    assert all(1.1 < one["bytes_over_theory"] < 2 for one in result["sizes"].values())
    assert json.loads((tmp_path / "store.json").read_text())["add"]["tokens"] == 4096
    assert "4,096 tokens: open" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["store.json"], "the stores are removed"
