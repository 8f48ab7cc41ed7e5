"""``PartialIndex``: finds nearly all of the best keys by reading a part of them.

What is shared by all such searches is here: when to read everything after all, how much to read for the recall asked
for, and how a structure built once keeps up with a memory that changes.

Hkv key/value heads · Q queries per key/value head · D head_dim · R retrieved chunks
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from longmem.memory.blocks import LEAST, Plan
from longmem.memory.index import ExactIndex

HEARD = 256
"""Queries of each key/value head remembered for building."""


class Structure(Protocol):
    """The keys of one row, grouped; see ``Blocks`` for its methods."""

    size: int
    covered: int

    @property
    def nbytes(self) -> int: ...
    def share_read(self, plans: list[Plan]) -> float: ...
    def plan(self, head: int, queries: Tensor, slots: Tensor, inside: Tensor, recall: float) -> Plan: ...
    def search(
        self, head: int, query: Tensor, plan: Plan, num: int, current: Tensor | None, keys: Tensor
    ) -> tuple[Tensor, Tensor]: ...
    def kept(self, moved: Tensor) -> None: ...


Build = Callable[[Tensor, Tensor], Structure]
"""Makes it of keys (Hkv, n, D) and queries heard (Hkv, m, D)."""


class PartialIndex:
    """Few queries at a time read the part of the keys that suits them; everything else is searched exactly.

    Exact are: segments (many queries together read nearly every key anyway, and a matrix product does it faster), rows
    with few chunks, and a row's first searches, until ``enough`` queries were heard. Then, at the next search of few
    queries, the structure is built, and how much each head reads is set so that the queries heard would have
    found the share ``recall`` of their best keys. From then on the row's answers depend on these queries, nothing else:
    the same calls in the same order give the same answers.

    Keys written later are searched exactly beside the structure, until they are more than a sixteenth of the row; then
    it is built anew. Keys that were overwritten or forgotten are never found. Scores are exact inner products.

    Args:
        build: makes the structure.
        recall: share of the best R keys that is aimed at; at 1 all is read.
        least: chunks below which a row is searched exactly.
        few: queries per key/value head and row up to which a search reads a part.
        enough: queries per key/value head to be heard before building.
        worth: share of the keys' bytes to be read beyond which a row is searched exactly.
    """

    def __init__(
        self,
        build: Build,
        *,
        recall: float = 0.98,
        least: int = 16384,
        few: int = 8,
        enough: int = 64,
        worth: float = 0.25,
    ) -> None:
        self.build = build
        self.recall = recall
        self.least = max(least, LEAST)
        self.few = few
        self.enough = enough
        self.worth = worth
        self._exact = ExactIndex()
        self._rows: dict[int, _Row] = {}

    @torch.no_grad()
    def search(
        self, queries: Tensor, keys: Tensor, rows: list[int], live: list[int], num: int
    ) -> tuple[Tensor, Tensor]:
        """See ``Index.search``."""
        partly = {}
        for line, (number, used) in enumerate(zip(rows, live, strict=True)):
            row = self._rows.setdefault(number, _Row())
            if used < max(self.least, num):
                continue
            row.hear(queries[line])
            if queries.shape[2] <= self.few and self._ready(row, keys[number, :, :used], num):
                partly[line] = row
        if not partly:
            return self._exact.search(queries, keys, rows, live, num)
        shape = (*queries.shape[:3], num)
        scores = torch.zeros(shape, dtype=torch.float32, device=queries.device)
        slots = torch.zeros(shape, dtype=torch.long, device=queries.device)
        left = []
        for line, (number, used) in enumerate(zip(rows, live, strict=True)):
            if line not in partly or not partly[line].search(
                queries[line].to(torch.float32), keys[number, :, :used], scores[line], slots[line]
            ):
                left.append(line)
        if left:
            theirs = [rows[line] for line in left], [live[line] for line in left]
            scores[left], slots[left] = self._exact.search(queries[left], keys, *theirs, num)
        return scores, slots

    def written(self, keys: Tensor, rows: Tensor, slots: Tensor) -> None:
        """Keys at ``[rows, :, slots]`` have new values."""
        for number in rows.unique().tolist():
            if number in self._rows:
                self._rows[number].written(slots[rows == number])

    def cleared(self, rows: Tensor) -> None:
        """These rows hold nothing any more; their queries are forgotten too."""
        for number in rows.tolist():
            self._rows.pop(number, None)

    def kept(self, row: int, slots: Tensor) -> None:
        """Of this row only the keys of ``slots`` (n,), ascending, are left; they moved up to the first n slots."""
        if row in self._rows:
            self._rows[row].kept(slots)

    def state_bytes(self, row: int = 0) -> int:
        """Bytes held for a row beside its keys."""
        held = self._rows.get(row)
        return 0 if held is None else held.nbytes

    def share_read(self, row: int = 0) -> float:
        """Key bytes read for one query, as a share of the row's; 1 where it is searched exactly."""
        held = self._rows.get(row)
        return 1.0 if held is None else held.share_read

    def _ready(self, row: _Row, keys: Tensor, num: int) -> bool:
        """Whether this row, with keys (Hkv, n, D), can be searched in part; builds what is missing."""
        if not row.up_to_date(keys.shape[1]):
            if row.heard < self.enough:
                return False
            row.build(self.build, keys)
        if num not in row.plans:
            row.tune(self._exact, keys, num, self.recall)
        assert row.structure is not None
        return self.recall >= 1 or row.structure.share_read(row.plans[num]) <= self.worth


class _Row:
    """What is known of one row.

    Attributes:
        structure: None until it is built.
        plans: how much each head reads, by R.
    """

    def __init__(self) -> None:
        self.structure: Structure | None = None
        self.plans: dict[int, list[Plan]] = {}
        self._heard = torch.empty(0)
        self._count = 0
        self._current = torch.empty(0, dtype=torch.bool)  # (covered,) False: overwritten since
        self._overwritten = False
        self._fresh: tuple[int, Tensor, Tensor] | None = None
        self._used: list[Plan] = []

    @property
    def heard(self) -> int:
        """Queries of each key/value head that are remembered."""
        return min(self._count, HEARD)

    @property
    def nbytes(self) -> int:
        held = [self._heard, self._current] if self._fresh is None else [self._heard, self._current, *self._fresh[1:]]
        own = 0 if self.structure is None else self.structure.nbytes
        return own + sum(each.numel() * each.element_size() for each in held)

    @property
    def share_read(self) -> float:
        if self.structure is None or not self._used:
            return 1.0
        fresh = 0 if self._fresh is None else len(self._fresh[1])
        share = self.structure.share_read(self._used) * self.structure.size
        return (share + fresh) / (self.structure.covered + fresh)

    def hear(self, queries: Tensor) -> None:
        """Remember the latest of queries (Hkv, Q, D); of more than there is room for, evenly spaced ones."""
        count = queries.shape[1]
        if count > HEARD:
            queries = queries[:, torch.arange(HEARD, device=queries.device) * count // HEARD]
            count = HEARD
        if not self._count:
            self._heard = torch.empty(queries.shape[0], HEARD, queries.shape[2], device=queries.device)
        place = self._count % HEARD
        first = min(count, HEARD - place)
        self._heard[:, place : place + first] = queries[:, :first]
        self._heard[:, : count - first] = queries[:, first:]
        self._count += count

    def written(self, slots: Tensor) -> None:
        self._fresh = None
        if self.structure is not None:
            slots = slots[slots < self.structure.covered]
            self._current[slots] = False
            self._overwritten = self._overwritten or len(slots) > 0

    def kept(self, slots: Tensor) -> None:
        self._fresh = None
        if self.structure is None:
            return
        covered = self.structure.covered
        slots = slots[slots < covered]
        moved = torch.full((covered,), -1, dtype=torch.long, device=slots.device)
        moved[slots] = torch.arange(len(slots), device=slots.device)
        self._current = self._current[slots]
        self.structure.kept(moved)
        if self.structure.covered < 3 * self.structure.size // 4:  # mostly holes
            self.structure, self.plans = None, {}

    def up_to_date(self, live: int) -> bool:
        """Whether the structure holds nearly all of the row's ``live`` keys."""
        if self.structure is None:
            return False
        if live < self.structure.covered:
            self.kept(torch.arange(live, device=self._current.device))
            return self.structure is not None and self.up_to_date(live)
        return len(self._changed(live)) <= live // 16

    def build(self, build: Build, keys: Tensor) -> None:
        """From keys (Hkv, n, D)."""
        self.structure, self.plans, self._fresh = None, {}, None  # the old one need not stay beside the new one
        self.structure = build(keys, self._heard[:, : self.heard])
        self._current = torch.ones(self.structure.covered, dtype=torch.bool, device=keys.device)
        self._overwritten = False

    def tune(self, exact: ExactIndex, keys: Tensor, num: int, recall: float) -> None:
        """Set how much each head reads for ``num`` chunks, by what the queries heard would have had to."""
        structure = self.structure
        assert structure is not None
        asked = self._heard[:, : self.heard]
        _, best = exact.search(asked[None], keys[None], [0], [keys.shape[1]], num)
        inside = best[0] < structure.covered
        inside &= self._current[best[0].clamp_max(structure.covered - 1)]
        self.plans[num] = [
            structure.plan(head, asked[head], best[0, head], inside[head], recall) for head in range(len(keys))
        ]

    def search(self, queries: Tensor, keys: Tensor, scores: Tensor, slots: Tensor) -> bool:
        """Fill scores and slots (Hkv, Q, R) for queries (Hkv, Q, D), keys (Hkv, n, D); False: too few were found."""
        assert self.structure is not None
        num = scores.shape[2]
        changed, fresh = self._beside(keys)
        current = self._current if self._overwritten else None
        self._used = self.plans[num]
        for head, plan in enumerate(self._used):
            for at, query in enumerate(queries[head]):
                best, where = self.structure.search(head, query, plan, num, current, keys[head])
                if len(changed):
                    best = torch.cat((best, torch.mv(fresh[head].to(torch.float32), query)))
                    where = torch.cat((where, changed))
                    best, order = best.topk(min(num, len(best)))
                    where = where[order]
                if len(best) < num or not bool(best[-1] > -torch.inf):
                    return False
                scores[head, at], slots[head, at] = best, where
        return True

    def _changed(self, live: int) -> Tensor:
        """Slots whose key is not in the structure, ascending."""
        if self._fresh is None or self._fresh[0] != live:
            assert self.structure is not None
            behind = torch.arange(self.structure.covered, live, device=self._current.device)
            changed = torch.cat(((~self._current).nonzero().flatten(), behind)) if self._overwritten else behind
            self._fresh = (live, changed, torch.empty(0))
        return self._fresh[1]

    def _beside(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """These slots (f,) and their keys (Hkv, f, D)."""
        changed = self._changed(keys.shape[1])
        assert self._fresh is not None
        if len(changed) and not self._fresh[2].numel():
            self._fresh = (self._fresh[0], changed, keys.index_select(1, changed))
        return changed, self._fresh[2]
