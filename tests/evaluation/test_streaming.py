"""What is scored, what memory holds at that moment, and that rows do not meet."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longmem.evaluation.perplexity import stream_nll, windows
from longmem.progress import Progress
from longmem.types import AttentionKV


class RecordingBank:
    """Remembers, for each row, the token ids whose keys were written; a key here is the token's id."""

    def __init__(self, rows: int) -> None:
        self.held: list[list[int]] = [[] for _ in range(rows)]

    def add(self, kv: AttentionKV, *, rows: Tensor) -> None:
        for b, row in enumerate(rows.tolist()):
            assert torch.equal(kv.keys[b], kv.values[b])
            self.held[row] += kv.keys[b, 0, :, 0].int().tolist()

    def reset(self) -> None:
        self.held = [[] for _ in self.held]


def id_forward(input_ids: Tensor, rows: Tensor, keep: int) -> list[tuple[Tensor, AttentionKV]]:
    """Uniform logits; the keys of a token are its id."""
    keys = input_ids.float()[:, None, :, None].expand(-1, 2, -1, 3)
    return [(torch.zeros(*input_ids.shape, 5000)[:, -keep:], AttentionKV(keys, keys))]


def run(
    forward: Any, documents: Sequence[Tensor], *banks: Any, window: int, stride: int, rows: int = 1
) -> dict[int, np.ndarray]:
    found = stream_nll(forward, banks, documents, Progress(""), window=window, stride=stride, rows=rows)
    return {i: nll[0] for i, nll in found}


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 4), (8, 3), (6, 5)])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_memory_holds_exactly_what_has_left_the_window(window: int, stride: int, rows: int) -> None:
    # ids count up, so that the order of what is written can be read off; no id is 0, the padding
    documents = [torch.arange(1, n + 1) + 1000 * d for d, n in enumerate((40, 23, 7, 9, 31))]
    bank, checked = RecordingBank(rows), list[int]()

    def forward(input_ids: Tensor, rows: Tensor, keep: int) -> list[tuple[Tensor, AttentionKV]]:
        for ids, row in zip(input_ids.tolist(), rows.tolist(), strict=True):
            document = documents[ids[0] // 1000].tolist()
            assert bank.held[row] == document[: document.index(ids[0])]
            checked.append(row)
        return id_forward(input_ids, rows, keep)

    found = run(forward, documents, bank, window=window, stride=stride, rows=rows)
    assert len(found) == len(documents) < len(checked)


@given(st.integers(1, 300), st.integers(2, 40), st.data())
def test_every_position_is_scored_once_and_sees_window_minus_stride_to_window_tokens(
    length: int, window: int, data: st.DataObject
) -> None:
    plan = list(windows(length, window, data.draw(st.integers(1, window), label="stride")))
    assert [i for _, end, scored_from in plan for i in range(scored_from, end)] == list(range(length))
    for (before, *_), (start, end, scored_from) in pairwise(plan):
        for position in range(scored_from, end):
            assert window - (start - before) < position - start + 1 <= window
