"""The storage of a bank: a ring of chunk slots per row, and where each chunk came from.

Chunk number n of a row is in slot ``n % slots``: once the ring is full, a new chunk overwrites the oldest one, and the
slots in use are always the first ones. The last slot is the null chunk, always zero, which stands for "nothing found".
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from longmem.memory.chunking import mean_keys
from longmem.types import ChunkOrigin

Run = tuple[int, str | None, int, float]
"""Chunks written together: number of the first one, document, its first token there, time of writing."""


class Slots:
    """Chunks of every row, the keys they are searched by, and their origins.

    Hkv counts the key/value heads of all remembered layers.

    Attributes:
        storage: (rows, slots + 1, Hkv, 2, S, D); the last slot is the null chunk.
        keys: (rows, Hkv, slots, D), mean key of each chunk.
        lengths: (rows, slots + 1) long, real tokens in each chunk; 0 where a slot is not in use.
        written: per row, chunks it was ever given; the next chunk's number.
        runs: per row, the runs of chunks that are still there, oldest first.
    """

    def __init__(
        self,
        rows: int,
        slots: int,
        heads: int,
        head_dim: int,
        chunk_size: int,
        dtype: torch.dtype,
        key_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.slots = slots
        self.storage = torch.zeros(rows, slots + 1, heads, 2, chunk_size, head_dim, dtype=dtype, device=device)
        self.keys = torch.zeros(rows, heads, slots, head_dim, dtype=key_dtype, device=device)
        self.lengths = torch.zeros(rows, slots + 1, dtype=torch.long, device=device)
        self.written = [0] * rows
        self.runs: list[list[Run]] = [[] for _ in range(rows)]

    @property
    def nbytes(self) -> int:
        """Bytes of storage, keys and lengths."""
        return sum(each.numel() * each.element_size() for each in (self.storage, self.keys, self.lengths))

    def live(self, row: int) -> int:
        """Chunks in use in this row."""
        return min(self.written[row], self.slots)

    def write(
        self,
        rows: Sequence[int],
        chunks: Tensor,
        lengths: Sequence[int] | None,
        documents: Sequence[str | None],
        first: Sequence[int],
        time: float,
    ) -> tuple[Tensor, Tensor]:
        """Store the same number of chunks for every entry of ``rows``; of more than fit, the newest stay.

        Args:
            rows: L rows; one row may come several times (a shared bank).
            chunks: (L, n, Hkv, 2, S, D) with zeros behind the real tokens, not yet rounded.
            lengths: per line, real tokens in each of its chunks; None is S.
            documents: per line.
            first: per line, where in its document its first chunk begins.
            time: of writing.

        Returns:
            rows (M,) and slots (M,) that were written.
        """
        count, size = chunks.shape[1], chunks.shape[4]
        number = torch.empty(len(rows), count, dtype=torch.long)
        for line, row in enumerate(rows):
            number[line] = torch.arange(count) + self.written[row]
            self.runs[row].append((self.written[row], documents[line], first[line], time))
            self.written[row] += count
        for row in set(rows):  # let go of runs whose last chunk was overwritten
            runs, oldest = self.runs[row], self.written[row] - self.slots
            del runs[: max(0, bisect_right(runs, oldest, key=itemgetter(0)) - 1)]
        row_of = torch.tensor(rows)[:, None].expand_as(number)
        length = torch.full((len(rows), count), size) if lengths is None else torch.tensor(lengths)[:, None]
        length = length.expand_as(number)
        flat = chunks.flatten(0, 1)
        stays = number >= torch.tensor([self.written[row] - self.slots for row in rows])[:, None]
        if not bool(stays.all()):
            flat = flat[stays.flatten().to(flat.device)]
        place = row_of[stays], number[stays] % self.slots
        self.put(*place, flat, length[stays])
        return place

    def put(self, rows: Tensor, slots: Tensor, chunks: Tensor, lengths: Tensor) -> None:
        """Write M chunks (M, Hkv, 2, S, D) to the slots (M,) of the rows (M,)."""
        row, slot, length = (each.to(self.storage.device) for each in (rows, slots, lengths))
        self.storage[row, slot] = chunks.to(self.storage.dtype)
        self.keys[row, :, slot] = mean_keys(chunks, length).to(self.keys.dtype)
        self.lengths[row, slot] = length

    def clear(self, rows: Sequence[int]) -> None:
        """Empty these rows; their chunk numbers start again at zero."""
        for row in rows:
            self.written[row], self.runs[row] = 0, []
            self.lengths[row, : self.slots] = 0

    def origin(self, row: int, slot: int) -> ChunkOrigin:
        """Where the chunk in a slot in use came from."""
        last = self.written[row] - 1
        number = last - (last - slot) % self.slots  # the newest chunk that this slot was given
        runs = self.runs[row]
        begin, document, first, time = runs[bisect_right(runs, number, key=itemgetter(0)) - 1]
        start = first + (number - begin) * self.storage.shape[4]
        return ChunkOrigin(document, start, int(self.lengths[row, slot]), number, time)

    def state_dict(self) -> dict[str, Any]:
        """What is in use, as copies."""
        used = max(self.live(row) for row in range(len(self.written)))
        return {
            "storage": self.storage[:, :used].clone(),
            "keys": self.keys[:, :, :used].clone(),
            "lengths": self.lengths[:, :used].clone(),
            "written": list(self.written),
            "runs": [list(runs) for runs in self.runs],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``; also of states of version 0.1, with a table of chunks."""
        self.clear(range(len(self.written)))
        used = state["storage"].shape[1]
        self.storage[:, :used].copy_(state["storage"])
        self.keys[:, :, :used].copy_(state["keys"])
        self.lengths[:, :used].copy_(state["lengths"])
        self.written = list(state["written"])
        if "ledger" in state:
            self.runs = [self._runs_of(state["ledger"], row) for row in range(len(self.written))]
        else:
            self.runs = [[(int(n), name, int(at), float(time)) for n, name, at, time in runs] for runs in state["runs"]]

    def _runs_of(self, table: dict[str, Any], row: int) -> list[Run]:
        """A run for every chunk of a table of version 0.1: document, start, number and time of each slot."""
        spelled = {number: name for name, number in table["names"].items()}
        columns = (table[name][row, : self.live(row)].tolist() for name in ("number", "document", "start", "time"))
        return sorted(
            (
                (number, spelled.get(document), start, time)
                for number, document, start, time in zip(*columns, strict=True)
            ),
            key=itemgetter(0),
        )
