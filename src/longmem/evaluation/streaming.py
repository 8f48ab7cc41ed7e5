"""Run documents through a model as rows of a batch, each from its beginning, its memory its own.

B rows · T window tokens · V vocabulary · Hkv key/value heads · D head_dim · Q systems compared
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longmem.progress import Progress
from longmem.types import AttentionKV

CE_BLOCK = 512  # tokens whose (tokens, V) float32 logits exist at one time

Forward = Callable[[Tensor, Tensor, int], tuple[Sequence[Tensor], AttentionKV | None]]
"""``forward(input_ids (B, T), rows (B,), keep)`` gives, for each of Q systems, the logits of the last ``keep``
positions, (B, keep, V), and the memory layer's keys and values of all T, or None where there is no memory."""


class Window(NamedTuple):
    """Input positions ``[start, end)`` of a document; those from ``scored_from`` are scored, by the token after each.

    Everything before ``start`` has left the window: it is what memory may hold.
    """

    start: int
    scored_from: int
    end: int


def windows(length: int, window: int, stride: int) -> Iterator[Window]:
    """Cover ``length`` input positions so that each is scored exactly once.

    The first window scores all it sees. Each later one starts ``stride`` further on and scores its last ``stride``
    positions, which therefore see ``window - stride`` to ``window`` tokens. ``stride == window`` gives the paper's
    non-overlapping segments.
    """
    start, scored = 0, 0
    while scored < length:
        end = min(start + window, length)
        yield Window(start, scored, end)
        start, scored = start + stride, end


class Subject(NamedTuple):
    """Systems that run together on the same windows, and the memory banks they read, all written alike."""

    forward: Forward
    memories: Sequence[Any] = ()


@dataclass(eq=False)
class _Lane:
    """One row of the batch: a document part way through.

    ``held`` are keys and values (2, Hkv, t, D) of the tokens from ``first`` on that are still inside the window.
    """

    row: int
    document: int
    ids: Tensor  # (n,) on the device; inputs are the first n - 1, targets the last n - 1
    plan: Iterator[Window]
    window: Window
    nll: list[NDArray[np.float64]] = field(default_factory=list)  # one (Q, t) for each window
    held: Tensor | None = None
    first: int = 0


@torch.inference_mode()
def stream_nll(
    subject: Subject,
    documents: Sequence[Tensor],
    *,
    window: int,
    stride: int,
    rows: int,
    names: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Score every token of every document but its first, which nothing precedes.

    Documents are rows of one batch, the longest first; a finished row is reset and given to the next document, so a row
    never reads another document. Rows are padded at their ends, where a causal model cannot look.

    What memory holds when window ``[start, end)`` is scored is exactly the tokens before ``start``. The keys and values
    of a token are computed once, in the window in which the token is scored (so with at least ``window - stride``
    tokens of context, where the document has them), wait in a queue while the token is still in the window, and are
    written when it has left. With ``stride == window`` this is: score a segment, then memorize it.

    Args:
        documents: token ids, each (n,) with n >= 2.
        names: of documents, for the memory's provenance.
        progress: advanced by the tokens that each forward pass scores, each counted once for every system.

    Yields:
        document index and its negative log-likelihoods in nats, (Q, n - 1), in the order in which documents finish.
    """
    waiting = deque(sorted(range(len(documents)), key=lambda i: -len(documents[i])))
    free = list(range(rows))[::-1]
    lanes: list[_Lane] = []
    while waiting or lanes:
        while waiting and free:
            row, document = free.pop(), waiting.popleft()
            for memory in subject.memories:
                memory.reset(rows=torch.tensor([row]))
            plan = windows(len(documents[document]) - 1, window, stride)
            lanes.append(_Lane(row, document, documents[document].to(device), plan, next(plan)))
        _memorize(subject, lanes, names)
        _score(subject, lanes)
        if progress is not None:
            progress.advance(sum(lane.nll[-1].size for lane in lanes))
        for lane in list(lanes):
            following = next(lane.plan, None)
            if following is not None:
                lane.window = following
                continue
            lanes.remove(lane)
            free.append(lane.row)
            yield lane.document, np.concatenate(lane.nll, axis=1)


def _memorize(subject: Subject, lanes: Sequence[_Lane], names: Sequence[str] | None) -> None:
    """Write what has left each row's window; rows that move by the same number of tokens in one call."""
    groups: dict[int, list[_Lane]] = {}
    for lane in lanes:
        if lane.held is not None and lane.window.start > lane.first:
            groups.setdefault(lane.window.start - lane.first, []).append(lane)
    for count, group in groups.items():
        keys, values = torch.stack([lane.held[:, :, :count] for lane in group if lane.held is not None], dim=1)
        for memory in subject.memories:
            memory.add(
                AttentionKV(keys, values),
                rows=torch.tensor([lane.row for lane in group]),
                documents=[names[lane.document] if names else str(lane.document) for lane in group],
                offsets=[lane.first for lane in group],
            )
        for lane in group:
            assert lane.held is not None
            lane.held, lane.first = lane.held[:, :, count:].clone(), lane.window.start


def _score(subject: Subject, lanes: Sequence[_Lane]) -> None:
    width = max(lane.window.end - lane.window.start for lane in lanes)
    input_ids = lanes[0].ids.new_zeros(len(lanes), width)
    for b, lane in enumerate(lanes):
        start, _, end = lane.window
        input_ids[b, : end - start] = lane.ids[start:end]
    skipped = min(lane.window.scored_from - lane.window.start for lane in lanes)
    logits, kv = subject.forward(input_ids, torch.tensor([lane.row for lane in lanes]), width - skipped)
    for b, lane in enumerate(lanes):
        start, scored_from, end = lane.window
        first, last, targets = scored_from - start, end - start, lane.ids[scored_from + 1 : end + 1]
        nll = torch.stack([token_nll(each[b, first - skipped : last - skipped], targets) for each in logits])
        lane.nll.append(nll.double().cpu().numpy())
        if subject.memories and kv is not None:
            new = torch.stack([kv.keys[b, :, first:last], kv.values[b, :, first:last]])
            lane.held = new if lane.held is None else torch.cat([lane.held, new], dim=2)


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target in nats: logits (T, V), targets (T,) -> (T,) float32, a block at a time."""
    pairs = zip(logits.split(CE_BLOCK), targets[:, None].split(CE_BLOCK), strict=True)
    blocks = ((part.float(), wanted) for part, wanted in pairs)
    return torch.cat([part.logsumexp(1) - part.gather(1, wanted)[:, 0] for part, wanted in blocks])
