"""``BankRows``: a batch whose rows read different memories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from longmem.errors import MemoryBankError
from longmem.memory.joined import nothing, side_by_side
from longmem.memory.session import SessionMemory
from longmem.types import AttentionKV, ChunkOrigin, Memory, RetrievedMemory


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

    # writing, where every row is a session

    @property
    def writable(self) -> bool:
        """Whether every row is a session of its own."""
        kinds = all(isinstance(bank, SessionMemory) for bank in self.banks)
        return kinds and len({id(bank) for bank in self.banks}) == len(self.banks)

    def add(
        self,
        kv: AttentionKV,
        *,
        rows: Tensor | None = None,
        documents: Sequence[str | None] | None = None,
        offsets: Sequence[int] | None = None,
        ids: Sequence[Tensor] | None = None,
    ) -> None:
        """Each row to its session, see ``SessionMemory.add``."""
        places = list(range(self.rows)) if rows is None else [int(row) for row in rows.tolist()]
        for line, place in enumerate(places):
            one = slice(line, line + 1)
            self._session(place).add(
                AttentionKV(kv.keys[one], kv.values[one], None if kv.mask is None else kv.mask[one]),
                rows=torch.zeros(1, dtype=torch.long),
                documents=None if documents is None else documents[one],
                offsets=None if offsets is None else offsets[one],
                ids=None if ids is None else ids[one],
            )

    def end_document(self, rows: Tensor | None = None) -> None:
        """What comes next in these rows (default: all) is another document."""
        for place in range(self.rows) if rows is None else rows.tolist():
            self._session(place).end_document(torch.zeros(1, dtype=torch.long))

    def followed(self, row: int) -> Tensor:
        """See ``SessionMemory.followed``."""
        return self._session(row).followed(0)

    def follow(self, row: int, ids: Tensor) -> None:
        """See ``SessionMemory.follow``."""
        self._session(row).follow(0, ids)

    def _session(self, place: int) -> SessionMemory:
        bank = self.banks[place]
        if not isinstance(bank, SessionMemory):
            raise MemoryBankError(
                f"row {place} of the list is {type(bank).__name__}, which is only read; pass a session"
            )
        return bank
