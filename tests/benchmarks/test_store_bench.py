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
    model, large = result["models"]
    assert set(model["sizes"]) == {"2048", "4096"} == set(model["decode"])
    assert (large["dtype"], set(large["sizes"])) == ("int8", {"8192"})
    for one in (*model["sizes"].values(), *large["sizes"].values()):
        assert one["segment"]["over_matmul"]["median"] > 0
        # the mean keys beside keys and values, and a catalog
        assert 1.1 < one["bytes_over_theory"] < 3
    assert model["add"]["tokens"] == 2048
    assert model["add"]["full_over_empty"]["median"] > 0
    assert set(model["add"]["into"]) == {"empty", "4096"}
    assert json.loads((tmp_path / "store.json").read_text()) == json.loads(json.dumps(result))
    assert "4,096 tokens: open" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["store.json"], "the stores are removed"
