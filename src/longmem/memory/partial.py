"""``PartialIndex``: finds nearly all of the best keys by reading a part of them.

What is shared by all such searches is here: when to read everything after all, how far to reach for the recall asked
for, and how a structure built once keeps up with a memory that changes.

Hkv key/value heads · Q queries per key/value head · D head_dim · R retrieved chunks
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from longmem.memory.blocks import LEAST, Reach
from longmem.memory.index import ExactIndex

HEARD = 256
"""Queries of each key/value head remembered for building."""

LATER = 64
"""Queries taken of each later segment where ``HEARD`` are remembered already: those of the last four are mixed."""

PROBES = ((8, 512), (32, None))
"""A search of one head in so many is made exactly too: one head of every 8th token at first, then of every 32nd."""

STEP = 2.0
"""Spreads by which the reach of a head grows where a probe shows that all was missed."""

JUDGED = 16
"""Queries of a segment, which is searched exactly anyhow, from which is learned what a search in part would miss."""


class Structure(Protocol):
    """The keys of one row, grouped; see ``Blocks`` for its methods."""

    size: int
    covered: int

    @property
    def nbytes(self) -> int: ...
    def short(self, head: int, queries: Tensor, scores: Tensor, slots: Tensor, inside: Tensor) -> Tensor: ...
    def search(
        self, queries: Tensor, reach: list[Reach], num: int, current: Tensor | None, keys: Tensor
    ) -> tuple[Tensor, Tensor, float]: ...
    def kept(self, moved: Tensor) -> None: ...


Build = Callable[[Tensor, Tensor], Structure]
"""Makes it of keys (Hkv, n, D) and queries heard (Hkv, m, D)."""


class PartialIndex:
    """Few queries at a time read the part of the keys that suits them; everything else is searched exactly.

    Exact are: segments (many queries together read nearly every key anyway, and a matrix product does it faster), rows
    with few chunks, and a row's first searches, until ``enough`` queries were heard. Then, at the next search of few
    queries, the structure is built, and each head's *reach* is set so that the queries heard would have found the share
    ``recall`` of their best keys; a head for which less would do reaches as far as the middle one.

    From then on the reach follows the text. Of every few searches (``PROBES``) that of one head, all heads in turn, is
    made exactly as well, and gives the exact answer: each such probe moves the head's reach by
    ``STEP * (share missed - (1 - recall))`` spreads, so that it grows at once where much was missed and falls slowly
    where nothing was. The mean share missed by n probes is then at most ``1 - recall`` plus what the reach grew by,
    divided by ``n * STEP``, whatever the text does. Segments teach the same.

    What is found therefore depends on the queries and writes of this row so far and their order, and on nothing else:
    the same calls in the same order give the same answers.

    Keys written later are searched exactly beside the structure, until they are more than a sixteenth of the row; then
    it is built anew. Keys that were overwritten or forgotten are never found. Scores are exact inner products.

    Args:
        build: makes the structure.
        recall: share of the best R keys that is aimed at; at 1 all is read.
        least: chunks below which a row is searched exactly.
        few: queries per key/value head and row up to which a search reads a part.
        enough: queries per key/value head to be heard before building.
        worth: share of the keys' bytes read so far beyond which a row is searched exactly, until it is built anew.
        probes: whether the reach follows the text; without, it stays as the first queries set it.
    """

    def __init__(
        self,
        build: Build,
        *,
        recall: float = 0.97,
        least: int = 32768,
        few: int = 8,
        enough: int = 64,
        worth: float = 0.25,
        probes: bool = True,
    ) -> None:
        self.build = build
        self.recall = recall
        self.least = max(least, LEAST)
        self.few = few
        self.enough = enough
        self.worth = worth
        self.probes = probes and recall < 1
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
            scores, slots = self._exact.search(queries, keys, rows, live, num)
            if self.probes and queries.shape[2] > self.few:
                for line, (number, used) in enumerate(zip(rows, live, strict=True)):
                    self._rows[number].learn(queries[line], used, scores[line], slots[line], 1 - self.recall)
            return scores, slots
        shape = (*queries.shape[:3], num)
        scores = torch.zeros(shape, dtype=torch.float32, device=queries.device)
        slots = torch.zeros(shape, dtype=torch.long, device=queries.device)
        left = []
        for line, (number, used) in enumerate(zip(rows, live, strict=True)):
            if line not in partly or not self._in_part(
                partly[line], queries[line].to(torch.float32), keys[number, :, :used], scores[line], slots[line]
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
        if num not in row.reach:
            row.tune(self._exact, keys, num, self.recall)
        # the first few tell little of how much is read
        return self.recall >= 1 or row.searches < 8 * len(keys) or row.share_read <= self.worth

    def _in_part(self, row: _Row, queries: Tensor, keys: Tensor, scores: Tensor, slots: Tensor) -> bool:
        """Fill scores and slots (Hkv, Q, R) for queries (Hkv, Q, D), keys (Hkv, n, D); False: too few were found."""
        heads, num = len(keys), scores.shape[2]
        for at in range(queries.shape[1]):
            probed = row.probed(heads) if self.probes else -1
            if not row.search(queries[:, at], keys, scores[:, at], slots[:, at]):
                return False
            if probed >= 0:
                one = slice(probed, probed + 1)
                best, where = self._exact.search(
                    queries[None, one, at : at + 1], keys[None, one], [0], [keys.shape[1]], num
                )
                missed = 1.0 - float((where[0, 0, 0, :, None] == slots[probed, at]).any(-1).float().mean())
                row.move(probed, num, missed - (1 - self.recall))
                row.read += keys.shape[1]
                scores[probed, at], slots[probed, at] = best[0, 0, 0], where[0, 0, 0]
        return True


class _Row:
    """What is known of one row.

    Attributes:
        structure: None until it is built.
        reach: of each head, by R.
        searches: by one query of one head, since the structure was built.
        read: keys whose bytes were read for them.
    """

    def __init__(self) -> None:
        self.structure: Structure | None = None
        self.reach: dict[int, list[Reach]] = {}
        self.searches = 0
        self.read = 0.0
        self._heard = torch.empty(0)
        self._count = 0
        self._current = torch.empty(0, dtype=torch.bool)  # (covered,) False: overwritten since
        self._overwritten = False
        self._fresh: tuple[int, Tensor, Tensor] | None = None
        self._asked = 0

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
        if self.structure is None or not self.searches:
            return 1.0
        return (
            self.read / self.searches / (self.structure.covered + (0 if self._fresh is None else len(self._fresh[1])))
        )

    def hear(self, queries: Tensor) -> None:
        """Remember the latest of queries (Hkv, Q, D); of more than there is room for, evenly spaced ones."""
        count = queries.shape[1]
        most = max(HEARD - self._count, LATER)
        if count > most:
            queries = queries[:, torch.arange(most, device=queries.device) * count // most]
            count = most
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
            self.structure, self.reach = None, {}

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
        self.structure, self.reach, self._fresh = None, {}, None  # the old one need not stay beside the new one
        self.structure = build(keys, self._heard[:, : self.heard])
        self._current = torch.ones(self.structure.covered, dtype=torch.bool, device=keys.device)
        self._overwritten = False
        self.searches, self.read = 0, 0.0

    def tune(self, exact: ExactIndex, keys: Tensor, num: int, recall: float) -> None:
        """Set the reach of each head for ``num`` chunks, by what the queries heard would have had to read."""
        structure = self.structure
        assert structure is not None
        asked = self._heard[:, : self.heard]
        if recall >= 1:
            self.reach[num] = [(torch.inf, torch.inf)] * len(keys)
            return
        best, where = exact.search(asked[None], keys[None], [0], [keys.shape[1]], num)
        needed = torch.stack(
            [self._short(head, asked[head], best[0, head], where[0, head]) for head in range(len(keys))]
        )
        levels = needed.shape[1]
        # the upper levels may lose, together, half of what may be lost
        shares = [1 - (1 - recall) / 2] * (levels - 1) + [recall]
        last = needed.flatten(2).shape[2] - 1
        reach = torch.stack(
            [needed[:, level].flatten(1).sort().values[:, int(shares[level] * last)] for level in range(levels)], dim=1
        )
        # a head's first queries may all have been easy: what is enough for the middle one it is given too
        reach = torch.maximum(reach, reach.median(0).values).clamp_min(0.0)
        self.reach[num] = [tuple(each) for each in reach.tolist()]

    def _short(self, head: int, queries: Tensor, scores: Tensor, slots: Tensor) -> Tensor:
        """See ``Blocks.short``."""
        structure = self.structure
        assert structure is not None
        inside = slots < structure.covered
        inside &= self._current[slots.clamp_max(structure.covered - 1)]
        return structure.short(head, queries, scores, slots, inside)

    def learn(self, queries: Tensor, live: int, scores: Tensor, slots: Tensor, allowed: float) -> None:
        """Move the reach by what queries (Hkv, Q, D) of a segment found exactly, scores and slots (Hkv, Q, R)."""
        num = scores.shape[2]
        if num not in self.reach or live < num or not self.up_to_date(live):
            return
        picked = torch.arange(JUDGED, device=queries.device) * queries.shape[1] // JUDGED
        asked = queries[:, picked].to(torch.float32)
        for head, reach in enumerate(self.reach[num]):
            short = self._short(head, asked[head], scores[head, picked], slots[head, picked])
            missed = (short > torch.tensor(reach, device=short.device)[:, None, None]).any(0).float().mean()
            self.move(head, num, float(missed) - allowed)

    def move(self, head: int, num: int, by: float) -> None:
        """Let a head reach further, by a share that was missed above what may be."""
        self.reach[num][head] = tuple(max(0.0, each + STEP * by) for each in self.reach[num][head])

    def probed(self, heads: int) -> int:
        """Which head the next search is to be made exactly for too; -1: none."""
        self._asked += 1
        every = next(every for every, until in PROBES if until is None or self._asked <= until)
        return -1 if self._asked % every else self._asked // every % heads

    def search(self, queries: Tensor, keys: Tensor, scores: Tensor, slots: Tensor) -> bool:
        """Fill scores and slots (Hkv, R) for queries (Hkv, D), keys (Hkv, n, D); False: too few were found."""
        assert self.structure is not None
        num = scores.shape[1]
        changed, fresh = self._beside(keys)
        current = self._current if self._overwritten else None
        best, where, read = self.structure.search(queries, self.reach[num], num, current, keys)
        self.searches, self.read = self.searches + len(keys), self.read + read + len(keys) * len(changed)
        if len(changed):
            beside = torch.bmm(fresh.to(torch.float32), queries[:, :, None])[:, :, 0]
            best, order = torch.cat((best, beside), dim=1).topk(num)
            where = torch.cat((where, changed.expand(len(keys), -1)), dim=1).gather(1, order)
        if not bool((best[:, -1] > -torch.inf).all()):
            return False
        scores[:], slots[:] = best, where
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
