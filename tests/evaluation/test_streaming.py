"""What is scored, what memory holds at that moment, and that rows do not meet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longmem.evaluation.streaming import Forward, Subject, Window, stream_nll, token_nll, windows
from longmem.types import AttentionKV

V = 64


class RecordingBank:
    """Remembers, for each row, the token ids whose keys were written; a key here is the token's id."""

    def __init__(self, rows: int) -> None:
        self.held: list[list[int]] = [[] for _ in range(rows)]
        self.documents: list[str | None] = [None] * rows
        self.writes = 0

    def add(
        self,
        kv: AttentionKV,
        *,
        rows: Tensor | None = None,
        documents: Sequence[str | None] | None = None,
        offsets: Sequence[int] | None = None,
    ) -> None:
        assert rows is not None
        assert documents is not None
        assert offsets is not None
        assert kv.mask is None
        for b, row in enumerate(rows.tolist()):
            assert offsets[b] == len(self.held[row]), "memory is written in order, without gaps"
            assert self.documents[row] in (None, documents[b])
            self.documents[row] = documents[b]
            assert torch.equal(kv.keys[b], kv.values[b])
            self.held[row] += kv.keys[b, 0, :, 0].int().tolist()
            self.writes += kv.keys.shape[2]

    def reset(self, rows: Tensor | None = None) -> None:
        assert rows is not None
        for row in rows.tolist():
            self.held[row], self.documents[row] = [], None


def id_forward(seen: list[tuple[list[list[int]], list[int]]]) -> Forward:
    """Uniform logits; the keys of a token are its id."""

    def forward(input_ids: Tensor, rows: Tensor, keep: int) -> tuple[list[Tensor], AttentionKV]:
        seen.append((input_ids.tolist(), rows.tolist()))
        keys = input_ids.float()[:, None, :, None].expand(-1, 2, -1, 3)
        return [torch.zeros(*input_ids.shape, 5000)[:, -keep:]], AttentionKV(keys, keys)

    return forward


def some_documents(*lengths: int) -> list[Tensor]:
    """Ids that count up, so that the order of what is written can be read off; no id is 0, the padding."""
    return [torch.arange(1, n + 1) + 1000 * d for d, n in enumerate(lengths)]


def run(subject: Subject, documents: Sequence[Tensor], window: int, stride: int, rows: int) -> dict[int, np.ndarray]:
    return {i: nll[0] for i, nll in stream_nll(subject, documents, window=window, stride=stride, rows=rows)}


def uniform(input_ids: Tensor, rows: Tensor, keep: int) -> tuple[list[Tensor], None]:
    return [torch.full((*input_ids.shape, V), 3.5)[:, -keep:]], None


def bigram(input_ids: Tensor, rows: Tensor, keep: int) -> tuple[list[Tensor], None]:
    """Logits that depend on the last token only: the same under every protocol."""
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(0))
    return [table[input_ids][:, -keep:]], None


def cumulative(input_ids: Tensor, rows: Tensor, keep: int) -> tuple[list[Tensor], None]:
    """Logits that depend on all tokens seen so far."""
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(0))
    return [table[input_ids].cumsum(dim=1)[:, -keep:] / 4], None


@pytest.mark.parametrize("stride", [8, 5, 1])
def test_every_token_is_scored_once_by_the_token_before_it(stride: int) -> None:
    ids = torch.randint(V, (50,), generator=torch.Generator().manual_seed(1))
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(0)).log_softmax(dim=1)
    found = run(Subject(bigram), [ids], window=8, stride=stride, rows=1)
    np.testing.assert_allclose(found[0], -table[ids[:-1], ids[1:]].numpy(), rtol=1e-5)


def test_sliding_window_by_hand() -> None:
    ids = torch.tensor([5, 1, 4, 2, 3, 7, 6])
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(0))
    found = run(Subject(cumulative), [ids], window=4, stride=2, rows=1)[0]
    # targets 1..4 are scored in window [0, 4), targets 5 and 6 in window [2, 6)
    for target, start in zip(range(1, 7), (0, 0, 0, 0, 2, 2), strict=True):
        logits = table[ids[start:target]].sum(dim=0) / 4
        assert found[target - 1] == pytest.approx(-logits.log_softmax(0)[ids[target]].item(), rel=1e-5)


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 4), (8, 3), (6, 5)])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_memory_holds_exactly_what_has_left_the_window(window: int, stride: int, rows: int) -> None:
    documents = some_documents(40, 23, 7, 9, 31)
    bank, checked = RecordingBank(rows), 0
    inner = id_forward([])

    def forward(input_ids: Tensor, rows: Tensor, keep: int) -> tuple[list[Tensor], AttentionKV | None]:
        nonlocal checked
        for ids, row in zip(input_ids.tolist(), rows.tolist(), strict=True):
            document = documents[ids[0] // 1000].tolist()
            assert bank.held[row] == document[: document.index(ids[0])]
            checked += 1
        return inner(input_ids, rows, keep)

    assert len(run(Subject(forward, [bank]), documents, window, stride, rows)) == len(documents)
    assert checked > len(documents)


def test_keys_are_those_of_the_window_in_which_a_token_was_scored() -> None:
    bank = RecordingBank(1)
    passes = 0

    def forward(input_ids: Tensor, rows: Tensor, keep: int) -> tuple[list[Tensor], AttentionKV]:
        nonlocal passes
        keys = torch.full((1, 1, input_ids.shape[1], 1), float(passes))
        passes += 1
        return [torch.zeros(*input_ids.shape, V)[:, -keep:]], AttentionKV(keys, keys)

    run(Subject(forward, [bank]), [torch.arange(14) % V], window=4, stride=2, rows=1)
    # inputs 0..12; window 0 scores four, each further one two; the last window [10, 13) still holds 10, 11, 12
    assert bank.held[0] == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_only_the_logits_of_new_tokens_are_asked_for() -> None:
    kept: list[int] = []

    def forward(input_ids: Tensor, rows: Tensor, keep: int) -> tuple[list[Tensor], None]:
        kept.append(keep)
        return uniform(input_ids, rows, keep)

    run(Subject(forward), [torch.arange(14) % V], window=4, stride=2, rows=1)
    assert kept == [4, 2, 2, 2, 2, 1]


def test_nll_in_blocks_equals_cross_entropy() -> None:
    logits = torch.randn(1100, 11, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(1100) % 11
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(token_nll(logits, targets), expected)


@given(st.integers(1, 300), st.integers(2, 40), st.data())
def test_every_position_is_scored_exactly_once(length: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    scored = [i for w in windows(length, window, stride) for i in range(w.scored_from, w.end)]
    assert scored == list(range(length))


@given(st.integers(1, 300), st.integers(2, 40), st.data())
def test_after_the_first_window_every_token_sees_window_minus_stride_to_window_tokens(
    length: int, window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window))
    for w in list(windows(length, window, stride))[1:]:
        for position in range(w.scored_from, w.end):
            assert window - stride < position - w.start + 1 <= window


def test_segments_and_a_half_overlapping_window_by_hand() -> None:
    assert list(windows(10, 4, 4)) == [Window(0, 0, 4), Window(4, 4, 8), Window(8, 8, 10)]
    assert list(windows(7, 4, 2)) == [Window(0, 0, 4), Window(2, 4, 6), Window(4, 6, 7)]
