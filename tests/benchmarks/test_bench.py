"""The benches compare like with like, run, and keep their numbers."""

import json
from pathlib import Path

import pytest
import torch
from benchmarks.measure import peak_bytes
from benchmarks.released import ReleasedMemory, ReleasedStep
from tests.parity.released import ReleasedBank

from benchmarks import bench, store


def test_the_released_way_and_ours_compute_the_same_logits_through_evictions() -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 96}
    made = bench.make_model(shape, memory_layer=2).eval()
    with torch.no_grad():
        for parameter in made.trainable_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    bank = ReleasedBank(2, 256, 4, 8, 4)
    theirs = ReleasedMemory(256, 4, 8, 4)
    draw = torch.Generator().manual_seed(1)
    for _ in range(9):
        ids = torch.randint(4, 96, (2, 30), generator=draw)
        with torch.no_grad():
            ours = made(input_ids=ids, memory=bank, use_cache=False)
            logits, keys, values = ReleasedStep(made, theirs).logits(ids)
        torch.testing.assert_close(ours.logits, logits, atol=2e-5, rtol=1e-4)
        bank.add(ours.kv)
        theirs.add(keys, values)
        assert theirs.fill == int(bank.chunks[0])


def test_a_peak_counts_what_is_held_at_a_time() -> None:
    def twice_a_mebibyte_in_turn() -> None:
        for _ in range(2):
            torch.zeros(1 << 18)

    assert 1 << 20 <= peak_bytes(twice_a_mebibyte_in_turn) < 2 << 20


def test_the_bench_runs_and_keeps_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    bench.main(["--quick", "--out", str(out)])
    kept = json.loads(out.read_text())
    assert kept["command"] == f"python -m benchmarks.bench --quick --out {out}"
    assert set(kept["step"]["released_over_ours"]) == {"1024", "2048"}
    assert "released_over_ours at 2048 tokens" in capsys.readouterr().out


def test_the_bench_of_stores_measures_every_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = store.main(["--sizes", "4096", "--open", "70000", "--rounds", "2", "--out", str(tmp_path / "store.json")])
    assert {"add", "open", "load", "search_1", "gather_4096"} <= set(found["4096"])
    assert set(found["open_seconds"]) == {"65536", "70000"}
    assert "4096 tokens  " in capsys.readouterr().out
