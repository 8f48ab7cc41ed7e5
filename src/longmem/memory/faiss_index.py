"""Faiss as a partial search: an inverted file of 8-bit codes for each head (IVF-SQ8), its finds ranked by exact scores.

Needs the ``faiss`` extra; faiss is imported when an index of this kind is made. Runs on the CPU.

Hkv key/value heads · n keys · D head_dim · m queries heard · R retrieved chunks
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from longmem.errors import ConfigError
from longmem.memory.blocks import Reach, felt_distance
from longmem.memory.partial import PartialIndex

FIRST = 4
"""Lists read in any case, to know what score is to be beaten."""

RANKED_ANEW = 4
"""Finds ranked by exact scores, as a multiple of R: what 8-bit codes put in the wrong order is mended."""


def faiss_index(**settings: Any) -> PartialIndex:
    """A ``PartialIndex`` over ``Lists``.

    Raises:
        ConfigError: faiss is not installed.
    """
    _faiss()
    return PartialIndex(Lists, **settings)


class Lists:
    """Keys of one row in lists around k-means centres, compared as ``felt_distance`` has it; see ``Blocks``."""

    def __init__(self, keys: Tensor, heard: Tensor) -> None:
        heads, count, dim = keys.shape
        faiss = _faiss()
        self.covered = self.size = count
        self.groups = 1 << max(0, round(math.log2(max(1.0, min(4 * count**0.5, count / 64)))))
        self.homes = torch.empty(heads, count, dtype=torch.int32)
        self.centres = torch.empty(heads, self.groups, dim)
        self._back = torch.empty(heads, dim, dim)
        self._middle = torch.empty(heads, dim)
        self._spread = torch.empty(heads, dim, dim)
        self._files: list[Any] = []
        self._moved: Tensor | None = None
        for head in range(heads):
            felt = felt_distance(heard[head]).cpu()
            self._back[head] = torch.linalg.inv(felt)
            moved = keys[head].cpu().to(torch.float32) @ felt
            self._middle[head] = keys[head].cpu().to(torch.float32).mean(0)
            points = (moved - moved.mean(0)).numpy()  # the mean adds the same to every score: it ranks nothing
            rough = faiss.Kmeans(dim, self.groups, niter=5, max_points_per_centroid=40, seed=0)
            rough.train(points)
            self.centres[head] = torch.from_numpy(rough.centroids)
            plain = faiss.IndexFlatL2(dim)
            plain.add(rough.centroids)
            file = faiss.IndexIVFScalarQuantizer(
                plain, dim, self.groups, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
            )
            file.train(points[:: max(1, count // 65536)])
            self.homes[head] = torch.from_numpy(plain.search(points, 1)[1][:, 0])
            file.add(points)
            off = torch.from_numpy(points) - self.centres[head][self.homes[head].long()]
            values, vectors = torch.linalg.eigh(off.T @ off / count)
            self._spread[head] = (vectors * values.clamp_min(0).sqrt()).T @ self._back[head]
            self._files.append(file)

    @property
    def nbytes(self) -> int:
        """Of codes, their numbers, the lists' centres and the key's list."""
        codes = sum(int(file.ntotal) * (int(file.code_size) + 8) for file in self._files)
        return codes + sum(each.numel() * each.element_size() for each in (self.homes, self.centres))

    def short(self, head: int, queries: Tensor, scores: Tensor, slots: Tensor, inside: Tensor) -> Tensor:
        """How far below the score to be beaten the lists of the best lie, (1, m, R); see ``Blocks.short``."""
        homes = self.homes[head] if self._moved is None else self.homes[head][self._moved >= 0]
        home = homes[slots.masked_fill(~inside, 0).cpu()].long()
        queries, scores = queries.cpu(), scores.cpu()
        near = (queries @ self._back[head] @ self.centres[head].T).gather(1, home)
        near = near + (queries @ self._middle[head])[:, None]
        spread = (queries @ self._spread[head].T).norm(dim=1).clamp_min(1e-20)
        short: Tensor = (scores[:, -1:] - near) / spread[:, None]
        return short.masked_fill(~inside.cpu(), -torch.inf)[None].to(slots.device)

    def search(
        self, queries: Tensor, reach: list[Reach], num: int, current: Tensor | None, keys: Tensor
    ) -> tuple[Tensor, Tensor, float]:
        """The best of the lists within reach; see ``Blocks.search``."""
        scores = torch.full((len(queries), num), -torch.inf, device=queries.device)
        where = torch.zeros((len(queries), num), dtype=torch.long, device=queries.device)
        read = 0.0
        for head, query in enumerate(queries):
            asked = query.cpu()
            near = torch.mv(self.centres[head], self._back[head] @ asked)
            lists = min(FIRST, self.groups)
            best, slots = self._of(head, query, near, lists, num, current, keys[head])
            spread = max(1e-20, float((self._spread[head] @ asked).norm()))
            beat = float(best[-1]) if len(best) >= num else -math.inf
            within = int((near >= beat - float(asked @ self._middle[head]) - reach[head][-1] * spread).sum())
            if within > lists:
                lists = within
                best, slots = self._of(head, query, near, lists, num, current, keys[head])
            scores[head, : len(best)], where[head, : len(best)] = best, slots
            read += self.groups + lists / self.groups / 4 * self.size
        return scores, where, read

    def _of(
        self, head: int, query: Tensor, near: Tensor, lists: int, num: int, current: Tensor | None, keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores and slots of the best of so many lists, those whose centres score most (groups,)."""
        nearest = near.topk(lists)
        file = self._files[head]
        file.nprobe = lists
        asked = self._back[head] @ query.cpu()
        found = file.search_preassigned(
            asked[None].numpy(), RANKED_ANEW * num, nearest.indices[None].numpy(), nearest.values[None].numpy()
        )[1][0]
        slots = torch.from_numpy(found[found >= 0])
        if self._moved is not None:
            slots = self._moved[slots]
            slots = slots[slots >= 0]
        slots = slots.to(keys.device)
        if current is not None:
            slots = slots[current[slots]]
        best = torch.mv(keys.index_select(0, slots).to(torch.float32), query).topk(min(num, len(slots)))
        return best.values, slots[best.indices]

    def kept(self, moved: Tensor) -> None:
        """Slot s is now slot ``moved[s]``, -1: it is gone. Its code is overwritten when the lists are built anew."""
        moved = moved.cpu()
        before = self._moved
        self._moved = moved if before is None else torch.where(before >= 0, moved[before.clamp_min(0)], -1)
        self.covered = int((moved >= 0).sum())


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            "index ('faiss') needs faiss, which is not installed; pip install 'longmem-lm[faiss]', or use 'two_stage'"
        ) from error
    return faiss
