"""Perplexity of long documents with and without memory, under two protocols.

Every document is streamed from its beginning and memory is empty when it starts. ``segments``, the paper's protocol,
cuts it into consecutive windows; memory holds all earlier ones. It flatters every memory, because the backbone loses
the context just before each segment. ``sliding`` moves the window by ``stride``, as a user of the backbone would; only
tokens that have left the window are in memory. ``streaming.stream_nll`` says exactly when keys and values are written.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from longmem.errors import ConfigError
from longmem.evaluation.bootstrap import Bootstrap
from longmem.evaluation.documents import TokenizedDocument
from longmem.evaluation.results import Ledger, RunHeader, as_json
from longmem.evaluation.scores import BLOCK, Json, protocol_scores, record
from longmem.evaluation.streaming import stream_nll
from longmem.evaluation.systems import Comparison, System
from longmem.progress import Progress

PROTOCOLS = ("segments", "sliding")
RECORDS_VERSION = 1  # part of every record's key; raised when a record's meaning changes


@dataclass(frozen=True)
class PerplexitySettings:
    """How documents are streamed and intervals drawn.

    Args:
        window: tokens the model sees at once.
        stride: how far the sliding window moves; None is half the window.
        protocols: which protocols to run.
        rows: documents in one batch.
        block: tokens of a block for the block bootstrap.
        bootstrap: resamples, level and seed.

    Raises:
        ConfigError: lists every setting that breaks a rule.
    """

    window: int
    stride: int | None = None
    protocols: tuple[str, ...] = PROTOCOLS
    rows: int = 8
    block: int = BLOCK
    bootstrap: Bootstrap = field(default_factory=Bootstrap)

    def __post_init__(self) -> None:
        problems = [f"rows ({self.rows}) must be at least 1"] if self.rows < 1 else []
        if self.stride is not None and not 1 <= self.stride <= self.window:
            problems.append(
                f"stride ({self.stride}) must be between 1 and the window ({self.window}); try {self.window // 2}"
            )
        unknown = [name for name in self.protocols if name not in PROTOCOLS]
        if unknown or not self.protocols:
            problems.append(f"protocols ({', '.join(unknown) or 'none'}) must be among {', '.join(PROTOCOLS)}")
        if problems:
            raise ConfigError(problems)

    def stride_of(self, protocol: str) -> int:
        """Segments are a window that moves by its whole width."""
        return self.window if protocol == "segments" else (self.stride or self.window // 2)


def perplexity(
    comparison: Comparison,
    documents: Sequence[TokenizedDocument],
    settings: PerplexitySettings,
    *,
    device: str = "cpu",
    records: Path | None = None,
    command: str = "",
    config: dict[str, Any] | None = None,
    quiet: bool = False,
) -> Json:
    """Measure every system on every document under every protocol.

    Args:
        comparison: the systems, see ``Comparison.of_longmem`` and ``Comparison.of_backbone``.
        documents: from ``tokenize_documents``.
        settings: window, stride, protocols, rows, bootstrap.
        device: where the models are.
        records: JSONL file of finished documents; what it already holds is not measured again.
        command: as typed, kept in the result.
        config: what else the result should say about its making (paths, dtype).
        quiet: report no progress.

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
        samples={
            "documents": len(documents),
            "projects": len({document.project or document.id for document in documents}),
            "tokens": sum(document.scored for document in documents),
            "words": sum(document.words for document in documents),
            "bytes": sum(document.bytes for document in documents),
        },
        seeds=[settings.bootstrap.seed],
        seconds=round(sum(r["seconds"] for table in tables.values() for some in table.values() for r in some), 1),
    )
    how, (window, block) = (comparison.pairs, settings.bootstrap), (settings.window, settings.block)
    result: Json = {
        "header": header,
        "systems": {system.name: system.label for system in comparison.systems},
        "protocols": {
            protocol: protocol_scores(protocol, window, settings.stride_of(protocol), documents, table, *how, block)
            for protocol, table in tables.items()
        },
        "documents": [
            {name: getattr(document, name) for name in ("id", "group", "project", "words", "bytes", "digest")}
            | {
                "tokens": document.scored,
                "nll": {p: {name: some[i]["nll"] for name, some in table.items()} for p, table in tables.items()},
            }
            for i, document in enumerate(documents)
        ],
    }
    plain: Json = as_json(result)
    return plain


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

    Documents that lack the same systems are streamed together, and those systems run together where they can.
    """
    keys = {system.name: record_key(system, settings, protocol) for system in comparison.systems}
    most = min(settings.rows, len(documents))
    jobs: dict[tuple[str, ...], list[TokenizedDocument]] = {}
    for document in documents:
        missing = [name for name, key in keys.items() if ledger.get(key, document.digest) is None]
        for run in comparison.passes(missing, most, settings.window):
            jobs.setdefault(run, []).append(document)
    total = sum(len(names) * document.scored for names, some in jobs.items() for document in some)
    with Progress(f"perplexity, {protocol}", total, "tokens, all systems", quiet=quiet) as progress:
        for names, some in jobs.items():
            rows, began = min(settings.rows, len(some)), time.monotonic()
            systems = [system for system in comparison.systems if system.name in names]
            for i, nll in stream_nll(
                comparison.prepare(systems, rows, max(document.scored for document in some)),
                [document.ids for document in some],
                window=settings.window,
                stride=settings.stride_of(protocol),
                rows=rows,
                names=[document.id for document in some],
                device=device,
                progress=progress,
            ):
                now = time.monotonic()
                each, began = (now - began) / len(names), now
                for name, of_system in zip(names, nll, strict=True):
                    about = {"document": some[i].id, "protocol": protocol, "system": name}
                    ledger.append(keys[name], some[i].digest, **about, **record(of_system, settings.block, each))
    return {name: [ledger.records[key, document.digest] for document in documents] for name, key in keys.items()}


def record_key(system: System, settings: PerplexitySettings, protocol: str) -> str:
    """Hash of everything that a document's numbers depend on besides its ids."""
    parts = {
        "version": RECORDS_VERSION,
        "system": system.name,
        "identity": system.identity,
        "protocol": protocol,
        "window": settings.window,
        "stride": settings.stride_of(protocol),
        "block": settings.block,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
