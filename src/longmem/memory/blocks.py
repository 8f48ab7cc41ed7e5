"""Chunk keys in blocks of like ones, so that a query reads the blocks that suit it and leaves out the rest.

A tree halves the keys along the direction in which they differ most, and its halves again, until a block holds about
``WIDTH`` keys; ``PARTS`` neighbouring parts are a block. A query is compared with the mean of every block, then with
the means of the parts of those blocks that suit it most, then with the keys of those parts that suit it most.
be read for the same recall (docs/experiments.md).

Hkv key/value heads · n keys · D head_dim · m queries heard · R retrieved chunks
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WIDTH = 64
"""Keys in a block, between 3/4 and 3/2 of this: half as many would double the block means, all of which are read."""

PRIOR = 64
"""How many queries the plain distance weighs as much as: few queries say little about those that come."""


class Blocks:
    """A copy of the keys of one row, in blocks, and the mean of each block.

    Args:
        keys: (Hkv, n, D); those past a multiple of the number of blocks are left out.
        heard: (Hkv, m, D), queries to suit.

    Attributes:
        covered: keys of the row that may be here: the first ones.
        groups: number of blocks.
        size: keys held for each head.
    """

    def __init__(self, keys: Tensor, heard: Tensor) -> None:
        heads, count, dim = keys.shape
        self.groups = 1 << max(0, round(math.log2(max(count, 1) / WIDTH)))
        self.width = count // self.groups
        self.covered = self.size = self.groups * self.width
        shape = (heads, self.groups, self.width)
        self.keys = torch.empty(*shape[:2], self.width * dim, dtype=keys.dtype, device=keys.device)
        self.slots = torch.empty(shape, dtype=torch.int32, device=keys.device)
        self.means = torch.empty(*shape[:2], dim, device=keys.device)
        self.holes = False
        for head in range(heads):  # one at a time: what building takes beside the copy is a head's part
            own = keys[head, : self.size]
            order = like_together(own.to(torch.float32) @ felt_distance(heard[head]), self.groups)
            self.slots[head] = order.view(self.groups, -1)
            torch.index_select(own, 0, order, out=self.keys[head].view(self.size, dim))
            self.means[head] = self._each(head).to(torch.float32).mean(1)

    @property
    def nbytes(self) -> int:
        """Of the copy, the slots and the means."""
        return sum(each.numel() * each.element_size() for each in (self.keys, self.slots, self.means))

    def share_read(self, probes: list[int]) -> float:
        """Bytes read for a query, means included, of those of all keys covered."""
        heads, _, dim = self.means.shape
        means = self.groups * dim * self.means.element_size() / (self.size * dim * self.keys.element_size())
        return means + sum(probes) / heads * self.width / self.size

    def ranks(self, head: int, queries: Tensor, slots: Tensor) -> Tensor:
        """How many blocks come before the block of each slot (m, k), for queries (m, D): (m, k) long."""
        home = torch.zeros(self.covered, dtype=torch.long, device=slots.device)
        held = self.slots[head].flatten()
        there = (held >= 0).nonzero().flatten()
        home[held[there].long()] = there // self.width
        near = queries @ self.means[head].T
        return torch.stack([(near > own[:, None]).sum(1) for own in near.gather(1, home[slots]).unbind(1)], dim=1)

    def search(
        self, head: int, query: Tensor, probes: int, num: int, current: Tensor | None, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The best of the ``probes`` blocks that suit a query (D,) most.

        Args:
            current: (covered,) bool, False at keys that have changed since; None where none has.
            keys: (n, D) of this head, as they are now.

        Returns:
            scores (num,) float32, best first, -inf where there were fewer; slots (num,) long.
        """
        dim = query.shape[0]
        near = torch.mv(self.means[head], query).topk(probes, sorted=False).indices
        read = self.keys[head].index_select(0, near).view(-1, dim)
        scores = torch.mv(read.to(torch.float32), query)
        if self.holes or current is not None:
            held = self.slots[head].index_select(0, near).flatten().long()
            good = held >= 0
            if current is not None:
                good &= current[held.clamp_min_(0)]
            scores = scores.masked_fill_(~good, -torch.inf)
        best = scores.topk(min(num, len(scores)))
        where = near[best.indices // self.width] * self.width + best.indices % self.width
        return best.values, self.slots[head].view(-1)[where].long()

    def kept(self, moved: Tensor) -> None:
        """Slot s is now slot ``moved[s]``, -1: it is gone. What is gone is overwritten here too."""
        held = self.slots.long()
        self.slots = torch.where(held >= 0, moved[held.clamp_min(0)], -1).to(torch.int32)
        self.holes = True
        dim = self.means.shape[2]
        for head in range(len(self.slots)):
            gone = self.slots[head] < 0
            self._each(head)[gone] = 0
            touched = gone.any(1).nonzero().flatten()
            left = (self.width - gone[touched].sum(1, keepdim=True)).clamp_min(1)
            rest = self.keys[head].index_select(0, touched).view(-1, self.width, dim)
            self.means[head, touched] = rest.to(torch.float32).sum(1) / left
        self.covered = int((moved >= 0).sum())

    def _each(self, head: int) -> Tensor:
        """The copy of a head's keys, (groups, width, D)."""
        return self.keys[head].view(self.groups, self.width, -1)


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


def like_together(keys: Tensor, groups: int) -> Tensor:
    """An order (n,) of keys (n, D) in which runs of n / groups are alike; groups: a power of two that divides n."""
    count, dim = keys.shape
    order = torch.arange(count, device=keys.device)
    keys = keys - keys.mean(0)  # what all share would drown the rest in the squares below
    nodes = 1
    while nodes < groups:
        parts = keys.view(nodes, -1, dim)
        along = torch.bmm(parts, _longest(parts)).view(nodes, -1)
        first = torch.arange(0, count, count // nodes, device=keys.device)
        moved = (along.argsort(dim=-1, stable=True) + first[:, None]).flatten()
        keys, order = keys.index_select(0, moved), order.index_select(0, moved)
        nodes *= 2
    return order


def _longest(parts: Tensor) -> Tensor:
    """The direction in which each of (p, n, D) varies most, (p, D, 1), by a few steps of power iteration."""
    mean = parts.mean(1, keepdim=True)
    spread = torch.bmm(parts.transpose(1, 2), parts) - parts.shape[1] * mean.transpose(1, 2) * mean
    widest = spread.diagonal(dim1=1, dim2=2).argmax(-1)
    axis = spread.gather(2, widest.view(-1, 1, 1).expand(-1, spread.shape[1], 1))
    for _ in range(6):
        axis = torch.bmm(spread, axis / axis.norm(dim=1, keepdim=True).clamp_min(1e-30))
    return axis
