"""Chunk keys in blocks of like ones, so that a query reads the few that suit it and leaves out the rest.

A tree parts the keys along the direction in which they differ most, and the parts again, until a part holds some
``WIDTH`` keys; ``PARTS`` neighbouring parts are a block. A query is compared with the mean of every block, then with
the means of the parts of those blocks that suit it most, then with the keys of those parts that suit it most.

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

Plan = tuple[int, ...]
"""How many groups a head reads, level by level."""


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
        self.numbers = torch.arange(self.parts, device=keys.device).view(-1, PARTS)
        self.holes = False
        for head in range(heads):  # one at a time: what building takes beside the copy is a head's part
            own = keys[head, : self.size]
            order = like_together(own.to(torch.float32) @ felt_distance(heard[head]), self.parts, ways)
            self.slots[head] = order.view(self.parts, -1)
            torch.index_select(own, 0, order, out=self.keys[head].view(self.size, dim))
            self._average(head)

    @property
    def nbytes(self) -> int:
        """Of the copy, the slots, the means and the parts' numbers."""
        held = (self.keys, self.slots, self.means, self.block_means, self.numbers)
        return sum(each.numel() * each.element_size() for each in held)

    def share_read(self, plans: list[Plan]) -> float:
        """Bytes of means and keys read for a query, of those of all keys covered."""
        blocks = self.parts // PARTS + PARTS * sum(blocks for blocks, _ in plans) / len(plans)
        parts = sum(parts for _, parts in plans) / len(plans)
        return (blocks * self.means.element_size() / self.keys.element_size() + parts * self.width) / self.size

    def plan(self, head: int, queries: Tensor, slots: Tensor, inside: Tensor, recall: float) -> Plan:
        """How much a head must read so that queries (m, D) find the share ``recall`` of their best.

        Args:
            slots: (m, R), the best.
            inside: (m, R) bool, whether they are here; the others are found elsewhere.
        """
        if recall >= 1:
            return self.parts // PARTS, self.parts
        home = torch.zeros(self.covered, dtype=torch.long, device=slots.device)
        held = self.slots[head].flatten()
        there = (held >= 0).nonzero().flatten()
        home[held[there].long()] = there // self.width
        home = home[slots.masked_fill(~inside, 0)]
        # the first level may lose half of what may be lost
        blocks = groups_needed(queries @ self.block_means[head].T, home // PARTS, inside, (1 + recall) / 2)
        parts = groups_needed(queries @ self.means[head].T, home, inside, recall)
        return blocks, min(parts, blocks * PARTS)

    def search(
        self, head: int, query: Tensor, plan: Plan, num: int, current: Tensor | None, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The best keys for a query (D,) among the parts that suit it most.

        Args:
            plan: how many blocks and parts to read.
            current: (covered,) bool, False at keys that have changed since; None where none has.
            keys: (n, D) of this head, as they are now.

        Returns:
            scores (num,) float32, best first, -inf where there were fewer; slots (num,) long.
        """
        dim = query.shape[0]
        blocks = torch.mv(self.block_means[head], query).topk(plan[0], sorted=False).indices
        means = self.means[head].view(-1, PARTS * dim).index_select(0, blocks)
        best = torch.mv(means.view(-1, dim), query).topk(plan[1], sorted=False).indices
        parts = self.numbers.index_select(0, blocks).view(-1).index_select(0, best)
        read = self.keys[head].index_select(0, parts).view(-1, dim)
        scores = torch.mv(read.to(torch.float32), query)
        slots = self.slots[head].index_select(0, parts).view(-1)
        if self.holes or current is not None:
            good = slots >= 0
            if current is not None:
                good &= current[slots.clamp_min(0).long()]
            scores.masked_fill_(~good, -torch.inf)
        found = scores.topk(min(num, len(scores)))
        return found.values, slots.index_select(0, found.indices).long()

    def kept(self, moved: Tensor) -> None:
        """Slot s is now slot ``moved[s]``, -1: it is gone. What is gone is overwritten here too."""
        held = self.slots.long()
        self.slots = torch.where(held >= 0, moved[held.clamp_min(0)], -1).to(torch.int32)
        self.holes = True
        for head in range(len(self.slots)):
            self._each(head)[self.slots[head] < 0] = 0
            self._average(head)
        self.covered = int((moved >= 0).sum())

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


def groups_needed(scores: Tensor, home: Tensor, inside: Tensor, recall: float) -> int:
    """How many groups each query must read, by scores (m, G), to come upon the share ``recall`` of its homes (m, R).

    Homes that are not ``inside`` cost nothing.
    """
    own = scores.gather(1, home)
    before = torch.stack([(scores > each[:, None]).sum(1) for each in own.unbind(1)], dim=1)
    ranks = before.masked_fill(~inside, -1).flatten().sort().values
    return min(scores.shape[1], max(2, int(ranks[min(len(ranks) - 1, int(recall * len(ranks)))]) + 1))


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
