"""Encode text piece by piece and write it to a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longmem.errors import ConfigError
from longmem.memory.session import SessionMemory
from longmem.types import AttentionKV

TOKENS_AT_ONCE = 8192  # encoded together: enough to keep a device busy, little beside what a forward pass holds
LONGEST_DEFAULT_SEGMENT = 1024  # the paper's window
THIS_TEXT = "(this text)"
"""The document name of a text's own earlier part."""


class Piece(NamedTuple):
    """Tokens (t,) that are encoded together and, but for the first ``context``, written to a row of a session."""

    session: SessionMemory
    row: int
    ids: Tensor
    context: int
    offset: int
    """Place in the text of the first token to write."""


def read(
    model: Any,
    session: SessionMemory,
    ids: Tensor,
    *,
    document: str,
    row: int = 0,
    segment: int | None = None,
    overlap: int = 0,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Read a whole text (t,) into a row of a session, segment by segment; returns how many tokens were written.

    Args:
        document: name of the text in provenances.
        segment: tokens encoded together; None is the backbone's window, at most 1024.
        overlap: tokens before each segment that the segment may attend to.
        progress: called with the number of tokens read so far.
    """
    segment = _segment(model, segment, overlap)
    session.end_document(torch.tensor([row]))
    written = 0
    for written in write(model, cut(session, row, ids, 0, len(ids), segment, overlap), document):
        if progress is not None:
            progress(written)
    session.end_document(torch.tensor([row]))
    return written


def remember(
    model: Any, session: SessionMemory, ids: Tensor, *, row: int = 0, segment: int | None = None, overlap: int = 0
) -> int:
    """Write the part of a text to its session that ``generate`` has left in the local window; returns how many tokens.

    Afterwards the session holds the whole text, so a session over a store can be committed. ``generate`` may go on
    with the text; its window then begins after what is written. ``ids`` (t,) are of the whole text, including the part
    that is in the session already.
    """
    known = already_written(session, row, ids)
    pieces = cut(session, row, ids, known, len(ids), _segment(model, segment, overlap), overlap)
    written = max(write(model, pieces, THIS_TEXT), default=0)
    session.end_document(torch.tensor([row]))  # closes the last chunk, so that it is found although it is not full
    session.follow(row, ids)
    return written


def already_written(session: SessionMemory, row: int, ids: Tensor) -> int:
    """How many tokens of a text (t,) its session holds already; another text ends the one before it."""
    known = session.followed(row)
    if torch.equal(known, ids[: len(known)].cpu()):
        return len(known)
    session.end_document(torch.tensor([row]))
    return 0


@torch.no_grad()
def write(model: Any, pieces: Sequence[Piece], document: str) -> Iterator[int]:
    """Encode and write pieces, those of one row in the order given; yields the number of tokens written so far."""
    written = 0
    for batch in _batches(pieces):
        # several sequences of one prompt bring the same text: it is encoded once
        unique, lines = torch.unique(torch.stack([piece.ids for piece in batch]), dim=0, return_inverse=True)
        kv, context = model.encode(unique.to(model.device)), batch[0].context
        for piece, line in zip(batch, lines.tolist(), strict=True):
            one = slice(line, line + 1)
            piece.session.add(
                AttentionKV(kv.keys[one, :, context:], kv.values[one, :, context:]),
                rows=torch.tensor([piece.row]),
                documents=[document],
                offsets=[piece.offset],
                ids=[piece.ids[context:]],
            )
            written += len(piece.ids) - context
        yield written


def cut(session: SessionMemory, row: int, ids: Tensor, begin: int, end: int, size: int, overlap: int) -> list[Piece]:
    """Tokens ``[begin, end)`` of a text (t,) in pieces of ``size``; the last one may be shorter."""
    pieces = []
    for start in range(begin, end, size):
        context = min(overlap, start)
        pieces.append(Piece(session, row, ids[start - context : min(start + size, end)], context, start))
    return pieces


def positions(model: Any) -> int | None:
    """The longest text that the backbone was made for; None where its architecture knows no limit."""
    config = model.backbone.model.config.get_text_config(decoder=True)
    found = getattr(config, "max_position_embeddings", None)
    return int(found) if isinstance(found, int) and found > 0 else None


def _segment(model: Any, segment: int | None, overlap: int) -> int:
    limit = positions(model)
    if segment is None:
        segment = min(LONGEST_DEFAULT_SEGMENT, (limit or LONGEST_DEFAULT_SEGMENT) - overlap)
    if segment < 1 or overlap < 0 or (limit is not None and segment + overlap > limit):
        raise ConfigError(
            f"segment ({segment}) and overlap ({overlap}) must fit the backbone's {limit} positions; make one smaller"
        )
    return segment


def _batches(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Neighbours of equal size and context, up to ``TOKENS_AT_ONCE`` tokens."""
    for (size, _), alike in groupby(pieces, key=lambda piece: (len(piece.ids), piece.context)):
        while batch := list(islice(alike, max(1, TOKENS_AT_ONCE // size))):
            yield batch
