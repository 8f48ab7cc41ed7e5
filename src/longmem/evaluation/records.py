"""Per-document measurements, kept line by line so that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FIRST_BIN = 128  # tokens before the second position bin; each further one is twice as wide
BLOCK = 4096  # tokens of a block, the unit of the second bootstrap


@dataclass(frozen=True)
class Record:
    """One document, one system, one protocol.

    ``key`` names everything the numbers depend on besides the document's ids, which ``digest`` names.
    ``blocks`` and ``positions`` are the same negative log-likelihood (nats) by ``block_bins`` and ``position_bins``.
    ``seconds`` is this system's share of the time from the document before to this one.
    """

    key: str
    digest: str
    document: str
    protocol: str
    system: str
    tokens: int
    nll: float
    blocks: list[float]
    positions: list[float]
    seconds: float = 0.0


def make_record(
    key: str,
    digest: str,
    document: str,
    protocol: str,
    system: str,
    nll: NDArray[np.float64],
    block: int,
    seconds: float = 0.0,
) -> Record:
    """Sum the negative log-likelihoods (n - 1,) of tokens 1 ... n-1."""
    return Record(
        key=key,
        digest=digest,
        document=document,
        protocol=protocol,
        system=system,
        tokens=len(nll),
        nll=float(nll.sum()),
        blocks=np.bincount(block_bins(len(nll), block), weights=nll).tolist(),
        positions=np.bincount(position_bins(len(nll)), weights=nll).tolist(),
        seconds=round(seconds, 4),
    )


def block_bins(scored: int, block: int) -> NDArray[np.int64]:
    """Block of each scored token: ``block`` tokens each, a short rest joined to the block before it."""
    bins = np.arange(scored) // block
    last = max(scored // block - 1, 0) if scored % block < block / 2 else scored // block
    return np.minimum(bins, last).astype(np.int64)


def position_bins(scored: int) -> NDArray[np.int64]:
    """Bin of each scored token by the number of tokens before it: 1-127, 128-255, 256-511, ..."""
    before = np.arange(1, scored + 1)
    bins: NDArray[np.int64] = np.floor(np.log2(np.maximum(before / FIRST_BIN, 0.5)) + 1).astype(np.int64)
    return bins


def bin_edges(index: int) -> tuple[int, int]:
    """Tokens before a token of this position bin: from the first number, below the second."""
    return (0 if index == 0 else FIRST_BIN << (index - 1)), FIRST_BIN << index


class Ledger:
    """Records on disk, one JSON line each; without a path they are kept in memory only."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._records: dict[tuple[str, str], Record] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                record = _parse(line)
                if record is not None:
                    self._records[record.key, record.digest] = record

    def get(self, key: str, digest: str) -> Record | None:
        return self._records.get((key, digest))

    def __getitem__(self, where: tuple[str, str]) -> Record:
        return self._records[where]

    def append(self, record: Record) -> None:
        self._records[record.key, record.digest] = record
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                # the line break in front keeps a line that an interruption cut short from spoiling this one
                file.write(f"\n{json.dumps(asdict(record))}\n")


def _parse(line: str) -> Record | None:
    """A record, or None for a line that was cut short or written by another version."""
    try:
        return Record(**json.loads(line))
    except (ValueError, TypeError):
        return None
