"""The bench compares like with like, and runs."""

from __future__ import annotations

import json

import torch
from benchmarks.measure import interleaved, peak_bytes
from benchmarks.released import ReleasedMemory, ReleasedStep
from tests.parity.released import ReleasedBank

from benchmarks import bench, retrieval, step
from longmem.modeling.longmem import LongMem


def model() -> LongMem:
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 96}
    made = step.make_model(shape, memory_layer=2).eval()
    with torch.no_grad():
        for parameter in made.trainable_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def test_the_released_way_and_ours_compute_the_same_logits_through_evictions():
    made = model()
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


def test_both_ways_of_retrieval_have_the_same_gradient():
    bank = retrieval.filled_bank(64, 2, 2, 8)
    queries = torch.randn(2, 2, 5, 8)
    torch.testing.assert_close(
        retrieval.blockwise(bank, queries, 3), retrieval.materialised(bank, queries, 3), atol=1e-5, rtol=1e-4
    )


def test_runs_are_taken_in_turn():
    order: list[str] = []
    taken = interleaved({name: (lambda name=name: order.append(name)) for name in "ab"}, repeats=2, warmup=1)
    assert order == ["a", "b"] * 3
    assert [len(rounds) for rounds in taken.values()] == [2, 2]


def test_peak_counts_what_is_held_at_a_time():
    def twice_a_mebibyte_in_turn() -> None:
        for _ in range(2):
            torch.zeros(1 << 18)

    assert 1 << 20 <= peak_bytes(twice_a_mebibyte_in_turn) < 2 << 20


def test_the_bench_runs_and_keeps_its_numbers(tmp_path, capsys):
    out = tmp_path / "bench.json"
    shape = dict(step.SHAPE)
    try:
        bench.main(["--quick", "--out", str(out)])
    finally:
        step.SHAPE.update(shape)
    kept = json.loads(out.read_text())
    assert kept["command"] == f"python -m benchmarks.bench --quick --out {out}"
    assert set(kept["step"]["released_over_ours"]) == {"1024", "2048"}
    assert "released_over_ours at 2048 tokens" in capsys.readouterr().out
