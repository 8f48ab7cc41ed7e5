"""``BankRows``: a batch whose rows read different memories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from longmem.errors import MemoryBankError
from longmem.memory.joined import nothing, side_by_side
from longmem.types import ChunkOrigin, Memory, RetrievedMemory


class BankRows:
    """Row b reads the first row of ``banks[b]``; one bank may stand in several places.

    Args:
        banks: memories of one chunk size; None is a row without memory.

    Raises:
        MemoryBankError: the list is empty, or its banks are of different chunk sizes or backbones.
    """

    def __init__(self, banks: Sequence[Memory | None]) -> None:
        self.banks = list(banks)
        given = [bank for bank in self.banks if bank is not None]
        if not given:
            raise MemoryBankError(f"a list of {len(self.banks)} banks must hold one; pass memory=None to read nothing")
        for name in ("chunk_size", "fingerprint"):
            values = {value for bank in given if (value := getattr(bank, name, None)) is not None}
            if len(values) > 1:
                raise MemoryBankError(f"{name} differs among the banks of a batch: {', '.join(map(str, values))}")
        self.rows = len(self.banks)
        self.chunk_size = given[0].chunk_size
        self.fingerprint: str | None = next((p for bank in given if (p := getattr(bank, "fingerprint", None))), None)

    @torch.no_grad()
    def search(self, queries: Tensor, num_chunks: int, rows: Tensor | None = None) -> RetrievedMemory:
        """See ``Memory.search``; ``rows`` (B,) are places in the list."""
        if rows is None and queries.shape[0] != self.rows:
            raise MemoryBankError(
                f"queries have {queries.shape[0]} rows, the list {self.rows}; pass rows= to say which"
            )
        places = list(range(self.rows)) if rows is None else [int(row) for row in rows.tolist()]
        lines: dict[int, list[int]] = {}
        for line, place in enumerate(places):
            lines.setdefault(id(self.banks[place]), []).append(line)
        parts = []
        for some in lines.values():
            bank, asked = self.banks[places[some[0]]], queries if len(lines) == 1 else queries[some]
            if bank is None:
                parts.append(nothing(asked, num_chunks, self.chunk_size))
            else:
                parts.append(bank.search(asked, num_chunks, torch.zeros(len(some), dtype=torch.long)))
        found = parts[0] if len(parts) == 1 else side_by_side(parts, list(lines.values()))
        return replace(found, memory_rows=torch.tensor(places, device=queries.device))

    def provenance(self, row: int, chunk: int) -> ChunkOrigin:
        """Where a chunk of ``banks[row]`` came from."""
        bank = self.banks[row]
        if bank is None:
            raise MemoryBankError(f"row {row} has no memory, so no chunk {chunk}")
        return bank.provenance(0, chunk)
