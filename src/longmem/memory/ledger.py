"""Where each chunk of a bank came from: document, token offset, number and time of writing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longmem.types import ChunkOrigin


class Ledger:
    """Provenance arrays (rows, slots) on the CPU; document names are kept once, in a table."""

    def __init__(self, rows: int, slots: int) -> None:
        self.document = torch.full((rows, slots), -1)
        self.start = torch.zeros(rows, slots, dtype=torch.long)
        self.number = torch.full((rows, slots), -1)
        self.time = torch.zeros(rows, slots, dtype=torch.float64)
        self._names: dict[str, int] = {}
        self._spelled: dict[int, str] = {}  # the same the other way round
        self._next = 0

    def ids(self, documents: Sequence[str | None]) -> Tensor:
        """Numbers (n,) that stand for these documents in ``write``; -1 for None."""
        self._drop_unused_names()
        return torch.tensor([self._id(name) for name in documents], dtype=torch.long)

    def write(self, rows: Tensor, slots: Tensor, documents: Tensor, start: Tensor, number: Tensor, time: float) -> None:
        """Record M chunks; all arguments but ``time`` are (M,)."""
        self.document[rows, slots] = documents
        self.start[rows, slots] = start
        self.number[rows, slots] = number
        self.time[rows, slots] = time

    def clear(self, rows: Tensor) -> None:
        """Forget everything about these rows."""
        self.document[rows] = -1
        self.number[rows] = -1

    def shift(self, row: int, by: int) -> None:
        """Slot s takes what slot ``s + by`` held."""
        for array in (self.document, self.start, self.number, self.time):
            array[row, : array.shape[1] - by] = array[row, by:].clone()

    def origin(self, row: int, slot: int, length: int) -> ChunkOrigin:
        """The record of one chunk."""
        return ChunkOrigin(
            document=self._spelled.get(int(self.document[row, slot])),
            start_token=int(self.start[row, slot]),
            length=length,
            number=int(self.number[row, slot]),
            time=float(self.time[row, slot]),
        )

    def state_dict(self) -> dict[str, Any]:
        """Arrays and names, as tensors and plain containers."""
        arrays = {name: getattr(self, name).clone() for name in ("document", "start", "number", "time")}
        return {**arrays, "names": dict(self._names), "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        for name in ("document", "start", "number", "time"):
            getattr(self, name).copy_(state[name])
        self._names, self._next = dict(state["names"]), state["next"]
        self._spelled = {number: name for name, number in self._names.items()}

    def _id(self, name: str | None) -> int:
        if name is None:
            return -1
        if name not in self._names:
            self._names[name], self._spelled[self._next] = self._next, name
            self._next += 1
        return self._names[name]

    def _drop_unused_names(self) -> None:
        # a long training run passes many documents through a small bank: the table stays of the bank's size
        if len(self._names) > 2 * self.document.numel() + 64:
            used = set(torch.unique(self.document).tolist())
            self._names = {name: number for name, number in self._names.items() if number in used}
            self._spelled = {number: name for name, number in self._names.items()}
