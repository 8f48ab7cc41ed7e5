"""Chunk keys in blocks of like ones, so that a query reads the few that suit it and leaves out the rest.

A tree parts the keys along the direction in which they differ most, and the parts again, until a part holds some
``WIDTH`` keys; ``PARTS`` neighbouring parts are a block. A query is compared with the mean of every block and, among
those that suit it most, with the means of parts and with the keys of the best ``FIRST`` parts. What the R-th best of
these keys scores is to be beaten: now all blocks are gone into whose mean is not too far below that score, and of
their parts all are read whose mean is not. How far is too far is counted in *spreads*, the standard deviation of
this query's scores around the means, and learned for each head (``PartialIndex``): it differs little between texts,
where the number of parts to read differs much (docs/experiments.md).

What counts as a difference is what queries make of it: keys are compared by how much the scores of the queries heard so
far differ. Queries lie elsewhere than keys, and by the plain distance more keys have to be read for the same recall
(docs/experiments.md).

Hkv key/value heads · n keys · D head_dim · m queries heard · R retrieved chunks
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH = 16
"""Keys in a part, more or less."""

PARTS = 4
"""Parts in a block. The means of all blocks are read, 1/64 of the keys' bytes."""

LEAST = 4 * PARTS * WIDTH
"""Keys below which there is nothing to part."""

PRIOR = 64
"""How many queries the plain distance weighs as much as: few queries say little about those that come."""

FIRST = 64
"""Blocks, and then parts, that are read in any case, to know what score is to be beaten."""

Reach = tuple[float, ...]
"""How many spreads below the score to be beaten the mean of a group may lie for it to be read, level by level."""


class Blocks:
    """A copy of the keys of one row, in blocks, and the means of blocks and parts.

    Args:
        keys: (Hkv, n, D), n at least ``LEAST``; the few that are over when all parts are equally long are left out.
        heard: (Hkv, m, D), queries to suit.

    Attributes:
        covered: keys of the row that may be here: the first ones.
        size: keys held for each head.
    """

    def __init__(self, keys: Tensor, heard: Tensor) -> None:
        heads, count, dim = keys.shape
        self.parts, self.width, ways = _sizes(count)
        self.covered = self.size = self.parts * self.width
        self.keys = torch.empty(heads, self.parts, self.width * dim, dtype=keys.dtype, device=keys.device)
        self.slots = torch.empty(heads, self.parts, self.width, dtype=torch.int32, device=keys.device)
        self.means = torch.empty(heads, self.parts, dim, device=keys.device)
        self.block_means = torch.empty(heads, self.parts // PARTS, dim, device=keys.device)
        self.numbers = torch.arange(PARTS, device=keys.device)
        self.spreads = torch.empty(heads, 2 * dim, dim, device=keys.device)
        self.holes = False
        for head in range(heads):  # one at a time: what building takes beside the copy is a head's part
            own = keys[head, : self.size]
            order = like_together(own.to(torch.float32) @ felt_distance(heard[head]), self.parts, ways)
            self.slots[head] = order.view(self.parts, -1)
            torch.index_select(own, 0, order, out=self.keys[head].view(self.size, dim))
            self._average(head)
            self._spread(head)

    @property
    def nbytes(self) -> int:
        """Of the copy, the slots, the means and the spreads."""
        held = (self.keys, self.slots, self.means, self.block_means, self.spreads)
        return sum(each.numel() * each.element_size() for each in held)

    def short(self, head: int, queries: Tensor, scores: Tensor, slots: Tensor, inside: Tensor) -> Tensor:
        """How far below the score to be beaten the groups of the best keys lie, (2, m, R): of blocks, of parts.

        Args:
            queries: (m, D).
            scores: (m, R), of the best, best first.
            slots: (m, R), the best.
            inside: (m, R) bool, whether they are here; the others are found elsewhere, theirs is -inf.
        """
        home = torch.zeros(self.covered, dtype=torch.long, device=slots.device)
        held = self.slots[head].flatten()
        there = (held >= 0).nonzero().flatten()
        home[held[there].long()] = there // self.width
        home = home[slots.masked_fill(~inside, 0)]
        spreads = (queries @ self.spreads[head].T).view(len(queries), 2, -1).norm(dim=2).clamp_min(1e-20)
        short = [
            (scores[:, -1:] - (means[head][homes] * queries[:, None]).sum(-1)) / spreads[:, level, None]
            for level, (means, homes) in enumerate(((self.block_means, home // PARTS), (self.means, home)))
        ]
        return torch.stack(short).masked_fill(~inside, -torch.inf)

    def search(
        self, queries: Tensor, reach: list[Reach], num: int, current: Tensor | None, keys: Tensor
    ) -> tuple[Tensor, Tensor, float]:
        """The best keys for a query of each head (Hkv, D) among the parts within the head's reach.

        Args:
            current: (covered,) bool, False at keys that have changed since; None where none has.
            keys: (Hkv, n, D), as they are now.

        Returns:
            scores (Hkv, num) float32, best first, -inf where there were fewer; slots (Hkv, num) long; how many keys'
            bytes were read, over all heads.
        """
        heads, dim = queries.shape
        blocks = self.parts // PARTS
        column = queries[:, :, None]
        near = torch.bmm(self.block_means, column).view(heads, blocks)
        first = near.topk(min(FIRST, blocks), sorted=False)
        at = torch.arange(heads, device=queries.device)[:, None] * blocks
        means = self.means.view(heads * blocks, PARTS * dim)
        beside = torch.bmm(means.index_select(0, (first.indices + at).view(-1)).view(heads, -1, dim), column)[:, :, 0]
        most = beside.topk(min(max(FIRST, 2 * num // self.width), beside.shape[1]), sorted=False)
        chosen = (first.indices.gather(1, most.indices // PARTS) + at) * PARTS + most.indices % PARTS
        likely, _ = self._read(queries, chosen.view(-1), [chosen.shape[1]] * heads, current)
        beat = torch.stack(
            [each.topk(num).values[-1] if len(each) >= num else each.new_tensor(-torch.inf) for each in likely]
        )

        spreads = torch.bmm(self.spreads, column).view(heads, 2, dim).norm(dim=2).clamp_min(1e-20)
        floors = beat[:, None] - torch.tensor(reach, device=queries.device) * spreads
        # what was read at first is read in any case, and with it enough to find R
        floors = torch.minimum(floors, torch.stack((first.values.amin(1), most.values.amin(1)), dim=1))
        within = near >= floors[:, :1]
        inside = within.view(-1).nonzero().view(-1)
        counts = (PARTS * within.sum(1)).tolist()
        part_means = means.index_select(0, inside).view(-1, dim)
        wanted = torch.cat(
            [
                torch.mv(each, query) >= floor
                for each, query, floor in zip(part_means.split(counts), queries, floors[:, 1], strict=True)
            ]
        )
        parts = (inside[:, None] * PARTS + self.numbers).view(-1)[wanted]
        scores, slots = self._read(queries, parts, [int(each.sum()) for each in wanted.split(counts)], current)

        best = torch.full((heads, num), -torch.inf, device=queries.device)
        where = torch.zeros((heads, num), dtype=torch.long, device=queries.device)
        for head in range(heads):
            found = scores[head].topk(min(num, len(scores[head])))
            best[head, : len(found.values)] = found.values
            where[head, : len(found.values)] = slots[head][found.indices]
        read = (heads * blocks + len(part_means)) * self.means.element_size() / self.keys.element_size()
        return best, where, read + self.width * len(parts)

    def _read(
        self, queries: Tensor, parts: Tensor, counts: list[int], current: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Scores and slots of each head's keys in these of all heads' parts; -inf where one is gone or has changed."""
        dim = queries.shape[1]
        read = self.keys.view(-1, self.width * dim).index_select(0, parts).split(counts)
        slots = self.slots.view(-1, self.width).index_select(0, parts).view(-1)
        scores = torch.cat(
            [torch.mv(each.view(-1, dim).to(torch.float32), query) for each, query in zip(read, queries, strict=True)]
        )
        if self.holes or current is not None:
            good = slots >= 0
            if current is not None:
                good &= current[slots.clamp_min(0).long()]
            scores.masked_fill_(~good, -torch.inf)
        each = [self.width * count for count in counts]
        return list(scores.split(each)), list(slots.split(each))

    def kept(self, moved: Tensor) -> None:
        """Slot s is now slot ``moved[s]``, -1: it is gone. What is gone is overwritten here too."""
        held = self.slots.long()
        self.slots = torch.where(held >= 0, moved[held.clamp_min(0)], -1).to(torch.int32)
        self.holes = True
        for head in range(len(self.slots)):
            self._each(head)[self.slots[head] < 0] = 0
            self._average(head)
        self.covered = int((moved >= 0).sum())

    def _spread(self, head: int) -> None:
        """Set what turns a query into the spreads of its scores around means of blocks and of parts."""
        each = self._each(head).to(torch.float32)
        dim = each.shape[2]
        for level, (means, size) in enumerate(((self.block_means, PARTS), (self.means, 1))):
            off = (each.view(-1, size * self.width, dim) - means[head][:, None]).view(-1, dim)
            values, vectors = torch.linalg.eigh(off.T @ off / len(off))
            self.spreads[head, level * dim : (level + 1) * dim] = (vectors * values.clamp_min(0).sqrt()).T

    def _each(self, head: int) -> Tensor:
        """The copy of a head's keys, (parts, width, D)."""
        return self.keys[head].view(self.parts, self.width, -1)

    def _average(self, head: int) -> None:
        """Set a head's means, over the keys that are left."""
        sums = self._each(head).to(torch.float32).sum(1)
        left = (self.slots[head] >= 0).sum(1, keepdim=True)
        # what is empty gets the mean of all: at zero it would come before every key where scores are negative
        rest = sums.sum(0) / left.sum().clamp_min(1)
        for means, size in ((self.means, 1), (self.block_means, PARTS)):
            total, count = (each.view(-1, size, each.shape[1]).sum(1) for each in (sums, left))
            means[head] = torch.where(count > 0, total / count.clamp_min(1), rest)


def felt_distance(heard: Tensor) -> Tensor:
    """(D, D), symmetric: keys times this differ by how much, in root mean square, scores of queries (m, D) differ.

    The plain distance is mixed in, with the weight of ``PRIOR`` queries.
    """
    count, dim = heard.shape
    heard = heard.to(torch.float32)
    squares = heard.T @ heard
    level = squares.diagonal().mean() / max(count, 1)
    plain = torch.eye(dim, device=heard.device) * (level if level > 0 else 1.0)
    values, vectors = torch.linalg.eigh((squares + PRIOR * plain) / (count + PRIOR))
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


def like_together(keys: Tensor, parts: int, ways: int = 2) -> Tensor:
    """An order (n,) of keys (n, D) in which runs of n / parts are alike; parts is ``ways`` times a power of two."""
    count, dim = keys.shape
    order = torch.arange(count, device=keys.device)
    keys = keys - keys.mean(0)  # what all share would drown the rest in the squares below
    nodes, into = 1, ways
    while nodes < parts:
        groups = keys.view(nodes, -1, dim)
        along = torch.bmm(groups, _longest(groups)).view(nodes, -1)
        first = torch.arange(0, count, count // nodes, device=keys.device)
        moved = (along.argsort(dim=-1, stable=True) + first[:, None]).flatten()
        keys, order = keys.index_select(0, moved), order.index_select(0, moved)
        nodes, into = nodes * into, 2
    return order


def _longest(groups: Tensor) -> Tensor:
    """The direction in which each of (p, n, D) varies most, (p, D, 1), by a few steps of power iteration."""
    mean = groups.mean(1, keepdim=True)
    spread = torch.bmm(groups.transpose(1, 2), groups) - groups.shape[1] * mean.transpose(1, 2) * mean
    widest = spread.diagonal(dim1=1, dim2=2).argmax(-1)
    axis = spread.gather(2, widest.view(-1, 1, 1).expand(-1, spread.shape[1], 1))
    for _ in range(6):
        axis = torch.bmm(spread, axis / axis.norm(dim=1, keepdim=True).clamp_min(1e-30))
    return axis


def _sizes(count: int) -> tuple[int, int, int]:
    """How many parts of how many keys, and into how many the first level parts: what leaves fewest of the keys out."""
    best = (0, 0, 0)
    for ways in (4, 5, 6, 7):
        parts = ways
        while parts * WIDTH * 2**0.5 < count:
            parts *= 2
        if parts % PARTS == 0 and parts * (count // parts) > best[0] * best[1]:
            best = (parts, count // parts, ways)
    return best
