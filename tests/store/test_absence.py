"""Windows are found at any offset by their hashes, and nothing else is."""

from __future__ import annotations

import random

import pytest

from longmem.store.absence import WINDOW, Sought, cut_windows, hashed

KEY = b"a key of 16 byte"


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.mark.parametrize("size", [16, 20, 31, 32, 40, 63, 64, 65, 127, 128, 500])
def test_what_is_left_is_found_at_any_offset(size: int) -> None:
    secret = noise(1, size)
    sought = Sought([hashed(cut_windows(secret), KEY)], KEY)
    for offset in (0, 1, 13, 4000):
        assert sought.find(noise(2, offset) + secret + noise(3, 77))[0] == offset
    assert sought.find(noise(4, 200_000)) == []
    assert sought.longest == max(width for width in (16, 32, WINDOW) if width <= size)


def test_any_run_of_127_bytes_holds_a_whole_window() -> None:
    secret = noise(1, 1000)
    sought = Sought([hashed(cut_windows(secret), KEY)], KEY)
    for start in range(1000 - 127 - 40):
        assert sought.find(b"x" + secret[start : start + 127] + b"y")


def test_stretches_too_short_to_be_told_from_chance_have_no_window() -> None:
    assert cut_windows(b"") == cut_windows(b"fifteen bytes..") == []


def test_what_may_be_there_is_looked_for_no_longer() -> None:
    secret, other = noise(1, 640), noise(2, 640)
    sought = Sought([hashed(cut_windows(secret), KEY), hashed(cut_windows(other), KEY)], KEY)
    sought.excuse(b"living text " + secret + b" goes on")
    assert sought.find(noise(3, 50) + secret) == [] and len(sought.find(noise(3, 50) + other)) == 10


def test_hashes_depend_on_the_key_and_hold_no_text() -> None:
    first, second = hashed(cut_windows(b"some text " * 20), KEY), hashed(cut_windows(b"some text " * 20), b"another")
    assert first.keys() == second.keys() == {"64"} and first != second
    assert Sought([first], b"another").find(b"some text " * 20) == []
    assert Sought([], KEY).find(b"anything") == [] and Sought([], KEY).longest == 0
