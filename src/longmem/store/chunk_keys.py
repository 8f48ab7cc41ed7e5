"""The chunk keys of one row of a bank, as an index searches them.

Hkv key/value heads · D head_dim · Q queries per key/value head · R retrieved chunks · n chunks that can be found
"""

from __future__ import annotations

import torch
from torch import Tensor

from longmem.memory.index import Index
from longmem.store.places import Places, copies


class RowKeys:
    """Mean keys of a row's chunks, side by side: what is forgotten is taken out, so that search never sees it.

    Args:
        places: of the bank.
        row: whose keys.
        index: of this row alone.
        device: where to search.
        dtype: of the keys there.
        before: places and keys from which what is already loaded is copied.

    Attributes:
        numbers: (n,) long, the chunk's number in the row for every slot; None where it is the slot itself.
        live: n.
    """

    def __init__(
        self,
        places: Places,
        row: int,
        index: Index,
        device: torch.device,
        dtype: torch.dtype,
        before: tuple[Places, RowKeys] | None = None,
    ) -> None:
        self.index = index
        base, total = int(places.bases[row]), int(places.bases[row + 1] - places.bases[row])
        alive = torch.from_numpy(places.alive(row))
        self.live = int(alive.sum())
        self.numbers = None if self.live == total else alive.nonzero().flatten().to(device)
        layout = places.layout
        self.keys = torch.empty(1, layout.heads_kv, self.live, layout.head_dim, dtype=dtype, device=device)
        slot, same = 0, 0  # ``same``: leading slots that hold what they held before
        for copy in copies(places, None if before is None else before[0], row):
            target = self.keys[0, :, slot : slot + copy.count]
            if copy.old is not None and before is not None:
                first = before[1].slot_of(copy.old - int(before[0].bases[row]))
                target.copy_(before[1].keys[0, :, first : first + copy.count])
                same += copy.count if first == slot == same else 0
            else:
                found = places.files[copy.file].keys(copy.chunk, copy.chunk + copy.count)
                target.copy_(found.to(device).transpose(0, 1))
            slot += copy.count
        assert slot == self.live, f"row {row} from {base} has {slot} keys for {self.live} chunks"
        if before is None or same < before[1].live:  # the index begins anew
            index.cleared(torch.zeros(1, dtype=torch.long))
            same = 0
        slots = torch.arange(same, self.live, device=device)
        index.written(self.keys, torch.zeros_like(slots), slots)

    @property
    def nbytes(self) -> int:
        """Of the keys."""
        return self.keys.numel() * self.keys.element_size()

    def slot_of(self, number: int) -> int:
        """Where the key of a chunk lies."""
        return number if self.numbers is None else int(torch.searchsorted(self.numbers, number))

    def search(self, queries: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best chunks of queries (b, Hkv, Q, D).

        Returns:
            scores (b, Hkv, Q, R) float32, numbers in the row (b, Hkv, Q, R) long, best first, and (R,) bool where there
            is any; elsewhere both are 0.
        """
        lines = queries.shape[0]
        exists = torch.arange(num, device=queries.device) < self.live
        if not self.live:
            nothing = torch.zeros(*queries.shape[:3], num, device=queries.device)
            return nothing, nothing.long(), exists
        scores, slots = self.index.search(queries, self.keys, [0] * lines, [self.live] * lines, num)
        if self.live < num:
            scores, slots = scores.masked_fill(~exists, 0.0), slots.masked_fill(~exists, 0)
        return scores, slots if self.numbers is None else self.numbers[slots], exists

    def forget(self, places: Places, row: int) -> None:
        """Take out what is alive no longer; the rest moves up, and what is behind it is overwritten."""
        alive = torch.from_numpy(places.alive(row)).to(self.keys.device)
        numbers = torch.arange(len(alive), device=alive.device) if self.numbers is None else self.numbers
        stays = alive[numbers].nonzero().flatten()
        if len(stays) == self.live:
            return
        for head in self.keys[0]:  # one head at a time: a copy of all keys need not fit beside them
            head[: len(stays)] = head.index_select(0, stays)
            head[len(stays) :] = 0
        self.numbers, self.live = numbers[stays], len(stays)
        self.keys = self.keys[:, :, : self.live]
        self.index.kept(0, stays)
