"""How chunk keys are searched. Exact by default; anything with these three methods can take its place."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Index(Protocol):
    """Finds, for every query, the chunk keys with the largest inner product.

    The bank owns the keys and hands them over at each search; ``written`` and ``cleared`` tell an index that keeps
    a structure of its own what has changed.
    """

    def search(
        self, queries: Tensor, keys: Tensor, rows: list[int], live: list[int], num: int
    ) -> tuple[Tensor, Tensor]:
        """The ``num`` best keys of every query.

        Args:
            queries: (B, Hkv, Q, D).
            keys: (rows, Hkv, slots, D).
            rows: for each of the B lines, the row of ``keys`` to search.
            live: for each of the B lines, how many keys of that row are in use: the first ``live`` slots.
            num: R.

        Returns:
            scores (B, Hkv, Q, R) float32 and slots (B, Hkv, Q, R) long, best first. Where fewer than R keys are in
            use, the columns from ``live`` on are undefined: the bank masks them.
        """
        ...

    def written(self, keys: Tensor, rows: Tensor, slots: Tensor) -> None:
        """Keys at ``[rows, :, slots]`` have new values."""
        ...

    def cleared(self, rows: Tensor) -> None:
        """These rows hold nothing any more."""
        ...


class ExactIndex:
    """Every key is scored, block by block; the memory taken does not grow with the bank.

    Args:
        block: scores held at once, per query block; also bounds the scratch memory.
    """

    def __init__(self, block: int = 1 << 22) -> None:
        self.block = block

    def search(
        self, queries: Tensor, keys: Tensor, rows: list[int], live: list[int], num: int
    ) -> tuple[Tensor, Tensor]:
        """See ``Index.search``."""
        shape = (*queries.shape[:3], num)
        scores = torch.zeros(shape, dtype=torch.float32, device=queries.device)
        slots = torch.zeros(shape, dtype=torch.long, device=queries.device)
        for line, (row, used) in enumerate(zip(rows, live, strict=True)):
            found = min(num, used)
            if not found:
                continue
            table = keys[row, :, :used].transpose(1, 2).to(torch.float32)
            step = max(1, self.block // used // queries.shape[1])
            for start in range(0, queries.shape[2], step):
                some = queries[line, :, start : start + step].to(torch.float32)
                best = torch.topk(some @ table, found, dim=-1)
                scores[line, :, start : start + step, :found] = best.values
                slots[line, :, start : start + step, :found] = best.indices
        return scores, slots

    def written(self, keys: Tensor, rows: Tensor, slots: Tensor) -> None:
        """Nothing is kept."""

    def cleared(self, rows: Tensor) -> None:
        """Nothing is kept."""
