"""Pre-training rows: windows of a corpus in random order, some of them turned into copy practice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longmem.data.tokens import TokenCorpus
from longmem.errors import DataError

IGNORE = -100
_ORDER, _PRACTICE = 1, 2


@dataclass(frozen=True)
class WindowBatch:
    """One batch of pre-training.

    Attributes:
        ids: (B, T) long.
        targets: (B, T) long, the next token; -100 where it cannot be known (the start of a repetition).
        practice: (B,) bool, True at rows of copy practice.
    """

    ids: Tensor
    targets: Tensor
    practice: Tensor


class WindowSampler:
    """Every window once per pass over the corpus, in random order, at a random phase in each pass.

    Row number n is a pure function of the seed and n: nothing but the count has to be saved, and W processes with
    R rows each see what one process with W*R rows sees.

    **Copy practice** (``repeat_fraction``) replaces a share of the rows. In such a row a passage of the window, of
    random length and place, occurs a second time further on, possibly after other text. In ``repeat_random`` of
    these rows all tokens are random, so that only copying helps; there, nothing but the repetition is scored. It is
    not in the paper: small models trained for minutes do not form the heads that find and continue an earlier
    occurrence, and without them no key is worth remembering. It is training on a synthetic task; losses of practice
    rows are reported apart from those of text.

    Args:
        corpus: tokens to cut windows from; a window may span documents.
        window: T.
        rows: B, of this process, the ``rank``-th of ``world``.
        special_ids: ids below this are never drawn as random tokens.
        vocab_size: V, the upper end of random tokens.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        window: int,
        rows: int,
        seed: int = 1,
        *,
        repeat_fraction: float = 0.0,
        repeat_random: float = 0.25,
        rank: int = 0,
        world: int = 1,
        special_ids: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        self.corpus, self.window, self.rows, self.seed = corpus, window, rows, seed
        self.repeat_fraction, self.repeat_random = repeat_fraction, repeat_random
        self.rank, self.world = rank, world
        self.special_ids = special_ids
        self.vocab_size = vocab_size or int(np.iinfo(corpus.ids.dtype).max)
        self.position = 0
        # one window less than fits, so that every phase has as many
        self.per_pass = (corpus.num_tokens - 1) // window - 1
        if self.per_pass < 1:
            raise DataError(
                f"the corpus has {corpus.num_tokens} tokens, which is less than two windows of data.window ({window}); "
                "give more text or a smaller window"
            )
        self._order: tuple[int, int, NDArray[np.int64]] | None = None

    def next(self) -> WindowBatch:
        """The next B rows of this process."""
        first = self.position + self.rank * self.rows
        rows = [self._row(number) for number in range(first, first + self.rows)]
        self.position += self.rows * self.world
        tokens, hidden, practice = (np.stack(part) for part in zip(*rows, strict=True))
        ids, targets = torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(tokens[:, 1:].copy())
        targets[torch.from_numpy(hidden[:, 1:])] = IGNORE
        return WindowBatch(ids, targets, torch.from_numpy(practice))

    @property
    def epoch(self) -> float:
        """Passes over the corpus so far."""
        return self.position / self.per_pass

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "seed": self.seed, "corpus": self.corpus.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position."""
        self.position = int(state["position"])

    def _row(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.bool_], np.bool_]:
        """(T + 1,) tokens, which of them cannot be predicted, and whether the row is practice."""
        epoch, index = divmod(number, self.per_pass)
        if self._order is None or self._order[0] != epoch:
            random = np.random.default_rng([self.seed, _ORDER, epoch])
            self._order = (epoch, int(random.integers(self.window)), random.permutation(self.per_pass))
        _, phase, order = self._order
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
        hidden[again] = True
        if again + length < total:
            hidden[again + length] = True
