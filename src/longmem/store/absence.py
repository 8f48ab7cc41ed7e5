"""Telling that something is gone, knowing only hashes of it.

A report of forgetting holds a hash of every stored chunk record, and hashes of *windows*: stretches of 64 bytes, one
behind the other, of the token ids and the text as the catalog keeps them. Whatever run of at least 127 of these bytes
were left anywhere in a file, it would hold a whole window. To find windows at any offset, a cheap rolling hash is
compared first and a keyed BLAKE2b decides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from longmem.store.precision import RECORD_DIGEST
from longmem.store.schema import TextRow

WINDOW = 64
_FACTOR = 0x9E3779B97F4A7C15  # odd: it has an inverse modulo 2^64
_INVERSE = pow(_FACTOR, -1, 1 << 64)


def windows_of(row: TextRow) -> list[bytes]:
    """The windows of a content: of its token ids, and of its text; what is shorter than one is its own window."""
    stretches = [row.token_ids] if row.text is None else [row.token_ids, row.text.encode()]
    return [window for stretch in stretches for window in cut_windows(stretch)]


def cut_windows(stretch: bytes) -> list[bytes]:
    """Windows one behind the other; a rest at the end that is shorter belongs to none, unless it is all there is."""
    if len(stretch) < WINDOW:
        return [stretch] if stretch else []
    return [stretch[start : start + WINDOW] for start in range(0, len(stretch) - WINDOW + 1, WINDOW)]


def hashed(windows: Iterable[bytes], key: bytes) -> dict[str, str]:
    """Windows as hashes: by length, 4 bytes of the rolling hash and 8 of the keyed one for each, hex."""
    by_length: dict[int, list[bytes]] = {}
    for window in windows:
        by_length.setdefault(len(window), []).append(window)
    return {
        str(length): b"".join(
            int(each).to_bytes(4, "little") + _keyed(window, key)
            for each, window in zip(_rolling_of(group, length), group, strict=True)
        ).hex()
        for length, group in by_length.items()
    }


class Sought:
    """Hashed windows, to be looked for in bytes.

    Args:
        parts: as ``hashed`` gives them.
        key: of the keyed hashes.
    """

    def __init__(self, parts: Iterable[dict[str, str]], key: bytes) -> None:
        self._key = key
        keyed: dict[int, set[bytes]] = {}
        cheap: dict[int, list[NDArray[np.uint32]]] = {}
        for part in parts:
            for length, text in part.items():
                table = np.frombuffer(bytes.fromhex(text), dtype=[("cheap", "<u4"), ("keyed", "V8")])
                cheap.setdefault(int(length), []).append(table["cheap"])
                keyed.setdefault(int(length), set()).update(each.tobytes() for each in table["keyed"])
        self._keyed = keyed
        self._cheap = {length: np.unique(np.concatenate(tables)) for length, tables in cheap.items()}

    @property
    def longest(self) -> int:
        """Bytes of the longest window; 0 where there is none."""
        return max(self._keyed, default=0)

    def without(self, windows: Iterable[bytes]) -> int:
        """Look no longer for these; how many of them were sought."""
        gone = 0
        for window in windows:
            group = self._keyed.get(len(window))
            if group:
                digest = _keyed(window, self._key)
                gone += digest in group
                group.discard(digest)
        return gone

    def find(self, data: bytes) -> list[int]:
        """Offsets at which one of the windows stands."""
        found: list[int] = []
        raw = np.frombuffer(data, dtype=np.uint8)
        for length, group in self._keyed.items():
            if group and len(raw) >= length:
                candidates = np.flatnonzero(np.isin(_rolling(raw, length), self._cheap[length]))
                found.extend(
                    int(at) for at in candidates if _keyed(data[int(at) : int(at) + length], self._key) in group
                )
        return sorted(found)


def records_of(text: str) -> Iterator[bytes]:
    """The hashes of a report's chunk records."""
    data = bytes.fromhex(text)
    return (data[start : start + RECORD_DIGEST] for start in range(0, len(data), RECORD_DIGEST))


def _keyed(window: bytes, key: bytes) -> bytes:
    return hashlib.blake2b(window, digest_size=8, key=key).digest()


def _rolling_of(group: list[bytes], length: int) -> NDArray[np.uint32]:
    """The rolling hash of each of these windows."""
    table = np.frombuffer(b"".join(group), dtype=np.uint8).reshape(len(group), length)
    weighted = (table.astype(np.uint64) + np.uint64(1)) * _powers(_FACTOR, length)
    values: NDArray[np.uint64] = weighted.sum(axis=1, dtype=np.uint64)
    return (values >> np.uint64(32)).astype(np.uint32)


def _rolling(raw: NDArray[np.uint8], length: int) -> NDArray[np.uint32]:
    """A hash of 4 bytes of every stretch of ``length`` bytes of ``raw``, modulo 2^64 on the way."""
    powers = _powers(_FACTOR, len(raw) + 1)
    sums = np.zeros(len(raw) + 1, dtype=np.uint64)
    np.cumsum((raw.astype(np.uint64) + np.uint64(1)) * powers[:-1], out=sums[1:])
    count = len(raw) - length + 1
    values = (sums[length:] - sums[:count]) * _powers(_INVERSE, count)
    return (values >> np.uint64(32)).astype(np.uint32)


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    """base^0, base^1, ... modulo 2^64."""
    powers = np.full(count, base, dtype=np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)
