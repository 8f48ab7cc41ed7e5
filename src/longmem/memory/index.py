"""How chunk keys are searched. Exact by default; anything with these methods can take its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from longmem.errors import ConfigError

SCORES_AT_ONCE = {"cpu": 1 << 20, "gpu": 1 << 26}
"""Scores held at a time: what stays in a CPU's cache, or keeps a GPU busy."""


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

    def kept(self, row: int, slots: Tensor) -> None:
        """Of this row only the keys of ``slots`` (n,), ascending, are left; they moved up to the first n slots."""
        ...


def make_index(index: str | Index = "exact") -> Index:
    """A new index by its name, or the one given.

    Raises:
        ConfigError: there is no index of this name.
    """
    if not isinstance(index, str):
        return index
    if index not in INDEXES:
        raise ConfigError(f"index ({index!r}) must be one of {', '.join(INDEXES)}")
    return INDEXES[index]()


class ExactIndex:
    """Every key is scored, a block of queries against a block of keys; memory taken does not grow with the bank.

    Picking R of many scores costs as much as computing them, so the scores of a block are first reduced to the
    maximum of each ``group`` of neighbouring keys. The R best keys lie in the R groups of largest maximum (each other
    group's maximum is beaten by R keys), so only those groups are looked at one by one.

    Args:
        scores_at_once: float32 scores held at a time; by default what stays in a CPU's cache, or keeps a GPU busy.
        group: neighbouring keys reduced together.
    """

    def __init__(self, scores_at_once: int | None = None, group: int = 64) -> None:
        self.scores_at_once = scores_at_once
        self.group = group

    @torch.no_grad()
    def search(
        self, queries: Tensor, keys: Tensor, rows: list[int], live: list[int], num: int
    ) -> tuple[Tensor, Tensor]:
        """See ``Index.search``."""
        shape = (*queries.shape[:3], num)
        scores = torch.zeros(shape, dtype=torch.float32, device=queries.device)
        slots = torch.zeros(shape, dtype=torch.long, device=queries.device)
        on_cpu = queries.device.type == "cpu"
        at_once = self.scores_at_once or SCORES_AT_ONCE["cpu" if on_cpu else "gpu"]
        scratch = torch.empty(at_once, dtype=torch.float32, device=queries.device)
        together: dict[tuple[int, int], list[int]] = {}  # lines that read one row: its keys are gone through once
        for line, lane in enumerate(zip(rows, live, strict=True)):
            together.setdefault(lane, []).append(line)
        for (row, used), lines in together.items():
            # a CPU's cache holds one head of a segment, and all heads of the one token that is decoded: what comes
            # after the product then takes as many calls as for one; a GPU takes them together
            whole = queries.shape[1] * len(lines) * queries.shape[2] * _padded(used, self.group)
            heads = 1 if on_cpu and whole > at_once else queries.shape[1]
            for head in range(0, queries.shape[1], heads):
                few = slice(head, head + heads)
                asked = queries[lines, few].transpose(0, 1)  # (h, lines, Q, D)
                best = torch.full((*asked.shape[:3], num), -torch.inf, dtype=torch.float32, device=queries.device)
                where = torch.zeros(best.shape, dtype=torch.long, device=queries.device)
                self._search_heads(
                    asked.flatten(1, 2), keys[row, few, :used], scratch, best.flatten(1, 2), where.flatten(1, 2)
                )
                scores[lines, few], slots[lines, few] = best.transpose(0, 1), where.transpose(0, 1)
        return scores, slots

    def written(self, keys: Tensor, rows: Tensor, slots: Tensor) -> None:
        """Nothing is kept."""

    def cleared(self, rows: Tensor) -> None:
        """Nothing is kept."""

    def kept(self, row: int, slots: Tensor) -> None:
        """Nothing is kept."""

    def _search_heads(self, queries: Tensor, keys: Tensor, scratch: Tensor, scores: Tensor, slots: Tensor) -> None:
        """Fill scores and slots (h, Q, R) for queries (h, Q, D) over keys (h, n, D), merging block after block."""
        heads, length, _ = queries.shape
        # wide enough that packing the keys for the matrix product pays, narrow enough for the scratch; a few queries
        # leave room for more keys at once
        room = scratch.numel() // heads // max(1, min(length, 64))
        columns = min(max(keys.shape[1], 1), max(self.group, room // self.group * self.group))
        lines = max(1, scratch.numel() // heads // _padded(columns, self.group))
        for first in range(0, keys.shape[1], columns):
            block = keys[:, first : first + columns].to(torch.float32)
            found = min(scores.shape[2], block.shape[1])
            for start in range(0, length, lines):
                part = slice(start, start + lines)
                best, where = self._best(queries[:, part].to(torch.float32), block, found, scratch)
                _merge(scores[:, part], slots[:, part], best, where + first, first)

    def _best(self, queries: Tensor, keys: Tensor, num: int, scratch: Tensor) -> tuple[Tensor, Tensor]:
        """The ``num`` best of a block: scores (h, q, num) and positions, for queries (h, q, D) and keys (h, c, D)."""
        heads, length, _ = queries.shape
        count, group = keys.shape[1], self.group
        width = _padded(count, group)
        table = scratch[: heads * length * width].view(heads, length, width)
        for head in range(heads):
            torch.mm(queries[head], keys[head].T, out=table[head, :, :count])
        if count <= 2 * num * group:  # too few groups to gain by them
            best = torch.topk(table[:, :, :count], num, dim=-1)
            return best.values, best.indices
        table[:, :, count:] = -torch.inf
        return _best_by_group(table, num, group)


def _best_by_group(table: Tensor, num: int, group: int) -> tuple[Tensor, Tensor]:
    """The ``num`` largest of every line of (h, q, c), and where; c is a multiple of ``group``."""
    heads, length, width = table.shape
    groups = width // group
    chosen = torch.topk(table.view(heads, length, groups, group).amax(-1), num, dim=-1, sorted=False).indices
    line = torch.arange(heads * length, device=table.device).view(heads, length, 1) * groups
    candidates = table.view(-1, group).index_select(0, (chosen + line).flatten()).view(heads, length, num * group)
    best = torch.topk(candidates, num, dim=-1)
    inside = best.indices % group
    return best.values, chosen.gather(-1, best.indices // group) * group + inside


def _merge(scores: Tensor, slots: Tensor, best: Tensor, where: Tensor, seen: int) -> None:
    """Bring the best of another block into the running best (h, q, R), in place; ``seen`` keys came before it."""
    if not seen:
        scores[:, :, : best.shape[2]] = best
        slots[:, :, : where.shape[2]] = where
        return
    both = torch.cat((scores, best), dim=-1)
    scores[:], order = torch.topk(both, scores.shape[2], dim=-1)
    slots[:] = torch.cat((slots, where), dim=-1).gather(-1, order)


def _padded(count: int, group: int) -> int:
    return -(-count // group) * group


def _two_stage() -> Index:
    from longmem.memory.blocks import Blocks
    from longmem.memory.partial import PartialIndex

    return PartialIndex(Blocks)


def _faiss() -> Index:
    from longmem.memory.faiss_index import faiss_index

    return faiss_index()


INDEXES: dict[str, Callable[[], Index]] = {"exact": ExactIndex, "two_stage": _two_stage, "faiss": _faiss}
"""What ``index=`` may name. A backend that is installed on its own is imported by its factory."""
