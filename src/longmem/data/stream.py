"""``SegmentStream``: rows of different texts, each moving on to the next consecutive segment of its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longmem.data.tokens import TokenCorpus
from longmem.data.windows import IGNORE
from longmem.errors import CheckpointError, DataError


@dataclass(frozen=True)
class SegmentBatch:
    """The current segment of every row of this process.

    Attributes:
        ids: (B, T) long, padded behind the end of a document.
        targets: (B, T) long, the next token, also across the segment's end; -100 behind the end of a document.
        mask: (B, T) bool, True at real tokens; None where every token is real.
        documents: (B,) name of each row's text.
        offsets: (B,) token position of the segment in its document.
        starts: (B,) bool, True where a row has just moved on to another text.
        targets_in_all: how many tokens are scored in this step over the rows of all processes.
    """

    ids: Tensor
    targets: Tensor
    mask: Tensor | None
    documents: tuple[str, ...]
    offsets: tuple[int, ...]
    starts: Tensor
    targets_in_all: int


@dataclass(frozen=True)
class _Piece:
    """A text as rows see it: ``corpus.ids[first:last]``, a document or a part of a long one."""

    name: str
    offset: int
    first: int
    last: int


class SegmentStream:
    """Consecutive segments of W*B texts at a time; B of them belong to this process.

    Every process follows all rows (positions only, no tokens), so a row stays with its process and one
    process with W*B rows sees exactly what W processes with B rows see. A row that reaches the end of its text takes
    the next one of a shuffled queue, shuffled anew for every pass.

    Args:
        corpus: the documents.
        window: T, tokens of a segment.
        rows: B, rows of this process, the ``rank``-th of ``world`` (W).
        seed: order of the documents; None keeps theirs.
        piece_tokens: longer documents are dealt out in consecutive pieces of so many tokens, each a text of its own;
            0 keeps documents whole. With fewer texts than rows, documents are cut until every row has one.
        pad_id: fills ``ids`` behind the end of a document.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        window: int,
        rows: int,
        seed: int | None = 1,
        *,
        piece_tokens: int = 0,
        rank: int = 0,
        world: int = 1,
        pad_id: int = 0,
    ) -> None:
        self.corpus, self.window, self.rows, self.seed = corpus, window, rows, seed
        self.rank, self.world, self.pad_id = rank, world, pad_id
        total = rows * world
        self.pieces = _cut(corpus, piece_tokens)
        if len(self.pieces) < total:
            self.pieces = _cut(corpus, max(window, corpus.num_tokens // (2 * total)))
        if len(self.pieces) < total:
            raise DataError(
                f"the corpus has {corpus.num_tokens} tokens, too few for {total} rows of data.window ({window}); "
                "give more text, fewer optim.rows or a smaller window"
            )
        self._order: tuple[int, NDArray[np.int64]] | None = None
        self.taken = 0
        # of every row of every process: which piece, and how far
        self._piece = [self._take() for _ in range(self.rows * self.world)]
        self._done = [0] * len(self._piece)

    def next(self) -> SegmentBatch:
        """The rows' segments; afterwards every row is at its next one."""
        batch = self._batch(range(self.rank * self.rows, (self.rank + 1) * self.rows))
        for lane in range(len(self._piece)):
            self._done[lane] += self.window
            piece = self.pieces[self._piece[lane]]
            # the last token has no next token: it alone makes no segment
            if self._done[lane] >= piece.last - piece.first - 1:
                self._piece[lane], self._done[lane] = self._take(), 0
        return batch

    @property
    def epoch(self) -> float:
        """Texts handed to rows so far, in passes over the corpus."""
        return self.taken / len(self.pieces)

    def state_dict(self) -> dict[str, Any]:
        return {
            "taken": self.taken,
            "piece": list(self._piece),
            "done": list(self._done),
            "corpus": self.corpus.fingerprint,
            "pieces": len(self.pieces),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position."""
        if state["corpus"] != self.corpus.fingerprint or state["pieces"] != len(self.pieces):
            raise CheckpointError(
                f"the saved position is in other text ({state['pieces']} texts, this corpus has {len(self.pieces)}); "
                "resume with the data and tokenizer that the run began with"
            )
        if len(state["piece"]) != len(self._piece):
            raise CheckpointError(
                f"the saved position has {len(state['piece'])} rows, this run has {len(self._piece)}; "
                "keep optim.rows times the number of processes as it was"
            )
        self.taken = int(state["taken"])
        self._piece, self._done = list(state["piece"]), list(state["done"])

    def _batch(self, lanes: Sequence[int]) -> SegmentBatch:
        window = self.window
        ids = np.full((len(lanes), window), self.pad_id, dtype=np.int64)
        targets = np.full((len(lanes), window), IGNORE, dtype=np.int64)
        mask = np.zeros((len(lanes), window), dtype=bool)
        pieces = [self.pieces[self._piece[lane]] for lane in lanes]
        for row, (lane, piece) in enumerate(zip(lanes, pieces, strict=True)):
            start = piece.first + self._done[lane]
            tokens = self.corpus.ids[start : min(start + window + 1, piece.last)]
            here = min(len(tokens), window)
            ids[row, :here] = tokens[:here]
            mask[row, :here] = True
            targets[row, : len(tokens) - 1] = tokens[1:]
        return SegmentBatch(
            ids=torch.from_numpy(ids),
            targets=torch.from_numpy(targets),
            mask=None if mask.all() else torch.from_numpy(mask),
            documents=tuple(piece.name for piece in pieces),
            offsets=tuple(piece.offset + self._done[lane] for lane, piece in zip(lanes, pieces, strict=True)),
            starts=torch.tensor([self._done[lane] == 0 for lane in lanes]),
            targets_in_all=sum(self._targets(lane) for lane in range(len(self._piece))),
        )

    def _targets(self, lane: int) -> int:
        piece = self.pieces[self._piece[lane]]
        return min(self.window, piece.last - piece.first - self._done[lane] - 1)

    def _take(self) -> int:
        """The next text of the queue."""
        epoch, index = divmod(self.taken, len(self.pieces))
        if self._order is None or self._order[0] != epoch:
            count = len(self.pieces)
            order = np.arange(count)
            if self.seed is not None:
                np.random.default_rng([self.seed, epoch]).shuffle(order)
            self._order = (epoch, order)
        self.taken += 1
        return int(self._order[1][index])


def _cut(corpus: TokenCorpus, piece_tokens: int) -> list[_Piece]:
    pieces = []
    for document, name in enumerate(corpus.names):
        first, last = int(corpus.bounds[document]), int(corpus.bounds[document + 1])
        size = last - first
        count = 1 if piece_tokens <= 0 else max(1, round(size / piece_tokens))
        cuts = [first + size * k // count for k in range(count + 1)]
        for start, end in pairwise(cuts):
            if end - start >= 2:  # less has nothing to predict
                label = name if count == 1 else f"{name}@{start - first}"
                pieces.append(_Piece(label, start - first, start, end))
    return pieces
