"""What rows are fed: ``SegmentStream``, consecutive segments of texts, and ``WindowSampler``, windows in random order.

B rows of this process, W processes · T tokens of a segment or window
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longmem.data.tokens import TokenCorpus
from longmem.errors import CheckpointError, DataError

IGNORE = -100
_ORDER, _PRACTICE = 1, 2


class SegmentBatch(NamedTuple):
    """The current segment of every row of this process.

    Attributes:
        ids: (B, T) long, padded behind the end of a document.
        targets: (B, T) long, the next token, also across the segment's end; -100 behind the end of a document.
        mask: (B, T) bool, True at real tokens; None where every token is real.
        documents: (B,) name of each row's text.
        offsets: (B,) token position of the segment in its document.
        starts: (B,) bool, True where a row has just moved on to another text.
    """

    ids: Tensor
    targets: Tensor
    mask: Tensor | None
    documents: tuple[str, ...]
    offsets: tuple[int, ...]
    starts: Tensor


class Piece(NamedTuple):
    """A text as rows see it: ``corpus.ids[first:last]``, a document or, from its token ``offset`` on, a part of it."""

    name: str
    offset: int
    first: int
    last: int


@dataclass(eq=False)
class SegmentStream:
    """Consecutive segments of W*B texts at a time; B of them belong to this process.

    Every process follows all rows (positions only, no tokens), so a row stays with its process and one
    process with W*B rows sees exactly what W processes with B rows see. A row that reaches the end of its text takes
    the next one of a shuffled queue, shuffled anew for every pass.

    Args:
        rows: B, of this process, the ``rank``-th of ``world`` (W).
        seed: order of the documents; None keeps theirs.
        piece_tokens: longer documents are dealt out in consecutive pieces of so many tokens, each a text of its own;
            0 keeps documents whole. With fewer texts than rows, documents are cut until every row has one.
        pad_id: fills ``ids`` behind the end of a document.
    """

    corpus: TokenCorpus
    window: int
    rows: int
    seed: int | None = 1
    _: KW_ONLY
    piece_tokens: int = 0
    rank: int = 0
    world: int = 1
    pad_id: int = 0

    def __post_init__(self) -> None:
        total, tokens = self.rows * self.world, self.corpus.num_tokens
        self._mine = slice(self.rank * self.rows, (self.rank + 1) * self.rows)
        self.pieces = _cut(self.corpus, self.piece_tokens)
        if len(self.pieces) < total:
            self.pieces = _cut(self.corpus, max(self.window, tokens // (2 * total)))
        if len(self.pieces) < total:
            raise DataError(
                f"the corpus has {tokens} tokens, too few for {total} rows of data.window ({self.window}); "
                "give more text, fewer optim.rows or a smaller window"
            )
        self.taken = 0
        # of every row of every process: which piece, and how far
        self._piece = [self._take() for _ in range(total)]
        self._done = [0] * total

    def next(self) -> SegmentBatch:
        """The rows' segments; afterwards every row is at its next one."""
        lanes = [(self.pieces[piece], done) for piece, done in zip(self._piece, self._done, strict=True)]
        batch = self._batch(lanes[self._mine])
        for lane, (piece, done) in enumerate(lanes):
            self._done[lane] = done + self.window
            # the last token has no next token: it alone makes no segment
            if self._done[lane] >= piece.last - piece.first - 1:
                self._piece[lane], self._done[lane] = self._take(), 0
        return batch

    @property
    def epoch(self) -> float:
        """Texts handed to rows so far, in passes over the corpus."""
        return self.taken / len(self.pieces)

    def state_dict(self) -> dict[str, Any]:
        """The place in the text, of all rows."""
        return {
            "taken": self.taken, "piece": list(self._piece), "done": list(self._done),
            "corpus": self.corpus.fingerprint, "pieces": len(self.pieces),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved place."""
        _refuse_other_text(state, self.corpus)
        self.taken, self._piece, self._done = int(state["taken"]), list(state["piece"]), list(state["done"])

    def _batch(self, lanes: list[tuple[Piece, int]]) -> SegmentBatch:
        shape = (len(lanes), self.window)
        ids, targets = torch.full(shape, self.pad_id), torch.full(shape, IGNORE)
        mask = torch.zeros(shape, dtype=torch.bool)
        for row, (piece, done) in enumerate(lanes):
            start = piece.first + done
            end = min(start + self.window + 1, piece.last)
            tokens = torch.from_numpy(self.corpus.ids[start:end].astype(np.int64))
            here = min(len(tokens), self.window)
            ids[row, :here] = tokens[:here]
            mask[row, :here] = True
            targets[row, : len(tokens) - 1] = tokens[1:]
        return SegmentBatch(
            ids=ids,
            targets=targets,
            mask=None if mask.all() else mask,
            documents=tuple(piece.name for piece, _ in lanes),
            offsets=tuple(piece.offset + done for piece, done in lanes),
            starts=torch.tensor([done == 0 for _, done in lanes]),
        )

    def _take(self) -> int:
        """The next text of the queue."""
        epoch, index = divmod(self.taken, len(self.pieces))
        self.taken += 1
        return index if self.seed is None else int(_shuffled(len(self.pieces), self.seed, epoch)[1][index])


@lru_cache(maxsize=2)  # for training and validation
def _shuffled(count: int, *seed: int, phases: int = 1) -> tuple[int, NDArray[np.int64]]:
    """The phase of a pass over the text, and ``count`` numbers in its order."""
    random = np.random.default_rng(seed)
    return int(random.integers(phases)), random.permutation(count)


def _refuse_other_text(state: Mapping[str, Any], corpus: TokenCorpus) -> None:
    if state["corpus"] != corpus.fingerprint:
        raise CheckpointError(
            "the saved place is in other text; resume with the data and tokenizer that the run began with"
        )


def _cut(corpus: TokenCorpus, piece_tokens: int) -> list[Piece]:
    pieces = []
    for name, (first, last) in zip(corpus.names, pairwise(corpus.bounds.tolist()), strict=True):
        count = 1 if piece_tokens <= 0 else max(1, round((last - first) / piece_tokens))
        for start, end in pairwise(first + (last - first) * k // count for k in range(count + 1)):
            if end - start >= 2:  # less has nothing to predict
                label = name if count == 1 else f"{name}@{start - first}"
                pieces.append(Piece(label, start - first, start, end))
    return pieces


class WindowBatch(NamedTuple):
    """Rows of pre-training: ids (B, T) long; targets (B, T) long, the next token, -100 where it cannot be known (the
    start of a repetition); and whether each row is copy practice, (B,) bool."""

    ids: Tensor
    targets: Tensor
    practice: Tensor


@dataclass(eq=False)
class WindowSampler:
    """Every window once per pass over the corpus, in random order, at a random phase in each pass.

    Row number n is a pure function of the seed and n: nothing but the count has to be saved, and W processes with
    B rows each see what one process with W*B rows sees. A window may span documents.

    **Copy practice** (``repeat_fraction``) replaces a share of the rows. In such a row a passage of the window, of
    random length and place, occurs a second time further on, possibly after other text. In ``repeat_random`` of
    these rows all tokens are random, so that only copying helps; there, nothing but the repetition is scored. It is
    not in the paper: small models trained for minutes do not form the heads that find and continue an earlier
    occurrence, and without them no key is worth remembering. Losses of practice rows are reported apart.

    Args:
        rows: B, of this process, the ``rank``-th of ``world``.
        special_ids: ids below this are never drawn as random tokens.
        vocab_size: V, the upper end of random tokens.
    """

    corpus: TokenCorpus
    window: int
    rows: int
    seed: int = 1
    _: KW_ONLY
    repeat_fraction: float = 0.0
    repeat_random: float = 0.25
    rank: int = 0
    world: int = 1
    special_ids: int = 0
    vocab_size: int = 256

    def __post_init__(self) -> None:
        self.position = 0
        # one window less than fits, so that every phase has as many
        self.per_pass = (self.corpus.num_tokens - 1) // self.window - 1
        if self.per_pass < 1:
            raise DataError(
                f"the corpus has {self.corpus.num_tokens} tokens, which is less than two windows of data.window "
                f"({self.window}); give more text or a smaller window"
            )

    def next(self) -> WindowBatch:
        """The next B rows of this process."""
        first = self.position + self.rank * self.rows
        rows = [self._row(number) for number in range(first, first + self.rows)]
        self.position += self.rows * self.world
        tokens, hidden, practice = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        return WindowBatch(tokens[:, :-1], tokens[:, 1:].masked_fill(hidden[:, 1:], IGNORE), practice)

    @property
    def epoch(self) -> float:
        """Passes over the corpus so far."""
        return self.position / self.per_pass

    def state_dict(self) -> dict[str, Any]:
        """How many rows were drawn."""
        return {"position": self.position, "corpus": self.corpus.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved place."""
        _refuse_other_text(state, self.corpus)
        self.position = int(state["position"])

    def _row(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.bool_], np.bool_]:
        """(T + 1,) tokens, which of them cannot be predicted, and whether the row is practice."""
        epoch, index = divmod(number, self.per_pass)
        phase, order = _shuffled(self.per_pass, self.seed, _ORDER, epoch, phases=self.window)
        start = phase + int(order[index]) * self.window
        tokens = self.corpus.ids[start : start + self.window + 1].astype(np.int64)
        hidden = np.zeros(len(tokens), dtype=bool)
        random = np.random.default_rng([self.seed, _PRACTICE, number])
        practice = random.random() < self.repeat_fraction
        if practice:
            self._repeat(tokens, hidden, random)
        return tokens, hidden, np.bool_(practice)

    def _repeat(self, tokens: NDArray[np.int64], hidden: NDArray[np.bool_], random: np.random.Generator) -> None:
        """Write a second occurrence of a passage into ``tokens`` and mark in ``hidden`` what cannot be predicted."""
        total = len(tokens)
        length = int(random.integers(max(2, total // 16), total // 2 + 1))
        start = int(random.integers(0, total - 2 * length + 1))
        again = int(random.integers(start + length, total - length + 1))
        if random.random() < self.repeat_random:
            tokens[:] = random.integers(self.special_ids, self.vocab_size, total)
            hidden[:again] = True
            hidden[again + length :] = True
        tokens[again : again + length] = tokens[start : start + length]
        hidden[again : again + length + 1 : length] = True  # where the passage begins again, and what follows it
