"""From per-document records to the numbers that are reported.

N documents. All perplexities are of the pooled tokens, exp(sum nll / sum tokens): long documents count by their length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longmem.evaluation.bootstrap import Bootstrap, Interval, relative_difference
from longmem.evaluation.documents import TokenizedDocument
from longmem.evaluation.records import Record, bin_edges, block_bins, position_bins

Floats = NDArray[np.float64]

LENGTH_BUCKETS: tuple[tuple[str, float, float], ...] = (
    ("<5k", 0, 5_000),
    ("5k-10k", 5_000, 10_000),
    ("10k-100k", 10_000, 100_000),
    ("100k-500k", 100_000, 500_000),
    ("500k-1M", 500_000, 1_000_000),
    (">1M", 1_000_000, math.inf),
)
"""The paper's PG-22 buckets (tokens of a document), and what lies outside them."""


@dataclass(frozen=True)
class SystemScore:
    """One model on one set of documents; ``interval`` is of the token perplexity, over documents."""

    system: str
    perplexity: float
    word_perplexity: float
    bits_per_byte: float
    nll: float
    interval: Interval | None


@dataclass(frozen=True)
class Difference:
    """Token perplexity of ``system`` relative to that of ``against``, in %: below zero is better.

    ``documents`` says how sure the difference is for new documents. ``blocks`` resamples blocks of all documents as if
    each were its own: narrower, for text like this, and of use where there are only a few documents.
    """

    system: str
    against: str
    percent: float
    documents: Interval | None
    blocks: Interval | None


@dataclass(frozen=True)
class PositionScore:
    """Tokens with ``low`` to ``high - 1`` tokens before them: perplexity by system, and % relative to the backbone."""

    low: int
    high: int
    documents: int
    tokens: int
    perplexity: dict[str, float]
    percent: dict[str, float]


@dataclass(frozen=True)
class Scores:
    """Everything about one set of documents (all, a group, or a length bucket)."""

    name: str
    documents: int
    tokens: int
    words: int
    bytes: int
    systems: list[SystemScore]
    differences: list[Difference]
    by_position: list[PositionScore]

    def system(self, name: str) -> SystemScore:
        return next(score for score in self.systems if score.system == name)

    def difference(self, name: str, against: str) -> Difference | None:
        return next((d for d in self.differences if (d.system, d.against) == (name, against)), None)


@dataclass(frozen=True)
class ProtocolScores:
    """One protocol: all documents together, group by group, and by length."""

    protocol: str
    window: int
    stride: int
    all: Scores
    groups: list[Scores]
    by_length: list[Scores]


Table = Mapping[str, Sequence[Record]]
"""System name -> one record for each document, in the documents' order; the backbone's comes first."""


def protocol_scores(
    protocol: str,
    window: int,
    stride: int,
    documents: Sequence[TokenizedDocument],
    table: Table,
    pairs: Sequence[tuple[str, str]],
    bootstrap: Bootstrap,
    block: int,
) -> ProtocolScores:
    """Score all documents, each group of them, and each length bucket that has any."""

    def subset(name: str, chosen: Callable[[TokenizedDocument], bool]) -> Scores | None:
        which = [i for i, document in enumerate(documents) if chosen(document)]
        if not which:
            return None
        part = {system: [records[i] for i in which] for system, records in table.items()}
        return scores(name, [documents[i] for i in which], part, pairs, bootstrap, block)

    everything = subset("all", lambda document: True)
    assert everything is not None
    groups = sorted({document.group for document in documents if document.group is not None})
    by_group = [subset(group, lambda document, group=group: document.group == group) for group in groups]  # type: ignore[misc]
    by_length = [
        subset(name, lambda document, low=low, high=high: low <= document.scored + 1 < high)  # type: ignore[misc]
        for name, low, high in LENGTH_BUCKETS
    ]
    return ProtocolScores(
        protocol=protocol,
        window=window,
        stride=stride,
        all=everything,
        groups=[part for part in by_group if part is not None],
        by_length=[part for part in by_length if part is not None],
    )


def scores(
    name: str,
    documents: Sequence[TokenizedDocument],
    table: Table,
    pairs: Sequence[tuple[str, str]],
    bootstrap: Bootstrap,
    block: int,
) -> Scores:
    """Score one set of documents; ``pairs`` are the differences wanted, (system, against)."""
    tokens = np.array([document.scored for document in documents], dtype=float)
    words, size = sum(d.words for d in documents), sum(d.bytes for d in documents)
    nll = {system: np.array([record.nll for record in records]) for system, records in table.items()}
    blocks = {system: np.concatenate([record.blocks for record in records]) for system, records in table.items()}
    block_tokens = np.concatenate([np.bincount(block_bins(d.scored, block)) for d in documents]).astype(float)
    return Scores(
        name=name,
        documents=len(documents),
        tokens=int(tokens.sum()),
        words=words,
        bytes=size,
        systems=[
            SystemScore(
                system=system,
                perplexity=_exp(values.sum() / tokens.sum()),
                word_perplexity=_exp(values.sum() / words) if words else math.nan,
                bits_per_byte=float(values.sum() / size / math.log(2)) if size else math.nan,
                nll=float(values.sum()),
                interval=bootstrap.perplexity(values, tokens, "documents"),
            )
            for system, values in nll.items()
        ],
        differences=[
            Difference(
                system=system,
                against=against,
                percent=relative_difference(nll[system], nll[against], tokens),
                documents=bootstrap.relative_difference(nll[system], nll[against], tokens, "documents"),
                blocks=bootstrap.relative_difference(
                    blocks[system], blocks[against], block_tokens, f"blocks of {block} tokens"
                ),
            )
            for system, against in pairs
        ],
        by_position=_by_position(documents, table),
    )


def _by_position(documents: Sequence[TokenizedDocument], table: Table) -> list[PositionScore]:
    counts = [np.bincount(position_bins(document.scored)) for document in documents]
    tokens = _add_up(counts)
    summed = {system: _add_up([np.array(r.positions) for r in records]) for system, records in table.items()}
    base = next(iter(summed.values()))
    return [
        PositionScore(
            low=bin_edges(i)[0],
            high=bin_edges(i)[1],
            documents=sum(len(count) > i for count in counts),
            tokens=int(tokens[i]),
            perplexity={system: _exp(nll[i] / tokens[i]) for system, nll in summed.items()},
            percent={system: float(100 * np.expm1((nll[i] - base[i]) / tokens[i])) for system, nll in summed.items()},
        )
        for i in range(len(tokens))
    ]


def _add_up(rows: Sequence[NDArray[np.float64] | NDArray[np.int64]]) -> Floats:
    """Sum of rows of unequal length, the shorter ones continued by zeros."""
    total = np.zeros(max(len(row) for row in rows))
    for row in rows:
        total[: len(row)] += row
    return total


def _exp(value: float) -> float:
    """exp, infinite where it overflows (word perplexities of text without spaces)."""
    return math.exp(value) if value < 700 else math.inf
