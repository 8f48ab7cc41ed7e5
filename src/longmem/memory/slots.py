"""The storage behind a bank: a ring of chunk slots per row.

Chunk number n of a row lies in slot ``n % slots``: when the ring is full the oldest chunk is overwritten, and the
slots in use are always the first ones. Behind them lies the null chunk, always zero, which stands for "nothing found".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longmem.errors import MemoryBankError
from longmem.memory.chunking import mean_keys
from longmem.memory.index import Index
from longmem.memory.ledger import Ledger


class Slots:
    """Chunks of every row, the keys they are searched by, and their provenance.

    Attributes:
        storage: (rows, slots + 1, Hkv, 2, S, D); the last slot is the null chunk.
        keys: (rows, Hkv, slots, D), mean key of each chunk.
        lengths: (rows, slots + 1) long, real tokens in each chunk; 0 where a slot is not in use.
        written: per row, chunks it was ever given; the next chunk's number.
    """

    def __init__(
        self,
        rows: int,
        slots: int,
        heads_kv: int,
        head_dim: int,
        chunk_size: int,
        dtype: torch.dtype,
        key_dtype: torch.dtype,
        device: torch.device,
        index: Index,
    ) -> None:
        self.slots = slots
        self.storage = torch.zeros(rows, slots + 1, heads_kv, 2, chunk_size, head_dim, dtype=dtype, device=device)
        self.keys = torch.zeros(rows, heads_kv, slots, head_dim, dtype=key_dtype, device=device)
        self.lengths = torch.zeros(rows, slots + 1, dtype=torch.long, device=device)
        self.written = [0] * rows
        self.ledger = Ledger(rows, slots)
        self.index = index

    def live(self, row: int) -> int:
        """Chunks in use in this row."""
        return min(self.written[row], self.slots)

    def number(self, rows: list[int], count: int) -> Tensor:
        """Hand out the next ``count`` chunk numbers to every entry of ``rows`` in turn: (L, count)."""
        first = []
        for row in rows:
            first.append(self.written[row])
            self.written[row] += count
        return torch.tensor(first)[:, None] + torch.arange(count)

    def write(
        self, rows: list[int], chunks: Tensor, lengths: Tensor, documents: Tensor, start: Tensor, time: float
    ) -> None:
        """Store the same number of chunks for every entry of ``rows``; of more than fit, the newest stay.

        Args:
            rows: L rows; one row may come several times (a shared bank).
            chunks: (L, n, Hkv, 2, S, D) with zeros behind the real tokens, not yet rounded.
            lengths: (L, n) long, on the CPU.
            documents: (L, n) ledger ids.
            start: (L, n) offset of each chunk's first token in its document.
            time: when this was said.
        """
        count = chunks.shape[1]
        number = self.number(rows, count)
        row = torch.tensor(rows)[:, None].expand_as(number)
        stays = number >= torch.tensor([self.written[r] - self.slots for r in rows])[:, None]
        flat = chunks.flatten(0, 1)
        if not bool(stays.all()):
            flat = flat[stays.flatten().to(flat.device)]
        self.put(row[stays], number[stays] % self.slots, flat, lengths[stays])
        self.ledger.write(row[stays], number[stays] % self.slots, documents[stays], start[stays], number[stays], time)

    def put(self, rows: Tensor, slots: Tensor, chunks: Tensor, lengths: Tensor) -> None:
        """Write M chunks (M, Hkv, 2, S, D) to the slots (M,) of the rows (M,)."""
        row, slot, length = (each.to(self.storage.device) for each in (rows, slots, lengths))
        self.storage[row, slot] = chunks.to(self.storage.dtype)
        self.keys[row, :, slot] = mean_keys(chunks, length).to(self.keys.dtype)
        self.lengths[row, slot] = length
        self.index.written(self.keys, row, slot)

    def clear(self, rows: list[int]) -> None:
        """Empty these rows; their chunk numbers start again at zero."""
        chosen = torch.tensor(rows, dtype=torch.long)
        for row in rows:
            self.written[row] = 0
        self.lengths[chosen.to(self.lengths.device), : self.slots] = 0
        self.ledger.clear(chosen)
        self.index.cleared(chosen)

    @property
    def nbytes(self) -> int:
        """Bytes of storage, keys and lengths."""
        return sum(each.numel() * each.element_size() for each in (self.storage, self.keys, self.lengths))

    def state_dict(self) -> dict[str, Any]:
        """What is in use, as copies."""
        used = max(self.live(row) for row in range(len(self.written)))
        return {
            "storage": self.storage[:, :used].clone(),
            "keys": self.keys[:, :, :used].clone(),
            "lengths": self.lengths[:, :used].clone(),
            "written": list(self.written),
            "ledger": self.ledger.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self.clear(list(range(len(self.written))))
        used = state["storage"].shape[1]
        self.storage[:, :used].copy_(state["storage"])
        self.keys[:, :, :used].copy_(state["keys"])
        self.lengths[:, :used].copy_(state["lengths"])
        self.written = list(state["written"])
        self.ledger.load_state_dict(state["ledger"])
        for row in range(len(self.written)):
            slots = torch.arange(self.live(row), device=self.keys.device)
            self.index.written(self.keys, torch.full_like(slots, row), slots)


class ReleasedSlots(Slots):
    """One row kept as the released code keeps it (OFFICIAL.md 1.4): slot = chunk number - chunks evicted so far.

    Before n chunks are added to a store that would then be full, ``evict`` chunks are dropped from the front and the
    rest moves up. The store's last slot is never written and answers for missing chunks: it is the null chunk here,
    and counts as S real tokens of zeros.
    """

    def __init__(self, rows: int, slots: int, *args: Any) -> None:
        super().__init__(rows, slots - 1, *args)
        self.fill = 0
        self.lengths[:, -1] = self.storage.shape[4]

    def live(self, row: int) -> int:
        """Chunks in use."""
        return self.fill

    def make_room(self, count: int, evict: int) -> None:
        """Apply the released rule before ``count`` chunks are added; ``evict`` is its (2 B T) // C."""
        capacity = self.slots + 1
        if self.fill + count < capacity:
            return
        if evict > self.fill:
            size = self.storage.shape[4]
            raise MemoryBankError(
                f"capacity_tokens ({capacity * size}) is too small for released eviction: adding {count} chunks to "
                f"{self.fill} drops {evict} first; use at least {3 * count * size} tokens, or eviction='oldest'"
            )
        left = self.fill - evict
        for array in (self.storage[0], self.lengths[0], self.keys[0].transpose(0, 1)):
            array[:left] = array[evict : self.fill].clone()
            array[left : self.fill] = 0
        self.index.kept(0, torch.arange(evict, self.fill, device=self.keys.device))
        self.ledger.shift(0, evict)
        self.fill = left

    def write(
        self, rows: list[int], chunks: Tensor, lengths: Tensor, documents: Tensor, start: Tensor, time: float
    ) -> None:
        """See ``Slots.write``; ``rows`` is [0] and there is room."""
        number = self.number(rows, chunks.shape[1])
        slots = torch.arange(self.fill, self.fill + chunks.shape[1])
        self.put(torch.zeros_like(slots), slots, chunks[0], lengths[0])
        self.ledger.write(torch.zeros_like(slots), slots, documents[0], start[0], number[0], time)
        self.fill += chunks.shape[1]

    def clear(self, rows: list[int]) -> None:
        """Empty the store."""
        super().clear(rows)
        self.storage.zero_()
        self.fill = 0

    def state_dict(self) -> dict[str, Any]:
        """What is in use, as copies."""
        return {**super().state_dict(), "fill": self.fill}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        super().load_state_dict(state)
        self.fill = state["fill"]
