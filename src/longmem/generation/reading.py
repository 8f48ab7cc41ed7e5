"""Encode pieces of text and write them to a session.

b pieces encoded together · t tokens of a piece
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from longmem.errors import ConfigError
from longmem.generation.policy import positions
from longmem.types import AttentionKV

TOKENS_AT_ONCE = 8192  # encoded together: enough to keep a device busy, little beside what a forward pass holds
LONGEST_DEFAULT_SEGMENT = 1024  # the paper's window

THIS_TEXT = "(this text)"
"""The document that a text's own earlier part is found under."""


class Writable(Protocol):
    """What is needed of a session."""

    rows: int

    def add(
        self,
        kv: AttentionKV,
        *,
        rows: Tensor | None = None,
        documents: Sequence[str | None] | None = None,
        offsets: Sequence[int] | None = None,
        ids: Sequence[Tensor] | None = None,
    ) -> None: ...

    def end_document(self, rows: Tensor | None = None) -> None: ...


class Followed(Writable, Protocol):
    """A session that knows which text each row is in the middle of."""

    def followed(self, row: int) -> Tensor: ...

    def follow(self, row: int, ids: Tensor) -> None: ...


@dataclass(frozen=True)
class Piece:
    """Tokens that move to memory together.

    Attributes:
        row: of the session.
        ids: (t,) context first, then what is written.
        context: how many of them only lend their context.
        offset: of the first written token in its text.
    """

    row: int
    ids: Tensor
    context: int
    offset: int


@torch.no_grad()
def write(model: Any, session: Writable, pieces: Sequence[Piece], document: str) -> Iterator[int]:
    """Encode and remember pieces, those of one row in the order given; yields the tokens written so far.

    Args:
        model: a LongMem, or anything else with ``encode``.
        session: gets keys and values, and the ids behind them.
        pieces: of whatever rows; neighbours of equal size are encoded together, equal text once.
        document: name that the tokens are found under.
    """
    written = 0
    for batch in _batches(pieces):
        stacked = torch.stack([piece.ids for piece in batch]).to(model.device)
        unique, back = torch.unique(stacked, dim=0, return_inverse=True)
        kv, context = model.encode(unique), batch[0].context
        for first, last in _rounds(batch):
            lines, some = back[first:last], batch[first:last]
            session.add(
                AttentionKV(kv.keys[lines, :, context:], kv.values[lines, :, context:]),
                rows=torch.tensor([piece.row for piece in some]),
                documents=[document] * len(some),
                offsets=[piece.offset for piece in some],
                ids=[piece.ids[context:] for piece in some],
            )
        written += sum(len(piece.ids) - context for piece in batch)
        yield written


def read(
    model: Any,
    session: Writable,
    ids: Tensor,
    *,
    document: str,
    row: int = 0,
    segment: int | None = None,
    overlap: int = 0,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Read a whole text into a session, segment by segment; it is found under its name from then on.

    Args:
        model: a LongMem.
        session: a ``SessionMemory``, or one over a store.
        ids: (t,) the text's tokens.
        document: its name.
        row: of the session.
        segment: tokens encoded together; None is the backbone's window, at most 1024.
        overlap: tokens before each segment that it sees.
        progress: told how many tokens have been read.

    Returns:
        how many tokens were written.

    Raises:
        ConfigError: if segment and overlap together exceed the backbone's positions.
    """
    segment = _segment(model, segment, overlap)
    session.end_document(torch.tensor([row]))
    written = 0
    for written in write(model, session, cut(ids, 0, len(ids), segment, overlap, row), document):
        if progress is not None:
            progress(written)
    session.end_document(torch.tensor([row]))
    return written


def remember(
    model: Any, session: Followed, ids: Tensor, *, row: int = 0, segment: int | None = None, overlap: int = 0
) -> int:
    """Write the rest of a text to its session: what ``generate`` has left in the local window.

    With it the session holds the whole text, and a session over a store can be committed as a whole. ``generate`` may
    go on with the text afterwards; its window then begins with what is new.

    Args:
        model: a LongMem.
        session: that of the text.
        ids: (t,) the whole text's tokens, those that have moved already included.
        row: of the session.
        segment: tokens encoded together, see ``read``.
        overlap: tokens before each segment that it sees.

    Returns:
        how many tokens were written.
    """
    known, only = session.followed(row), torch.tensor([row])
    if not torch.equal(known, ids[: len(known)].cpu()):
        session.end_document(only)
        known = known[:0]
    pieces = cut(ids, len(known), len(ids), _segment(model, segment, overlap), overlap, row)
    written = max(write(model, session, pieces, THIS_TEXT), default=0)
    session.end_document(only)  # so that its last tokens are found, too
    session.follow(row, ids)
    return written


def _segment(model: Any, segment: int | None, overlap: int) -> int:
    limit = positions(model)
    if segment is None:
        segment = min(LONGEST_DEFAULT_SEGMENT, (limit or LONGEST_DEFAULT_SEGMENT) - overlap)
    if segment < 1 or overlap < 0 or (limit is not None and segment + overlap > limit):
        raise ConfigError(f"segment ({segment}) and overlap ({overlap}) must fit the backbone's {limit} positions")
    return segment


def cut(ids: Tensor, begin: int, end: int, size: int, overlap: int, row: int) -> list[Piece]:
    """Tokens ``[begin, end)`` of a text (t,) in pieces of ``size``, the last one perhaps shorter."""
    pieces = []
    for start in range(begin, end, size):
        context = min(overlap, start)
        pieces.append(Piece(row, ids[start - context : min(start + size, end)], context, start))
    return pieces


def _batches(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Neighbours of equal size and context, up to ``TOKENS_AT_ONCE`` tokens."""
    batch: list[Piece] = []
    for piece in pieces:
        alike = batch and (len(piece.ids), piece.context) == (len(batch[0].ids), batch[0].context)
        if batch and (not alike or (len(batch) + 1) * len(piece.ids) > TOKENS_AT_ONCE):
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def _rounds(batch: Sequence[Piece]) -> Iterator[tuple[int, int]]:
    """Runs ``[first, last)`` in which no row comes twice."""
    first, seen = 0, set[int]()
    for place, piece in enumerate(batch):
        if piece.row in seen:
            yield first, place
            first, seen = place, set()
        seen.add(piece.row)
    yield first, len(batch)
