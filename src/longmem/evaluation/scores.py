"""From the negative log-likelihoods of documents to the perplexities that are reported.

N documents. All perplexities are of the pooled tokens, exp(sum nll / sum tokens): long documents count by their length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longmem.evaluation.bootstrap import Bootstrap, relative_difference
from longmem.evaluation.documents import TokenizedDocument

Floats = NDArray[np.float64]
Json = dict[str, Any]
Pairs = Sequence[tuple[str, str]]
"""The differences wanted, (system, against)."""

BLOCK = 4096  # tokens of a block, the unit of the second bootstrap
FIRST_BIN = 128  # tokens before the second position bin; each further one is twice as wide
LENGTH_BUCKETS: tuple[tuple[str, float, float], ...] = (
    ("<5k", 0, 5_000),
    ("5k-10k", 5_000, 10_000),
    ("10k-100k", 10_000, 100_000),
    ("100k-500k", 100_000, 500_000),
    ("500k-1M", 500_000, 1_000_000),
    (">1M", 1_000_000, math.inf),
)
"""The paper's PG-22 buckets (tokens of a document), and what lies outside them."""


def record(nll: Floats, block: int, seconds: float = 0.0) -> Json:
    """One document, one system, one protocol, from the negative log-likelihoods (n - 1,) of tokens 1 ... n-1 in nats.

    ``blocks`` and ``positions`` are their sums by ``block_bins`` and ``position_bins``. ``seconds`` is this system's
    share of the time from the document before to this one.
    """
    return {
        "tokens": len(nll),
        "nll": float(nll.sum()),
        "blocks": np.bincount(block_bins(len(nll), block), weights=nll).tolist(),
        "positions": np.bincount(position_bins(len(nll)), weights=nll).tolist(),
        "seconds": round(seconds, 4),
    }


Table = Mapping[str, Sequence[Json]]
"""System name -> one record for each document, in the documents' order; the backbone's comes first."""


def protocol_scores(
    protocol: str,
    window: int,
    stride: int,
    documents: Sequence[TokenizedDocument],
    table: Table,
    pairs: Pairs,
    bootstrap: Bootstrap,
    block: int,
) -> Json:
    """``scores`` of ``all`` documents, of each group of them (``groups``), and of each length (``by_length``)."""

    def subsets(name: str, wanted: Callable[[TokenizedDocument], bool]) -> list[Json]:
        """One, or none where no document is wanted."""
        which = [i for i, document in enumerate(documents) if wanted(document)]
        part = {system: [records[i] for i in which] for system, records in table.items()}
        return [scores(name, [documents[i] for i in which], part, pairs, bootstrap, block)] if which else []

    groups = sorted({document.group for document in documents if document.group is not None})
    return {
        "protocol": protocol,
        "window": window,
        "stride": stride,
        "all": scores("all", documents, table, pairs, bootstrap, block),
        "groups": [part for group in groups for part in subsets(group, lambda d, group=group: d.group == group)],  # type: ignore[misc]
        "by_length": [
            part
            for name, low, high in LENGTH_BUCKETS
            for part in subsets(name, lambda d, low=low, high=high: low <= d.scored + 1 < high)  # type: ignore[misc]
        ],
    }


def scores(
    name: str,
    documents: Sequence[TokenizedDocument],
    table: Table,
    pairs: Pairs,
    bootstrap: Bootstrap,
    block: int,
) -> Json:
    """Everything about one set of documents.

    Returns:
        ``systems``: perplexities, and the interval of the token perplexity. ``differences``: token perplexity of
        ``system`` relative to that of ``against`` in ``percent``, below zero is better; the interval over ``documents``
        says how sure that is for new documents and draws projects, then documents; that over ``blocks`` of all
        documents is narrower, for more of this text, and None where no document has more than one. ``by_position``:
        tokens with ``low`` to ``high - 1`` tokens before them.
    """
    tokens = np.array([document.scored for document in documents], dtype=float)
    words, size = sum(d.words for d in documents), sum(d.bytes for d in documents)
    projects = [document.project or document.id for document in documents]
    nll = {system: np.array([record["nll"] for record in records]) for system, records in table.items()}
    blocks = {system: np.concatenate([record["blocks"] for record in records]) for system, records in table.items()}
    block_tokens = np.concatenate([np.bincount(block_bins(d.scored, block)) for d in documents]).astype(float)
    several = len(block_tokens) > len(documents)  # else the second interval would be the first one again
    interval, of_blocks = bootstrap.relative_difference, f"blocks of {block} tokens"
    return {
        "name": name,
        "documents": len(documents),
        "projects": len(set(projects)),
        "tokens": int(tokens.sum()),
        "words": words,
        "bytes": size,
        "systems": [
            {
                "system": system,
                "perplexity": _exp(values.sum() / tokens.sum()),
                "word_perplexity": _exp(values.sum() / words) if words else math.nan,
                "bits_per_byte": float(values.sum() / size / math.log(2)) if size else math.nan,
                "nll": float(values.sum()),
                "interval": bootstrap.perplexity(values, tokens, "documents", projects),
            }
            for system, values in nll.items()
        ],
        "differences": [
            {
                "system": system,
                "against": against,
                "percent": relative_difference(nll[system], nll[against], tokens),
                "documents": interval(nll[system], nll[against], tokens, "documents", projects),
                "blocks": interval(blocks[system], blocks[against], block_tokens, of_blocks) if several else None,
            }
            for system, against in pairs
        ],
        "by_position": list(_positions(documents, table)),
    }


def _positions(documents: Sequence[TokenizedDocument], table: Table) -> Iterator[Json]:
    """Perplexity, and % relative to the first system's, in every position bin that any document reaches."""
    counts = [np.bincount(position_bins(document.scored)) for document in documents]
    baseline = next(iter(table))
    for index in range(max(map(len, counts))):
        reached = [i for i, count in enumerate(counts) if index < len(count)]
        tokens = sum(int(counts[i][index]) for i in reached)
        sums = {name: sum(records[i]["positions"][index] for i in reached) for name, records in table.items()}
        low, high = bin_edges(index)
        yield {
            "low": low,
            "high": high,
            "documents": len(reached),
            "tokens": tokens,
            "perplexity": {name: _exp(value / tokens) for name, value in sums.items()},
            "percent": {name: float(100 * np.expm1((v - sums[baseline]) / tokens)) for name, v in sums.items()},
        }


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


def _exp(value: float) -> float:
    """exp, infinite where it overflows (word perplexities of text without spaces)."""
    return math.exp(value) if value < 700 else math.inf
