"""The decode bench runs, puts caches back where they were, and keeps its numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import decode


def test_a_quick_run_measures_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "decode.json"
    decode.main(["--quick", "--out", str(out)])
    kept = json.loads(out.read_text())
    assert kept["command"] == f"python -m benchmarks.decode --quick --out {out}"
    decoded, read_in = kept["decoding"], kept["reading"]
    ways = {"backbone_window", "empty_bank", "bank_512", "bank_1024", "session_over_1024", "full_512", "full_1024"}
    assert decoded["seconds_per_token"].keys() == decoded["peak_bytes"].keys() == ways
    # keys and values of 4 layers, 8 heads of 8 numbers, in float32
    assert decoded["cache_bytes"]["full_1024"] == 2 * 4 * (1024 + 2) * 64 * 4
    assert decoded["memory_bytes"]["bank_1024"] > 2 * 1024 * 64 * 4
    assert decoded["peak_bytes"]["full_1024"] > decoded["peak_bytes"]["full_512"]
    assert {"longmem", "backbone_by_windows", "full_512", "full_1024"} == read_in["seconds"].keys()
    assert "reading over backbone by windows" in capsys.readouterr().out


@torch.no_grad()
def test_every_round_decodes_from_the_same_place() -> None:
    model = decode.make_model(torch.device("cpu"), torch.float32, **decode.QUICK)
    local = torch.arange(12)[None]
    for way in (
        decode.windowed(model, None, local, 3),
        decode.windowed(model, None, local, 3, alone=True),
        decode.full(model, 40, local[:, -1:], 3),
    ):
        before = int(way.cache.get_seq_length())
        way()
        way()
        assert int(way.cache.get_seq_length()) == before == (12 if before < 40 else 40)
