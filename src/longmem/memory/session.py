"""``SessionMemory``: what is said now, in front of a memory that is only read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longmem.errors import MemoryBankError
from longmem.memory.bank import MemoryBank
from longmem.memory.index import rows_of
from longmem.memory.joined import best_of
from longmem.types import AttentionKV, ChunkOrigin, Memory, RetrievedMemory

OVERLAY = 1 << 39
"""Chunk numbers from here on are the session's own; smaller ones are the base memory's."""


class SessionMemory:
    """A bank of its own in front of a memory of any kind: searches find the best of both, writes go to the bank alone.

    Args:
        base: the memory that is only read; None is none.
        bank: of the session, one row for every row of the session, with the base's ``chunk_size``.
        base_rows: (rows,) the base's row that each row of the session reads; None is its own, or the only one there is.

    Raises:
        MemoryBankError: base and bank do not fit each other.
    """

    writable = True

    def __init__(self, base: Memory | None, bank: MemoryBank, base_rows: Tensor | None = None) -> None:
        self.base = base
        self.bank = bank
        self.rows = bank.rows
        self.chunk_size = bank.chunk_size
        if base is not None and base.chunk_size != self.chunk_size:
            raise MemoryBankError(
                f"chunk_size ({self.chunk_size}) of the session's bank must be the memory's ({base.chunk_size}); "
                f"make it with chunk_size={base.chunk_size}"
            )
        self.fingerprint: str | None = _shared("fingerprint", base, bank)
        self.memory_layers: tuple[int, ...] | None = _shared("memory_layers", base, bank)
        below = getattr(base, "rows", self.rows)
        if base_rows is None:
            if below not in (1, self.rows):
                raise MemoryBankError(
                    f"the memory has {below} rows, the session {self.rows}; pass base_rows= to say which is under each"
                )
            base_rows = torch.zeros(self.rows, dtype=torch.long) if below == 1 else torch.arange(self.rows)
        self.base_rows = base_rows.cpu()
        numbers = torch.arange(bank.capacity_tokens // bank.chunk_size + 1, device=bank.device) + OVERLAY
        self._numbers = numbers.expand(self.rows, -1)
        self._followed: list[list[Tensor]] = [[] for _ in range(self.rows)]

    @classmethod
    def for_model(
        cls,
        model: Any,
        base: Memory | None = None,
        rows: int = 1,
        capacity_tokens: int | None = None,
        base_rows: Tensor | None = None,
        **settings: Any,
    ) -> SessionMemory:
        """A session that fits this LongMem model; ``settings`` as in ``MemoryBank``."""
        if base is not None:
            settings.setdefault("chunk_size", base.chunk_size)
            theirs = getattr(base, "fingerprint", None)  # another fingerprint of the same weights will do
            if theirs is not None and getattr(model, "accepts", model.fingerprint.__eq__)(theirs):
                settings.setdefault("fingerprint", theirs)
        return cls(base, MemoryBank.for_model(model, rows, capacity_tokens, **settings), base_rows)

    # reading

    @property
    def tokens(self) -> Tensor:
        """(rows,) tokens of the session itself that each row can find."""
        return self.bank.tokens

    @torch.no_grad()
    def search(
        self, queries: Tensor, num_chunks: int, rows: Tensor | None = None, *, layer: int = 0
    ) -> RetrievedMemory:
        """The best chunks of both for every query (B, H, T, D); ``rows`` (B,) are rows of the session."""
        chosen = torch.tensor(rows_of(rows, queries.shape[0], self.rows, "queries"))
        if self.base is None:
            return self.bank.search(queries, num_chunks, chosen, layer=layer)
        which = {"layer": layer} if layer else {}  # a memory of one layer need not know the argument
        below = self.base.search(queries, num_chunks, self.base_rows[chosen], **which)
        on_device = chosen.to(queries.device)
        if not bool(self.bank.chunks[chosen].any()):
            return replace(below, memory_rows=on_device)
        own = replace(self.bank.search(queries, num_chunks, chosen, layer=layer), sources=self._numbers)
        return replace(best_of((below, own), num_chunks), memory_rows=on_device)

    def provenance(self, row: int, chunk: int) -> ChunkOrigin:
        """Where a chunk came from; ``chunk`` is numbered as in ``RetrievedMemory.chunks``."""
        if self.base is None:
            return self.bank.provenance(row, chunk)
        if chunk >= OVERLAY:
            return self.bank.provenance(row, chunk - OVERLAY)
        return self.base.provenance(int(self.base_rows[row]), chunk)

    # writing

    def add(
        self,
        kv: AttentionKV,
        *,
        rows: Tensor | None = None,
        documents: Sequence[str | None] | None = None,
        offsets: Sequence[int] | None = None,
        time: float | None = None,
        ids: Sequence[Tensor] | None = None,
    ) -> None:
        """Remember keys and values (B, Hkv, T, D) in the session's own bank, see ``MemoryBank.add``.

        Args:
            ids: the token ids behind them, one tensor for each row written; a bank has no use for them, a session over
                a store needs them to be committed.
        """
        self.bank.add(kv, rows=rows, documents=documents, offsets=offsets, time=time)

    def end_document(self, rows: Tensor | None = None) -> None:
        """What comes next in these rows (default: all) is another document."""
        self.bank.end_document(rows)
        for row in rows_of(rows, None, self.rows, "rows"):
            self._followed[row] = []

    def drop(self) -> None:
        """Forget all that the session wrote; the base memory is as it was."""
        self.bank.reset()
        self._followed = [[] for _ in range(self.rows)]

    # the text a row is in the middle of

    def followed(self, row: int) -> Tensor:
        """(t,) the beginning of the row's text that is in memory already, so that it is not written twice."""
        pieces = self._followed[row]
        return torch.cat(pieces).long() if pieces else torch.zeros(0, dtype=torch.long)

    def follow(self, row: int, ids: Tensor) -> None:
        """Note that ids (t,) of the row's text have been written."""
        self._followed[row].append(ids.to("cpu", torch.int32, copy=True))


def _shared(name: str, base: Memory | None, bank: MemoryBank) -> Any:
    """What both say of themselves; one of them may not know."""
    theirs, own = getattr(base, name, None), getattr(bank, name, None)
    if None not in (theirs, own) and theirs != own:
        raise MemoryBankError(
            f"{name} of the memory is {theirs}, of the session's bank {own}; keys of one model and layer mean nothing "
            "to another"
        )
    return own if theirs is None else theirs
