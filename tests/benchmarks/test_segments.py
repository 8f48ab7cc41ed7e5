"""What benches of perplexity share: the ids they read, the segments they take, the loss of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks import segments


def test_so_many_documents_are_read_and_so_many_tokens_of_each(tmp_path: Path, byte_tokenizer: Any) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(name * 50)
    found = segments.token_ids(byte_tokenizer, [str(tmp_path)], documents=2, tokens=40)
    assert [len(ids) for ids in found] == [40, 40]
    assert [byte_tokenizer.decode(ids[-1:]) for ids in found] == ["a", "b"]


def test_what_fills_no_segment_is_dropped() -> None:
    parts = list(segments.whole_segments(torch.arange(11), 4))
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert not list(segments.whole_segments(torch.arange(3), 4))


def test_the_loss_is_of_every_token_but_the_first() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(1, 6, 9), torch.randint(9, (6,))
    assert segments.segment_loss(logits, ids) == pytest.approx(
        float(cross_entropy(logits[0, :-1], ids[1:], reduction="sum"))
    )
