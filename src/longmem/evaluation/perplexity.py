"""Perplexity of long documents with and without memory, under two protocols.

Every document is streamed from its beginning and memory is empty when it starts. ``segments``, the paper's protocol,
cuts it into consecutive windows; memory holds all earlier ones. It flatters every memory, because the backbone loses
the context just before each segment. ``sliding`` moves the window by ``stride``, as a user of the backbone would; only
tokens that have left the window are in memory.

All perplexities are of the pooled tokens, exp(sum nll / sum tokens): long documents count by their length.

B rows · T window tokens · V vocabulary · Hkv key/value heads · D head_dim · Q systems that run together
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from longmem.data.tokens import TokenizedDocument
from longmem.errors import ConfigError
from longmem.evaluation.asking import Asker
from longmem.evaluation.results import Bootstrap, Floats, Json, Ledger, header, percent, perplexity_of
from longmem.evaluation.systems import compared
from longmem.memory import MemoryBank
from longmem.modeling.reading import Reading
from longmem.progress import Progress
from longmem.types import AttentionKV

RECORDS_VERSION = 1  # part of every record's key; raised when a record's meaning changes
EDGES = (0, *(128 << n for n in range(40)))  # tokens before the first one of each position bin: 0, 128, 256, 512, ...
AT_ONE_TIME = 512  # tokens whose (tokens, V) float32 logits exist
LENGTHS = (0, 5_000, 10_000, 100_000, 500_000, 1_000_000, math.inf)
LENGTH_NAMES = ("<5k", "5k-10k", "10k-100k", "100k-500k", "500k-1M", ">1M")
"""The paper's PG-22 buckets (tokens of a document), and what is outside them."""

Records = Mapping[str, Sequence[Json]]
"""System name -> one record for each document, in the documents' order; the backbone's comes first."""


@dataclass(frozen=True)
class PerplexitySettings:
    """How documents are streamed and intervals drawn.

    Attributes:
        stride: how far the sliding window moves; None is half the window.
        block: tokens of a block, the unit of the second bootstrap.
    """

    stride: int | None = None
    protocols: tuple[str, ...] = ("segments", "sliding")
    block: int = 4096
    bootstrap: Bootstrap = field(default_factory=Bootstrap)

    def stride_of(self, protocol: str, window: int) -> int:
        """Segments are a window that moves by its whole width."""
        return {"segments": window, "sliding": self.stride or window // 2}[protocol]


def perplexity(
    systems: Sequence[Asker],
    documents: Sequence[TokenizedDocument],
    settings: PerplexitySettings,
    *,
    records: Path | None = None,
    config: Json | None = None,
) -> Json:
    """Measure every system on every document under every protocol.

    Args:
        systems: the first, in general the backbone alone, is what others are compared with at every position. Longer
            windows than its own are moved by their half.
        records: JSONL file of finished documents; what it already holds is not measured again.
        config: what else the result should say about its making (paths, dtype).

    Raises:
        ConfigError: the stride is longer than the window.

    Returns:
        the JSON of the result file: ``header``, ``systems`` (name -> label), ``protocols`` (``protocol``, ``window``,
        ``stride``, and what ``scores_of_parts`` returns), ``documents`` with their ``nll[protocol][system]`` in nats.
    """
    window, stride = systems[0].window, settings.stride
    if stride is not None and not 1 <= stride <= window:
        raise ConfigError(f"stride ({stride}) must be between 1 and the window ({window}); try {window // 2}")
    ledger, tables = Ledger(records), {protocol: dict[str, list[Json]]() for protocol in settings.protocols}
    for size, some in groupby(systems, lambda system: system.window):
        together, how = list(some), settings if size == window else replace(settings, stride=None)
        for protocol, table in tables.items():
            table |= measure(together, documents, how, protocol, ledger)
    labels = {system.name: system.label for system in systems}
    pairs = compared(list(labels))
    about = ("id", "group", "project", "words", "bytes", "digest")
    return {
        "header": header(
            "perplexity",
            config=asdict(settings) | {"window": window, "rows": systems[0].rows} | (config or {}),
            models={system.name: _described(system) for system in systems},
            samples={"documents": len(documents), **_counts(documents)},
            seeds=[settings.bootstrap.seed],
            seconds=sum(each["seconds"] for table in tables.values() for some in table.values() for each in some),
        ),
        "systems": labels,
        "protocols": {
            protocol: {"protocol": protocol, "window": window, "stride": settings.stride_of(protocol, window)}
            | scores_of_parts(documents, table, pairs, settings)
            for protocol, table in tables.items()
        },
        "documents": [
            {name: getattr(document, name) for name in about}
            | {
                "tokens": document.scored,
                "nll": {p: {name: some[i]["nll"] for name, some in table.items()} for p, table in tables.items()},
            }
            for i, document in enumerate(documents)
        ],
    }


def _described(system: Asker) -> Json:
    """Identity and number of parameters, for the header of a result."""
    found = system.identity | {"parameters": sum(p.numel() for p in system.model.parameters())}
    if hasattr(system.model, "sidenet"):
        found["trained_parameters"] = sum(p.numel() for p in system.model.trainable_parameters())
    return found


def measure(
    systems: Sequence[Asker],
    documents: Sequence[TokenizedDocument],
    settings: PerplexitySettings,
    protocol: str,
    ledger: Ledger,
) -> dict[str, list[Json]]:
    """Systems of one window under one protocol: a record for each document, from the ledger where it is there."""
    window, rows = systems[0].window, systems[0].rows
    stride = settings.stride_of(protocol, window)
    about = {"version": RECORDS_VERSION, "protocol": protocol, "window": window, "stride": stride}
    keys = {}
    for system in systems:  # hashes of everything that a document's numbers depend on besides its ids
        parts = about | {"block": settings.block, "system": system.name, "identity": system.identity}
        keys[system.name] = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    lacking = [(name, d) for name, key in keys.items() for d in documents if (key, d.digest) not in ledger.records]
    names = list(dict.fromkeys(name for name, _ in lacking))
    some = list({document.digest: document for _, document in lacking}.values())
    total = len(names) * sum(document.scored for document in some)
    with Progress(f"perplexity, {protocol}", total, "tokens, all systems") as progress:
        rows, began = max(1, min(rows, len(some))), time.monotonic()
        asked = [system for system in systems if system.name in names]
        ids = [document.ids.to(systems[0].model.device) for document in some]
        for i, nll in stream_nll(asked, ids, progress, stride=stride, rows=rows):
            now = time.monotonic()
            each, began = (now - began) / len(names), now
            for name, of_system in zip(names, nll, strict=True):
                said = {"document": some[i].id, "protocol": protocol, "system": name}
                ledger.append(keys[name], some[i].digest, **said, **record(of_system, settings.block, each))
    return {name: [ledger.records[key, document.digest] for document in documents] for name, key in keys.items()}


# streaming


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Cover ``length`` input positions so that each is scored exactly once, by the token after it.

    The first window scores all it sees, each later one its last ``stride`` positions.

    Yields:
        start, end, and the first position between them that is scored. Memory may hold all before the start.
    """
    start, scored = 0, 0
    while scored < length:
        end = min(start + window, length)
        yield start, end, scored
        start, scored = start + stride, end


@torch.inference_mode()
def stream_nll(
    systems: Sequence[Asker], documents: Sequence[Tensor], progress: Progress, *, stride: int, rows: int
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Score every token of every document but its first, which nothing precedes.

    Documents of about the same length are rows of one batch, whose windows move together; a row never reads another.
    Rows are padded at their ends, where a causal model cannot look.

    What memory holds when window ``[start, end)`` is scored is exactly the tokens before ``start``. The keys and values
    of a token are computed once, in the window in which the token is scored (so with at least ``window - stride``
    tokens of context, where the document has them), wait while the token is still in the window, and are written when
    it has left. With ``stride == window`` this is: score a segment, then memorize it.

    Args:
        systems: Q of them, of one window.
        documents: token ids on the device, each (n,) with n >= 2: inputs are the first n - 1, targets the last n - 1.
        progress: advanced by the tokens that each forward pass scores, each counted once for every system.

    Yields:
        document index and its negative log-likelihoods in nats, (Q, n - 1), in the order in which documents finish.
    """
    memories = [system.bank(rows, max(map(len, documents), default=1) - 1) for system in systems]
    banks = {number: memory for number, memory in enumerate(memories) if memory is not None}
    longest_first = sorted(range(len(documents)), key=lambda i: -len(documents[i]))
    for first in range(0, len(documents), rows):
        batch = longest_first[first : first + rows]
        lengths = [len(documents[i]) - 1 for i in batch]
        for memory in banks.values():
            memory.reset()
        found = [list[Tensor]() for _ in batch]  # of each document, (Q, t) for each window
        waiting: dict[int, Tensor] = {}  # by system, keys and values (2, B, Hkv, t, D) of what is still in the window
        for start, end, scored_from in windows(lengths[0], systems[0].window, stride):
            going_on = torch.arange(sum(length > scored_from for length in lengths))  # the longest, so the first rows
            for number, states in waiting.items():
                states = states[:, : len(going_on)]
                banks[number].add(AttentionKV(*states[:, :, :, :stride]), rows=going_on)
                waiting[number] = states[:, :, :, stride:]
            ids = [documents[i] for i in batch[: len(going_on)]]
            inputs = pad_sequence([each[:-1][start:end] for each in ids], batch_first=True)
            targets = [each[scored_from + 1 : end + 1] for each in ids]
            nll: list[list[Tensor]] = [[] for _ in ids]
            for number, (logits, kv) in enumerate(_run(systems, memories, inputs, going_on, end - scored_from)):
                for of_row, scored, wanted in zip(nll, logits, targets, strict=True):
                    of_row.append(_nll(scored[: len(wanted)], wanted))
                if number in banks and kv is not None:
                    states = torch.stack([each[:, :, scored_from - start :] for each in (kv.keys, kv.values)])
                    waiting[number] = torch.cat([waiting[number], states], dim=3) if number in waiting else states
            for row, of_row in enumerate(nll):
                found[row].append(torch.stack(of_row).double().cpu())
                progress.advance(found[row][-1].numel())
                if lengths[row] <= end:
                    yield batch[row], torch.cat(found[row], dim=1).numpy()


def _run(
    systems: Sequence[Asker], memories: Sequence[MemoryBank | None], input_ids: Tensor, rows: Tensor, keep: int
) -> Iterator[tuple[Tensor, AttentionKV | None]]:
    """Each system over ids (B, T), with these ``rows`` (B,) of its memory: the logits of the last ``keep`` positions,
    (B, keep, V), and the memory layers' keys and values of all T, or None where there is no memory.

    The backbone and its SideNets share one pass of it.
    """
    # through the backbone of the last SideNet: memories are written from this pass, and a control, which comes before
    # them, may remember other layers
    backbone = next((each.model.backbone for each in reversed(systems) if hasattr(each.model, "sidenet")), None)
    run: Any = None
    for system, memory in zip(systems, memories, strict=True):
        model, shares = system.model, hasattr(system.model, "sidenet")
        if backbone is not None and (shares or model is backbone.model):
            run = run or backbone.run(input_ids, use_cache=False)
            state = run.output.last_hidden_state
            if shares:
                run.reading = Reading.of(model, memory, rows, explain=False)
                state = model.read(run)
            logits: Any = backbone.head(state, run, logits_to_keep=keep).logits
            yield logits[:, -keep:], None if memory is None else run.kv(None)
        else:  # one with memory reads in its own layers
            reads = {"memory": memory, "memory_rows": rows} if hasattr(model, "memory_layers") else {}
            out = model(input_ids=input_ids, logits_to_keep=keep, use_cache=False, **reads)
            yield out.logits[:, -keep:], getattr(out, "kv", None)


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target in nats: logits (T, V), targets (T,) -> (T,) float32."""
    blocks = zip(logits.split(AT_ONE_TIME), targets[:, None].split(AT_ONE_TIME), strict=True)
    return torch.cat([part.float().logsumexp(1) - part.float().gather(1, wanted)[:, 0] for part, wanted in blocks])


# from log-likelihoods to scores


def record(nll: Floats, block: int, seconds: float = 0.0) -> Json:
    """One document, one system, one protocol, from the negative log-likelihoods (n - 1,) of tokens 1 ... n-1 in nats.

    ``blocks`` and ``positions`` are their sums by ``block_bins`` and ``position_bins``.
    """
    return {
        "tokens": len(nll),
        "nll": float(nll.sum()),
        "blocks": np.bincount(block_bins(len(nll), block), weights=nll).tolist(),
        "positions": np.bincount(position_bins(len(nll)), weights=nll).tolist(),
        "seconds": round(seconds, 4),
    }


def scores_of_parts(
    documents: Sequence[TokenizedDocument],
    table: Records,
    pairs: Sequence[tuple[str, str]],
    settings: PerplexitySettings,
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
        "all": part("all", range(len(documents))),
        "groups": [part(name, groups[name]) for name in sorted(groups)],
        "by_length": [part(name, which) for name, which in lengths.items() if which],
    }


def scores(
    name: str,
    documents: Sequence[TokenizedDocument],
    table: Records,
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
    projects = [document.project for document in documents]
    nll = {system: np.array([record["nll"] for record in records]) for system, records in table.items()}
    blocks = {system: np.concatenate([record["blocks"] for record in records]) for system, records in table.items()}
    block_tokens = np.concatenate([np.bincount(block_bins(d.scored, block)) for d in documents]).astype(float)
    several = len(block_tokens) > len(documents)  # else the second interval would be the first one again

    units, differences = f"blocks of {block} tokens", []
    for system, against in pairs:
        gaps, of_blocks = nll[system] - nll[against], blocks[system] - blocks[against]
        differences.append(
            {
                "system": system,
                "against": against,
                "percent": float(percent(gaps.sum() / tokens.sum())),
                "documents": interval(gaps, tokens, "documents", projects, percent),
                "blocks": interval(of_blocks, block_tokens, units, of=percent) if several else None,
            }
        )
    return {
        "name": name,
        "documents": len(documents),
        **counts,
        "systems": [
            {
                "system": system,
                "perplexity": perplexity_of(values.sum() / tokens.sum()),
                "word_perplexity": perplexity_of(values.sum() / words),
                "bits_per_byte": float(values.sum() / size / math.log(2)),
                "nll": float(values.sum()),
                "interval": interval(values, tokens, "documents", projects, np.exp),
            }
            for system, values in nll.items()
        ],
        "differences": differences,
        "by_position": _positions(documents, table),
    }


def _counts(documents: Sequence[TokenizedDocument]) -> dict[str, int]:
    return {
        "projects": len({document.project for document in documents}),
        "tokens": sum(document.scored for document in documents),
        "words": sum(document.words for document in documents),
        "bytes": sum(document.bytes for document in documents),
    }


def _positions(documents: Sequence[TokenizedDocument], table: Records) -> list[Json]:
    """Of every position bin that any document reaches."""
    tokens = [np.bincount(position_bins(document.scored)) for document in documents]
    sums = {name: _summed([record["positions"] for record in records]) for name, records in table.items()}
    baseline = next(iter(sums.values()))
    return [
        {
            "low": EDGES[index],
            "high": EDGES[index + 1],
            "documents": sum(len(each) > index for each in tokens),
            "tokens": int(count),
            "perplexity": {name: perplexity_of(values[index] / count) for name, values in sums.items()},
            "percent": {
                name: float(percent((values[index] - baseline[index]) / count)) for name, values in sums.items()
            },
        }
        for index, count in enumerate(_summed(tokens))
    ]


def _summed(rows: Iterable[Iterable[float]]) -> list[float]:
    """The sum of every column; some rows are shorter."""
    return [sum(column) for column in zip_longest(*rows, fillvalue=0)]


def block_bins(scored: int, block: int) -> NDArray[np.int64]:
    """Block of each scored token: ``block`` tokens each, a short rest joined to the block before it."""
    last = max(scored // block - 1, 0) if scored % block < block / 2 else scored // block
    return np.minimum(np.arange(scored) // block, last)


def position_bins(scored: int) -> NDArray[np.int64]:
    """Bin of each scored token by the number of tokens before it, see ``EDGES``."""
    return np.searchsorted(EDGES, np.arange(1, scored + 1), "right") - 1
