"""From negative log-likelihoods to reported numbers and their intervals, by hand."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longmem.data.tokens import TokenizedDocument
from longmem.evaluation.perplexity import (
    EDGES,
    PerplexitySettings,
    block_bins,
    position_bins,
    record,
    scores_of_parts,
)
from longmem.evaluation.results import Bootstrap, as_json, header, percent, write_json


def document(name: str, tokens: int) -> TokenizedDocument:
    """Scored tokens stand for half as many words and three times as many bytes."""
    ids, group = torch.zeros(tokens + 1, dtype=torch.long), name[0]
    return TokenizedDocument(name, ids, words=tokens // 2, bytes=3 * tokens, digest=name, group=group, project=group)


DOCUMENTS = [document("a__1", 400), document("a__2", 6000), document("b__1", 20_000)]
TABLE = {
    name: [record(np.full(d.scored, math.log(perplexity)), block=100) for d in DOCUMENTS]
    for name, perplexity in (("backbone", 10.0), ("memory_64", 9.0))
}


def score(block: int = 100) -> Any:
    settings = PerplexitySettings(block=block, bootstrap=Bootstrap(resamples=50))
    return as_json(scores_of_parts(DOCUMENTS, TABLE, [("memory_64", "backbone")], settings))


def test_scores_of_all_documents_and_of_their_groups_lengths_and_positions() -> None:
    found = score()
    backbone, (difference,) = found["all"]["systems"][0], found["all"]["differences"]
    assert backbone["perplexity"] == pytest.approx(10.0)
    assert backbone["word_perplexity"] == pytest.approx(100.0)  # two tokens a word
    assert backbone["bits_per_byte"] == pytest.approx(math.log2(10) / 3)
    sizes = [found["all"][name] for name in ("documents", "projects", "tokens", "words", "bytes")]
    assert sizes == [3, 2, 26_400, 13_200, 79_200]
    assert difference["percent"] == pytest.approx(-10.0)
    documents, blocks = difference["documents"], difference["blocks"]
    assert (documents["units"], documents["count"], documents["groups"]) == ("documents", 3, 2)
    assert (blocks["units"], blocks["count"]) == ("blocks of 100 tokens", 264)
    (difference,) = score(1 << 20)["all"]["differences"]
    assert difference["documents"] and difference["blocks"] is None, "one block each: the same interval again"
    assert [(g["name"], g["documents"], g["tokens"]) for g in found["groups"]] == [("a", 2, 6400), ("b", 1, 20_000)]
    assert [(b["name"], b["documents"]) for b in found["by_length"]] == [("<5k", 1), ("5k-10k", 1), ("10k-100k", 1)]
    parts = found["all"]["by_position"]
    assert sum(part["tokens"] for part in parts) == 26_400 and parts[0]["tokens"] == 3 * 127
    assert [(p["low"], p["high"]) for p in parts[:3]] == [(0, 128), (128, 256), (256, 512)]
    assert all(part["perplexity"]["memory_64"] == pytest.approx(9.0) for part in parts)
    assert all(part["percent"]["memory_64"] == pytest.approx(-10.0) for part in parts)


def test_bins_agree_with_their_edges_and_a_short_rest_joins_the_block_before_it() -> None:
    bins = position_bins(3000)
    assert (bins[0], bins[126], bins[127], bins[255], bins[2047]) == (0, 0, 1, 2, 5)
    assert all(EDGES[which] <= before < EDGES[which + 1] for before, which in enumerate(bins.tolist(), 1))
    assert [np.bincount(block_bins(n, 4)).tolist() for n in (10, 9, 1, 3)] == [[4, 4, 2], [4, 5], [1], [3]]


def edges(found: dict[str, Any] | None) -> tuple[float, float]:
    assert found is not None
    return found["low"], found["high"]


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    """A constant gain is found exactly, because units are paired; one unit says nothing of its spread."""
    generator, hits, trials, tokens = np.random.default_rng(0), 0, 200, np.full(40, 1000.0)
    for seed in range(trials):
        gains = tokens * generator.normal(-0.02, 0.03, 40)
        low, high = edges(Bootstrap(400, seed=seed).interval(gains, tokens, "documents", of=percent))
        hits += low <= 100 * math.expm1(-0.02) <= high
    assert 0.88 < hits / trials < 0.99
    constant = Bootstrap().interval(-0.1 * tokens, tokens, "documents", of=percent)
    assert edges(constant) == pytest.approx((100 * math.expm1(-0.1),) * 2)
    assert Bootstrap().interval(np.array([3.0]), np.array([1.0]), "documents") is None


def test_groups_widen_an_interval_and_groups_of_one_unit_do_not_change_it() -> None:
    """Twelve documents of two projects that differ: a thirteenth may be of either, or of a third."""
    tokens = np.full(12, 1000.0)
    nll = tokens * np.repeat([3.0, 2.0], 6) + np.arange(12)
    alone, apart, grouped = (
        Bootstrap().interval(nll, tokens, "documents", groups, np.exp)
        for groups in (None, [f"project {i}" for i in range(12)], ["a"] * 6 + ["b"] * 6)
    )
    assert alone is not None and grouped is not None
    assert alone == apart and (alone["groups"], grouped["count"], grouped["groups"]) == (12, 12, 2)
    assert edges(grouped) == pytest.approx((math.exp(2), math.exp(3)), rel=0.02)
    assert grouped["low"] < alone["low"] < alone["high"] < grouped["high"]


def test_a_result_says_how_it_was_made_in_json_that_all_can_read(tmp_path: Path) -> None:
    path, about = tmp_path / "result.json", header("it", config={"w": 8}, models={}, samples={}, seeds=[0])
    write_json(path, {"header": about, "a": [math.nan, 1.5], "b": math.inf, "c": "caf\udce9"})
    found = json.loads(path.read_text())
    # of a path that is not UTF-8 what can be said
    assert (found["a"], found["b"], found["c"], found["header"]["seeds"]) == ([None, 1.5], None, "caf?", [0])
    assert {"python", "longmem", "torch", "transformers", "numpy"} <= set(found["header"]["versions"])
    assert found["header"]["machine"]["cpus"] >= 1 and found["header"]["created"]
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == found and [*tmp_path.iterdir()] == [path], "complete, or as it was"
