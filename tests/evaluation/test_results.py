"""Result files: complete or absent, plain JSON, and with all that repeats them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from longmem.evaluation.results import RunHeader, write_json


def test_a_result_says_how_it_was_made(tmp_path: Path) -> None:
    header = RunHeader("perplexity", "longmem eval", {"window": 8}, {"backbone": "f00"}, {"documents": 2}, [0])
    write_json(tmp_path / "deep" / "result.json", header)
    found = json.loads((tmp_path / "deep" / "result.json").read_text())
    assert found["seeds"] == [0]
    assert {"python", "longmem", "torch", "transformers", "numpy"} <= set(found["versions"])
    assert found["machine"]["cpus"] >= 1
    assert found["created"]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", {"a": [math.nan, 1.5], "b": math.inf})
    assert json.loads((tmp_path / "result.json").read_text()) == {"a": [None, 1.5], "b": None}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
