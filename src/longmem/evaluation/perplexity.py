"""Perplexity of long documents with and without memory, under two protocols.

Every document is streamed from its beginning and memory is empty when it starts. ``segments``, the paper's protocol,
cuts it into consecutive windows; memory holds all earlier ones. It flatters every memory, because the backbone loses
the context just before each segment. ``sliding`` moves the window by ``stride``, as a user of the backbone would; only
tokens that have left the window are in memory. ``systems.stream_nll`` says exactly when keys and values are written.

All perplexities are of the pooled tokens, exp(sum nll / sum tokens): long documents count by their length.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longmem.errors import ConfigError
from longmem.evaluation.loading import TokenizedDocument
from longmem.evaluation.results import Bootstrap, Floats, Json, Ledger, RunHeader, as_json, percent
from longmem.evaluation.systems import Comparison, compared, stream_nll
from longmem.progress import Progress

RECORDS_VERSION = 1  # part of every record's key; raised when a record's meaning changes
BLOCK = 4096  # tokens of a block, the unit of the second bootstrap
FIRST_BIN = 128  # tokens before the second position bin; each further one is twice as wide
LENGTHS = (0, 5_000, 10_000, 100_000, 500_000, 1_000_000, math.inf)
LENGTH_NAMES = ("<5k", "5k-10k", "10k-100k", "100k-500k", "500k-1M", ">1M")
"""The paper's PG-22 buckets (tokens of a document), and what is outside them."""

Table = Mapping[str, Sequence[Json]]
"""System name -> one record for each document, in the documents' order; the backbone's comes first."""


@dataclass(frozen=True)
class PerplexitySettings:
    """How documents are streamed and intervals drawn.

    Attributes:
        window: tokens the model sees at once.
        stride: how far the sliding window moves; None is half the window.
        rows: documents in one batch.
        block: tokens of a block for the block bootstrap.

    Raises:
        ConfigError: the stride is longer than the window.
    """

    window: int
    stride: int | None = None
    protocols: tuple[str, ...] = ("segments", "sliding")
    rows: int = 8
    block: int = BLOCK
    bootstrap: Bootstrap = field(default_factory=Bootstrap)

    def __post_init__(self) -> None:
        if self.stride is not None and not 1 <= self.stride <= self.window:
            raise ConfigError(
                f"stride ({self.stride}) must be between 1 and the window ({self.window}); try {self.window // 2}"
            )

    def stride_of(self, protocol: str) -> int:
        """Segments are a window that moves by its whole width."""
        return {"segments": self.window, "sliding": self.stride or self.window // 2}[protocol]


def perplexity(
    comparison: Comparison,
    documents: Sequence[TokenizedDocument],
    settings: PerplexitySettings,
    *,
    device: str = "cpu",
    records: Path | None = None,
    command: str = "",
    config: Json | None = None,
    quiet: bool = False,
) -> Json:
    """Measure every system on every document under every protocol.

    Args:
        records: JSONL file of finished documents; what it already holds is not measured again.
        command: as typed, kept in the result.
        config: what else the result should say about its making (paths, dtype).

    Returns:
        the JSON of the result file: ``header``, ``systems`` (name -> label), ``protocols`` (see ``protocol_scores``),
        ``documents`` with their negative log-likelihood in nats, ``nll[protocol][system]``.
    """
    ledger = Ledger(records)
    tables = {
        protocol: measure(comparison, documents, settings, protocol, ledger, device=device, quiet=quiet)
        for protocol in settings.protocols
    }
    header = RunHeader(
        task="perplexity",
        command=command,
        config=asdict(settings) | (config or {}),
        models=comparison.described(),
        samples={"documents": len(documents), **_counts(documents)},
        seeds=[settings.bootstrap.seed],
        seconds=round(sum(r["seconds"] for table in tables.values() for some in table.values() for r in some), 1),
    )
    systems = {system.name: system.label for system in comparison.systems}
    pairs = compared(list(systems))
    about = ("id", "group", "project", "words", "bytes", "digest")
    result: Json = as_json(
        {
            "header": header,
            "systems": systems,
            "protocols": {p: protocol_scores(p, settings, documents, table, pairs) for p, table in tables.items()},
            "documents": [
                {name: getattr(document, name) for name in about}
                | {
                    "tokens": document.scored,
                    "nll": {p: {name: some[i]["nll"] for name, some in table.items()} for p, table in tables.items()},
                }
                for i, document in enumerate(documents)
            ],
        }
    )
    return result


def measure(
    comparison: Comparison,
    documents: Sequence[TokenizedDocument],
    settings: PerplexitySettings,
    protocol: str,
    ledger: Ledger,
    *,
    device: str = "cpu",
    quiet: bool = False,
) -> dict[str, list[Json]]:
    """Every system under one protocol: a record for each document, taken from the ledger where it is there.

    Documents that lack the same systems are streamed together.
    """
    window, stride = settings.window, settings.stride_of(protocol)
    about = {"version": RECORDS_VERSION, "protocol": protocol, "window": window, "stride": stride}
    keys = {}
    for system in comparison.systems:  # hashes of everything that a document's numbers depend on besides its ids
        parts = about | {"block": settings.block, "system": system.name, "identity": system.identity}
        keys[system.name] = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    jobs: dict[tuple[str, ...], list[TokenizedDocument]] = {}
    for document in documents:
        missing = tuple(name for name, key in keys.items() if ledger.get(key, document.digest) is None)
        if missing:
            jobs.setdefault(missing, []).append(document)
    total = sum(len(names) * document.scored for names, some in jobs.items() for document in some)
    with Progress(f"perplexity, {protocol}", total, "tokens, all systems", quiet=quiet) as progress:
        for names, some in jobs.items():
            rows, began = min(settings.rows, len(some)), time.monotonic()
            forward, memories = comparison.prepare(names, rows, max(document.scored for document in some))
            for i, nll in stream_nll(
                forward,
                memories,
                [document.ids for document in some],
                window=window,
                stride=stride,
                rows=rows,
                names=[document.id for document in some],
                device=device,
                progress=progress,
            ):
                now = time.monotonic()
                each, began = (now - began) / len(names), now
                for name, of_system in zip(names, nll, strict=True):
                    said = {"document": some[i].id, "protocol": protocol, "system": name}
                    ledger.append(keys[name], some[i].digest, **said, **record(of_system, settings.block, each))
    return {name: [ledger.records[key, document.digest] for document in documents] for name, key in keys.items()}


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


def protocol_scores(
    protocol: str,
    settings: PerplexitySettings,
    documents: Sequence[TokenizedDocument],
    table: Table,
    pairs: Sequence[tuple[str, str]],
) -> Json:
    """``scores`` of ``all`` documents, of each group of them (``groups``), and of each length (``by_length``)."""

    def part(name: str, which: Sequence[int]) -> Json:
        some = {system: [records[i] for i in which] for system, records in table.items()}
        return scores(name, [documents[i] for i in which], some, pairs, settings)

    groups: dict[str, list[int]] = {}
    lengths: dict[str, list[int]] = {name: [] for name in LENGTH_NAMES}
    for i, document in enumerate(documents):
        lengths[LENGTH_NAMES[int(np.searchsorted(LENGTHS, len(document.ids), "right")) - 1]].append(i)
        if document.group is not None:
            groups.setdefault(document.group, []).append(i)
    return {
        "protocol": protocol,
        "window": settings.window,
        "stride": settings.stride_of(protocol),
        "all": part("all", range(len(documents))),
        "groups": [part(name, groups[name]) for name in sorted(groups)],
        "by_length": [part(name, which) for name, which in lengths.items() if which],
    }


def scores(
    name: str,
    documents: Sequence[TokenizedDocument],
    table: Table,
    pairs: Sequence[tuple[str, str]],
    settings: PerplexitySettings,
) -> Json:
    """Everything about one set of documents.

    Returns:
        ``systems``: perplexities, and the interval of the token perplexity. ``differences``, one for each (system,
        against) of ``pairs``: token perplexity of ``system`` relative to that of ``against`` in ``percent``, below zero
        is better; the interval over ``documents`` says how sure that is for new documents and draws projects, then
        documents; that over ``blocks`` of all documents is narrower, for more of this text, and None where no document
        has more than one. ``by_position``: tokens with ``low`` to ``high - 1`` tokens before them; perplexities, and %
        relative to the first system.
    """
    counts, interval, block = _counts(documents), settings.bootstrap.interval, settings.block
    words, size = counts["words"] or math.nan, counts["bytes"] or math.nan
    tokens = np.array([document.scored for document in documents], dtype=float)
    projects = [document.project or document.id for document in documents]
    nll = {system: np.array([record["nll"] for record in records]) for system, records in table.items()}
    blocks = {system: np.concatenate([record["blocks"] for record in records]) for system, records in table.items()}
    block_tokens = np.concatenate([np.bincount(block_bins(d.scored, block)) for d in documents]).astype(float)
    several = len(block_tokens) > len(documents)  # else the second interval would be the first one again
    return {
        "name": name,
        "documents": len(documents),
        **counts,
        "systems": [
            {
                "system": system,
                "perplexity": _exp(values.sum() / tokens.sum()),
                "word_perplexity": _exp(values.sum() / words),
                "bits_per_byte": float(values.sum() / size / math.log(2)),
                "nll": float(values.sum()),
                "interval": interval(values, tokens, "documents", projects, np.exp),
            }
            for system, values in nll.items()
        ],
        "differences": [
            {
                "system": system,
                "against": against,
                "percent": float(percent((nll[system] - nll[against]).sum() / tokens.sum())),
                "documents": interval(nll[system] - nll[against], tokens, "documents", projects, percent),
                "blocks": interval(
                    blocks[system] - blocks[against], block_tokens, f"blocks of {block} tokens", of=percent
                )
                if several
                else None,
            }
            for system, against in pairs
        ],
        "by_position": _positions(documents, table),
    }


def _counts(documents: Sequence[TokenizedDocument]) -> dict[str, int]:
    return {
        "projects": len({document.project or document.id for document in documents}),
        "tokens": sum(document.scored for document in documents),
        "words": sum(document.words for document in documents),
        "bytes": sum(document.bytes for document in documents),
    }


def _positions(documents: Sequence[TokenizedDocument], table: Table) -> list[Json]:
    """Of every position bin that any document reaches."""
    counts = _stacked([np.bincount(position_bins(document.scored)) for document in documents])
    sums = {name: _stacked([record["positions"] for record in records]).sum(0) for name, records in table.items()}
    baseline = next(iter(sums.values()))
    return [
        {
            "low": bin_edges(index)[0],
            "high": bin_edges(index)[1],
            "documents": int((counts[:, index] > 0).sum()),
            "tokens": int(tokens),
            "perplexity": {name: _exp(values[index] / tokens) for name, values in sums.items()},
            "percent": {
                name: float(percent((values[index] - baseline[index]) / tokens)) for name, values in sums.items()
            },
        }
        for index, tokens in enumerate(counts.sum(0))
    ]


def _stacked(rows: Sequence[Sequence[float] | NDArray[Any]]) -> Floats:
    """Rows of several lengths as one array, zeros behind the short ones."""
    found = np.zeros((len(rows), max(map(len, rows))))
    for at, row in enumerate(rows):
        found[at, : len(row)] = row
    return found


def block_bins(scored: int, block: int) -> NDArray[np.int64]:
    """Block of each scored token: ``block`` tokens each, a short rest joined to the block before it."""
    last = max(scored // block - 1, 0) if scored % block < block / 2 else scored // block
    return np.minimum(np.arange(scored) // block, last)


def position_bins(scored: int) -> NDArray[np.int64]:
    """Bin of each scored token by the number of tokens before it: 1-127, 128-255, 256-511, ..."""
    before = np.arange(1, scored + 1)
    return np.floor(np.log2(np.maximum(before / FIRST_BIN, 0.5)) + 1).astype(np.int64)  # type: ignore[no-any-return]


def bin_edges(index: int) -> tuple[int, int]:
    """Tokens before a token of this position bin: from the first number, below the second."""
    return (0 if index == 0 else FIRST_BIN << (index - 1)), FIRST_BIN << index


def _exp(value: float) -> float:
    """exp, infinite where it overflows (word perplexities of text without spaces)."""
    return math.exp(value) if not value >= 700 else math.inf
