"""Which tokens each pass sees and scores."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from longmem.evaluation.windows import Window, windows


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


def test_a_document_that_fits_is_one_window_in_both_protocols() -> None:
    assert list(windows(4, 4, 4)) == list(windows(4, 4, 2)) == [Window(0, 0, 4)]
