"""``LookaheadBank``: a memory for training steps that take several consecutive segments of every row at once.

What a segment leaves in memory depends on that segment and the frozen backbone alone, so a row's next n segments can go
through the model as n rows of one batch, if each reads only what lay before it. The bank has room to spare for what the
step's own segments write, and every segment searches a window of chunk numbers: what it would have found, had the
segments come one after the other.

B rows · n segments · T segment tokens · H query heads · Hkv key/value heads · D head_dim · R retrieved chunks
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from longmem.errors import ConfigError, MemoryBankError
from longmem.memory.bank import Boundary, MemoryBank
from longmem.memory.index import ExactIndex
from longmem.types import AttentionKV, ChunkOrigin, RetrievedMemory


@dataclass(frozen=True)
class Arrival:
    """One segment of every row, as memory will see it.

    Attributes:
        documents: (B,) name of the text each row is in.
        offsets: (B,) where in it the segment begins.
        starts: (B,) bool, True where a row has just moved on to another text.
        mask: (B, T) bool, True at real tokens; None where every token is real.
    """

    documents: Sequence[str | None]
    offsets: Sequence[int]
    starts: Tensor
    mask: Tensor | None = None


class LookaheadBank:
    """Reads like a ``MemoryBank`` of ``capacity_tokens`` that was written between the segments of one batch.

    A step: ``begin`` with what comes; ``model(..., memory=this)`` with the n segments of B rows as n*B rows, the first
    segment of every row first; ``backward``; ``commit``. The model hands over the keys and values of that very call
    before it searches (``offer``): all but the last segment are written then, over nothing that any segment reads.

    Args:
        bank: where the chunks are; empty, evicting the oldest, with ``spare_tokens`` more room than can be found.
        segments: n.
        segment_tokens: T.
        boundary: what a row's memory does when its next text begins: ``keep`` or ``reset``.

    Raises:
        ConfigError: the bank has too little room to spare, or another rule of eviction.
    """

    def __init__(self, bank: MemoryBank, *, segments: int, segment_tokens: int, boundary: Boundary = "keep") -> None:
        spare = spare_tokens(bank.rows, segments, segment_tokens, bank.chunk_size, shared=bank.shared)
        if bank.capacity_tokens <= spare or bank.eviction != "oldest":
            raise ConfigError(
                f"a bank of {bank.capacity_tokens} tokens, eviction {bank.eviction!r}, cannot take {segments} segments "
                f"at once; give it more than the {spare} tokens that a step writes, and eviction 'oldest'"
            )
        if boundary == "reset" and bank.shared:
            raise ConfigError("boundary ('reset') cannot be kept with a shared bank; use boundary='keep'")
        self.bank = bank
        self.segments = segments
        self.capacity_tokens = bank.capacity_tokens - spare
        self.boundary = boundary
        self._slots = bank._slots
        self._reach = self.capacity_tokens // bank.chunk_size
        self._index = ExactIndex()
        # chunks with a smaller number are forgotten, of every storage row
        self._floor = [0] * len(self._slots.written)
        self._coming: list[Arrival] = []
        self._windows: list[list[tuple[int, int]]] = []
        self._last: AttentionKV | None = None

    @classmethod
    def for_model(
        cls,
        model: Any,
        rows: int,
        capacity_tokens: int,
        *,
        segments: int,
        segment_tokens: int,
        boundary: Boundary = "keep",
        **settings: Any,
    ) -> Self:
        """A bank that fits this model and finds ``capacity_tokens`` in a row; ``settings`` as of ``MemoryBank``."""
        chunk, shared = settings.get("chunk_size", model.config.chunk_size), bool(settings.get("shared", False))
        spare = spare_tokens(rows, segments, segment_tokens, chunk, shared=shared)
        bank = MemoryBank.for_model(model, rows, capacity_tokens + spare, **settings)
        return cls(bank, segments=segments, segment_tokens=segment_tokens, boundary=boundary)

    @property
    def rows(self) -> int:
        return self.bank.rows

    @property
    def chunk_size(self) -> int:
        return self.bank.chunk_size

    @property
    def fingerprint(self) -> str | None:
        return self.bank.fingerprint

    @property
    def memory_layer(self) -> int | None:
        return self.bank.memory_layer

    @property
    def tokens(self) -> Tensor:
        """(rows,) tokens that each row can find."""
        counts = []
        for row, (first, last) in enumerate(self._visible()):
            counts.append(sum(int(self._slots.lengths[row, a:b].sum()) for a, b in self._spans(first, last)))
        return torch.tensor([counts[self.bank._storage_row(row)] for row in range(self.rows)])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on the device, the room to spare included."""
        return self.bank.nbytes

    # a step

    def begin(self, coming: Sequence[Arrival]) -> None:
        """Say what the next step reads: n segments of every row, in their order."""
        if len(coming) != self.segments:
            raise MemoryBankError(f"coming ({len(coming)}) must be the {self.segments} segments of one step")
        self._coming, self._windows, self._last = list(coming), [], None

    @property
    def wants_kv(self) -> bool:
        """Whether ``offer`` is still to come in this step."""
        return bool(self._coming) and self._last is None

    @torch.no_grad()
    def offer(self, kv: AttentionKV) -> None:
        """Take what this step's segments leave, (n*B, Hkv, T, D), before any of them searches."""
        if not self.wants_kv:
            raise MemoryBankError("offer() without begin(); one begin for every step")
        wanted = self.segments * self.rows
        if kv.keys.shape[0] != wanted:
            raise MemoryBankError(
                f"keys have {kv.keys.shape[0]} rows, a step has {wanted}: {self.segments} segments of {self.rows} rows"
            )
        for number, (arrival, part) in enumerate(zip(self._coming, self._split(kv), strict=True)):
            self._turn_over(arrival)
            self._windows.append(self._visible())
            if number < self.segments - 1:
                self.bank.add(part, documents=arrival.documents, offsets=arrival.offsets)
            self._last = part

    def commit(self) -> None:
        """After ``backward``: write the step's last segment."""
        if self._last is None:
            raise MemoryBankError("commit() before the model has read this step's segments; call the model first")
        arrival = self._coming[-1]
        self.bank.add(self._last, documents=arrival.documents, offsets=arrival.offsets)
        self._coming, self._windows, self._last = [], [], None

    # reading

    @torch.no_grad()
    def search(self, queries: Tensor, num_chunks: int, rows: Tensor | None = None) -> RetrievedMemory:
        """The best chunks for every query, (n*B, H, T, D), among those that lay before its segment; see ``Memory``."""
        if rows is not None or queries.shape[0] != self.segments * self.rows or not self._windows:
            raise MemoryBankError(
                f"queries ({queries.shape[0]} rows) must be the {self.segments} segments of all {self.rows} rows of a "
                "step, after begin() and without rows="
            )
        self.bank._check_queries(queries, num_chunks)
        batch, heads, length, dim = queries.shape
        grouped = queries.detach().reshape(batch, self.bank.heads_kv, -1, dim)
        shape = (*grouped.shape[:3], num_chunks)
        scores = torch.full(shape, -torch.inf, dtype=torch.float32, device=queries.device)
        slots = torch.zeros(shape, dtype=torch.long, device=queries.device)
        read = [self.bank._storage_row(row) for row in range(self.rows)] * self.segments
        with torch.autocast(queries.device.type, enabled=False):
            for line, row in enumerate(read):
                first, last = self._windows[line // self.rows][row]
                for begin, end in self._spans(first, last):
                    found = min(num_chunks, end - begin)
                    best, where = self._index.search(
                        grouped[line : line + 1], self._slots.keys[:, :, begin:end], [row], [end - begin], found
                    )
                    both = torch.cat((scores[line], best[0]), dim=-1)
                    scores[line], order = torch.topk(both, num_chunks, dim=-1)
                    slots[line] = torch.cat((slots[line], where[0] + begin), dim=-1).gather(-1, order)
        out = (batch, heads, length, num_chunks)
        mask = (scores != -torch.inf).reshape(out)
        return RetrievedMemory(
            chunk_ids=slots.reshape(out).masked_fill_(~mask, self._slots.slots),
            chunk_mask=mask,
            scores=scores.reshape(out).masked_fill_(~mask, 0.0),
            storage=self._slots.storage,
            lengths=self._slots.lengths,
            rows=torch.tensor(read, device=queries.device),
            version=self.bank.version,
            live_version=lambda: self.bank.version,
        )

    def provenance(self, row: int, chunk: int) -> ChunkOrigin:
        """See ``Memory``."""
        return self.bank.provenance(row % self.rows, chunk)

    # saving

    def state_dict(self) -> dict[str, Any]:
        """Everything, between two steps."""
        if self._last is not None:
            raise MemoryBankError("a step is under way; call commit() before the bank is saved")
        return {"bank": self.bank.state_dict(), "floor": list(self._floor)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make this bank what the saved one was."""
        self.bank.load_state_dict(state["bank"])
        self._floor = list(state["floor"])
        self._coming, self._windows, self._last = [], [], None

    # small helpers

    def _turn_over(self, arrival: Arrival) -> None:
        """Before a segment is read: rows that begin another text end the last one, and forget it where ``reset``."""
        if not bool(arrival.starts.any()):
            return
        starting = arrival.starts.nonzero().flatten()
        self.bank.end_document(starting)
        if self.boundary == "reset":
            # earlier segments of the step still read the chunks, so they are only passed by
            for row in starting.tolist():
                stored = self.bank._storage_row(row)
                self._floor[stored] = self._slots.written[stored]

    def _visible(self) -> list[tuple[int, int]]:
        """Of every storage row, the numbers of the chunks that can be found now: the first, and one past the last."""
        return [
            (max(floor, written - self._reach), written)
            for floor, written in zip(self._floor, self._slots.written, strict=True)
        ]

    def _spans(self, first: int, last: int) -> list[tuple[int, int]]:
        """The slots of these chunk numbers: one piece of the ring, or two where it wraps."""
        if first == last:
            return []
        begin, end = first % self._slots.slots, (last - 1) % self._slots.slots + 1
        return [(begin, end)] if begin < end else [(begin, self._slots.slots), (0, end)]

    def _split(self, kv: AttentionKV) -> list[AttentionKV]:
        """What each segment leaves in every row, with the padding that ``begin`` told of."""
        parts = zip(kv.keys.split(self.rows), kv.values.split(self.rows), self._coming, strict=True)
        return [AttentionKV(keys, values, arrival.mask) for keys, values, arrival in parts]


def spare_tokens(rows: int, segments: int, segment_tokens: int, chunk_size: int, *, shared: bool = False) -> int:
    """Room that a step of so many segments needs beyond what can be found, per row (in all, if ``shared``)."""
    # a segment also completes the chunk that waited, and where a text ends behind it a short chunk is closed
    chunks = (segments - 1) * (segment_tokens // chunk_size + 2)
    return chunks * chunk_size * (rows if shared else 1)
