"""Run documents through a model as rows of a batch, each from its beginning, its memory its own.

B rows · T window tokens · V vocabulary · Hkv key/value heads · D head_dim · Q systems compared
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

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


@dataclass(frozen=True)
class Window:
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


@dataclass(frozen=True)
class Subject:
    """Systems that run together on the same windows, and the memories they read, all written alike.

    ``memories`` have ``add`` and ``reset`` of a ``MemoryBank``.
    """

    forward: Forward
    memories: Sequence[Any] = ()


@dataclass(eq=False)
class _Lane:
    """One row of the batch: a document part way through.

    ``held`` are keys and values (2, Hkv, t, D) of the tokens from ``first`` on that are still inside the window. Each
    token's are those of the window in which it was scored; they are written when the window has moved past the token.
    """

    row: int
    document: int
    ids: Tensor  # (n,) on the device; inputs are the first n - 1, targets the last n - 1
    plan: Iterator[Window]
    window: Window
    nll: list[NDArray[np.float64]] = field(default_factory=list)  # one (Q, t) for each window
    held: Tensor | None = None
    first: int = 0

    def advance(self) -> bool:
        following = next(self.plan, None)
        self.window = following or self.window
        return following is not None

    def left_window(self) -> tuple[int, Tensor] | None:
        """Take what lies before the window's start: first token, keys and values (2, Hkv, t, D)."""
        first, count = self.first, self.window.start - self.first
        if self.held is None or count == 0:
            return None
        gone, self.held = self.held[:, :, :count], self.held[:, :, count:].clone()
        self.first = self.window.start
        return first, gone


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
        subject: the systems, and their memories of at least ``rows`` rows each.
        documents: token ids, each (n,) with n >= 2.
        window: tokens the model sees at once.
        stride: how far the window moves; ``window`` itself for non-overlapping segments.
        rows: documents in one batch.
        names: document names for the memory's provenance.
        device: where the model is.
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
        finished = [lane for lane in lanes if not lane.advance()]
        for lane in finished:
            lanes.remove(lane)
            free.append(lane.row)
            yield lane.document, np.concatenate(lane.nll, axis=1)


def _memorize(subject: Subject, lanes: Sequence[_Lane], names: Sequence[str] | None) -> None:
    """Write what has left each row's window; rows that move by the same number of tokens in one call."""
    groups: dict[int, list[tuple[_Lane, int, Tensor]]] = {}
    for lane in lanes:
        gone = lane.left_window()
        if gone is not None:
            groups.setdefault(gone[1].shape[2], []).append((lane, *gone))
    for group in groups.values():
        keys, values = torch.stack([kv for *_, kv in group], dim=1)
        for memory in subject.memories:
            memory.add(
                AttentionKV(keys, values),
                rows=torch.tensor([lane.row for lane, *_ in group]),
                documents=[names[lane.document] if names else str(lane.document) for lane, *_ in group],
                offsets=[first for _, first, _ in group],
            )


def _score(subject: Subject, lanes: Sequence[_Lane]) -> None:
    spans = [lane.window for lane in lanes]
    width = max(span.end - span.start for span in spans)
    input_ids = lanes[0].ids.new_zeros(len(lanes), width)
    for b, (lane, span) in enumerate(zip(lanes, spans, strict=True)):
        input_ids[b, : span.end - span.start] = lane.ids[span.start : span.end]
    keep = width - min(span.scored_from - span.start for span in spans)
    logits, kv = subject.forward(input_ids, torch.tensor([lane.row for lane in lanes]), keep)
    skipped = width - keep
    for b, (lane, span) in enumerate(zip(lanes, spans, strict=True)):
        first, last = span.scored_from - span.start, span.end - span.start
        targets = lane.ids[span.scored_from + 1 : span.end + 1]
        nll = torch.stack([token_nll(each[b, first - skipped : last - skipped], targets) for each in logits])
        lane.nll.append(nll.double().cpu().numpy())
        if subject.memories and kv is not None:
            new = torch.stack([kv.keys[b, :, first:last], kv.values[b, :, first:last]])
            lane.held = new if lane.held is None else torch.cat([lane.held, new], dim=2)


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target in nats: logits (T, V), targets (T,) -> (T,) float32, a block at a time."""
    parts = []
    for at in range(0, len(targets), CE_BLOCK):
        block = logits[at : at + CE_BLOCK].float()
        chosen = block.gather(1, targets[at : at + CE_BLOCK, None]).squeeze(1)
        parts.append(block.logsumexp(dim=1) - chosen)
    return torch.cat(parts)
