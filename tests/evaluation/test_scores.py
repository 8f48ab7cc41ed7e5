"""From records to reported numbers, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from longmem.evaluation.bootstrap import Bootstrap
from longmem.evaluation.documents import TokenizedDocument
from longmem.evaluation.records import Record, make_record
from longmem.evaluation.scores import protocol_scores, scores


def document(name: str, tokens: int, group: str | None = None) -> TokenizedDocument:
    """Scored tokens stand for half as many words and three times as many bytes."""
    ids = torch.zeros(tokens + 1, dtype=torch.long)
    return TokenizedDocument(name, ids, words=tokens // 2, bytes=3 * tokens, digest=name, group=group)


def records(documents: list[TokenizedDocument], system: str, perplexity: float) -> list[Record]:
    return [
        make_record("key", d.digest, d.id, "segments", system, np.full(d.scored, math.log(perplexity)), block=100)
        for d in documents
    ]


DOCUMENTS = [document("a__1", 400, "a"), document("a__2", 6000, "a"), document("b__1", 20_000, "b")]
TABLE = {"backbone": records(DOCUMENTS, "backbone", 10.0), "memory_64": records(DOCUMENTS, "memory_64", 9.0)}


def test_word_perplexity_and_bits_per_byte_come_from_the_same_sum() -> None:
    found = scores("all", DOCUMENTS, TABLE, [("memory_64", "backbone")], Bootstrap(resamples=50), 100)
    backbone = found.system("backbone")
    assert backbone.perplexity == pytest.approx(10.0)
    assert backbone.word_perplexity == pytest.approx(100.0)  # two tokens a word
    assert backbone.bits_per_byte == pytest.approx(math.log2(10) / 3)
    assert (found.documents, found.tokens, found.words, found.bytes) == (3, 26_400, 13_200, 79_200)


def test_difference_has_an_interval_over_documents_and_one_over_blocks() -> None:
    found = scores("all", DOCUMENTS, TABLE, [("memory_64", "backbone")], Bootstrap(resamples=50), 100)
    difference = found.difference("memory_64", "backbone")
    assert difference is not None
    assert difference.percent == pytest.approx(-10.0)
    assert difference.documents is not None
    assert difference.blocks is not None
    assert (difference.documents.units, difference.documents.count) == ("documents", 3)
    assert (difference.blocks.units, difference.blocks.count) == ("blocks of 100 tokens", 264)


def test_groups_and_the_papers_length_buckets_are_apart() -> None:
    found = protocol_scores("segments", 64, 64, DOCUMENTS, TABLE, [], Bootstrap(resamples=50), 100)
    assert [(g.name, g.documents, g.tokens) for g in found.groups] == [("a", 2, 6400), ("b", 1, 20_000)]
    assert [(b.name, b.documents) for b in found.by_length] == [("<5k", 1), ("5k-10k", 1), ("10k-100k", 1)]


def test_positions_count_every_token_once_and_say_how_many_documents_reach_them() -> None:
    parts = scores("all", DOCUMENTS, TABLE, [], Bootstrap(resamples=50), 100).by_position
    assert sum(part.tokens for part in parts) == 26_400
    assert [(p.low, p.high) for p in parts[:3]] == [(0, 128), (128, 256), (256, 512)]
    assert parts[0].tokens == 3 * 127
    assert (parts[0].documents, parts[3].documents, parts[-1].documents) == (3, 2, 1)
    assert all(part.perplexity["memory_64"] == pytest.approx(9.0) for part in parts)
    assert all(part.percent["memory_64"] == pytest.approx(-10.0) for part in parts)
