"""Bins of positions and blocks, and records that survive an interruption."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from longmem.evaluation.records import Ledger, bin_edges, block_bins, make_record, position_bins


def test_position_bins_are_powers_of_two_and_agree_with_their_edges() -> None:
    bins = position_bins(3000)
    assert bins[0] == 0
    assert (bins[126], bins[127], bins[255], bins[2047]) == (0, 1, 2, 5)  # 127, 128, 256 and 2,048 tokens before
    for i, bin_index in enumerate(bins):
        low, high = bin_edges(int(bin_index))
        assert low <= i + 1 < high


def test_a_short_rest_joins_the_block_before_it() -> None:
    assert np.bincount(block_bins(10, 4)).tolist() == [4, 4, 2]
    assert np.bincount(block_bins(9, 4)).tolist() == [4, 5]
    assert np.bincount(block_bins(1, 4)).tolist() == [1]
    assert np.bincount(block_bins(3, 4)).tolist() == [3]


def test_sums_of_a_record_agree() -> None:
    nll = np.random.default_rng(0).random(5000)
    record = make_record("k", "d", "doc", "segments", "backbone", nll, block=1024)
    assert record.tokens == 5000
    for parts in (record.blocks, record.positions, [record.nll]):
        np.testing.assert_allclose(sum(parts), nll.sum())


def test_a_line_cut_by_an_interruption_loses_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    ledger = Ledger(path)
    for name in ("a", "b"):
        ledger.append(make_record("key", name, name, "segments", "backbone", np.ones(3), block=2))
    path.write_bytes(path.read_bytes()[:-20] + b"\xff")
    again = Ledger(path)
    assert again.get("key", "a") == ledger.get("key", "a")
    assert again.get("key", "b") is None
    again.append(make_record("key", "b", "b", "segments", "backbone", np.ones(3), block=2))
    assert Ledger(path).get("key", "b") == ledger.get("key", "b")
