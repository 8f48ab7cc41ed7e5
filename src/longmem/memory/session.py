"""Memories made of others: what is said now over what was said before (``SessionMemory``), rows that read different
memories (``JoinedMemory``), a text in which a few segments change from question to question (``EncodedText``).

What a search found is in the storage of its own memory. Here the chunks that were really found are copied into one
small storage, a key/value head at a time, because a head reads only its own part of a chunk.

B batch rows · H query heads · T tokens · R retrieved chunks · S tokens per chunk · D head_dim · P chunk-heads found
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from longmem.errors import ConfigError, MemoryBankError, StoreError, not_a_multiple
from longmem.memory.bank import MemoryBank
from longmem.memory.index import rows_of, within
from longmem.types import AttentionKV, ChunkOrigin, Memory, RetrievedMemory, check_memory

OVERLAY = 1 << 39
"""Chunk numbers from here on are the session's own; smaller ones are the base memory's."""
LATER = 1 << 62
"""Periods from here on are the session's, which is newer than any document of the base memory."""


class SessionMemory:
    """A bank of its own in front of a memory of any kind: searches find the best of both, writes go to the bank alone.

    Over a bank of a store (``store.bank("alice").session()``) a row can be committed: it becomes a document there.

    Args:
        base: the memory that is only read; None is none.
        bank: of the session, one row for every row of the session, with the base's ``chunk_size``.
        base_rows: (rows,) the base's row that each row of the session reads; None is its own, or the only one there is.

    Raises:
        MemoryBankError: base and bank do not fit each other.
    """

    def __init__(self, base: Memory | None, bank: MemoryBank, base_rows: Tensor | None = None) -> None:
        self.base, self.bank, self.rows = base, bank, bank.rows
        self.chunk_size: int = _common("chunk_size", (base, bank))
        self.fingerprint: str | None = _common("fingerprint", (base, bank))
        self.memory_layers: tuple[int, ...] | None = _common("memory_layers", (base, bank))
        if base_rows is None:
            base_rows = rows_under(base, self.rows, "the session", "base_rows")
        self.base_rows = base_rows.cpu()
        # token ids of every add to each row; how many of these were of earlier texts; rows that lack some
        self._ids: list[list[Tensor]] = [[] for _ in range(self.rows)]
        self._before, self._lacking = [0] * self.rows, set[int]()

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
            if theirs is not None and model.accepts(theirs):
                settings.setdefault("fingerprint", theirs)
        return cls(base, MemoryBank.for_model(model, rows, capacity_tokens, **settings), base_rows)

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
        below = self.base.search(queries, num_chunks, self.base_rows[chosen], layer=layer)
        on_device = chosen.to(queries.device)
        if not bool(self.bank.chunks[chosen].any()):
            return replace(below, memory_rows=on_device)
        own = self.bank.search(queries, num_chunks, chosen, layer=layer)
        assert own.sources is not None and own.periods is not None
        own = replace(own, sources=own.sources + OVERLAY, periods=own.periods + LATER)
        return replace(best_of((below, own), num_chunks), memory_rows=on_device)

    def provenance(self, row: int, chunk: int) -> ChunkOrigin:
        """Where a chunk came from; ``chunk`` is numbered as in ``RetrievedMemory.chunks``."""
        if self.base is None:
            return self.bank.provenance(row, chunk)
        if chunk >= OVERLAY:
            return self.bank.provenance(row, chunk - OVERLAY)
        return self.base.provenance(int(self.base_rows[within("row", row, self.rows)]), chunk)

    def add(
        self,
        kv: AttentionKV,
        *,
        rows: Tensor | None = None,
        documents: Sequence[str | None] | None = None,
        offsets: Sequence[int] | None = None,
        time: float | None = None,
        ids: Sequence[Tensor] | Tensor | None = None,
    ) -> None:
        """Remember keys and values (B, H, T, D) in the session's own bank, see ``MemoryBank.add``.

        Args:
            ids: the token ids of them: (B, T) as the model was given them, or one tensor of real tokens for each row
                written. Without them a row cannot be committed.
        """
        lanes = rows_of(rows, kv.keys.shape[0], self.rows, "keys")
        given = None if ids is None else _real(ids, kv)
        self.bank.add(kv, rows=rows, documents=documents, offsets=offsets, time=time)
        if given is None:
            self._lacking.update(lanes)
            return
        for row, each in zip(lanes, given, strict=True):
            self._ids[row].append(each)

    def end_document(self, rows: Tensor | None = None) -> None:
        """What comes next in these rows (default: all) is another document."""
        self.bank.end_document(rows)
        for row in rows_of(rows, None, self.rows, "rows"):
            self._before[row] = len(self._ids[row])

    def drop(self, rows: Tensor | None = None) -> None:
        """Forget what these rows (default: all) of the session wrote; the base memory is as it was."""
        self.bank.reset(rows)
        for row in rows_of(rows, None, self.rows, "rows"):
            self._ids[row], self._before[row] = [], 0
            self._lacking.discard(row)

    def followed(self, row: int) -> Tensor:
        """(t,) the beginning of the row's text that is in memory already, so that it is not written twice."""
        return torch.cat([torch.zeros(0, dtype=torch.long), *self._ids[row][self._before[row] :]])

    def commit(self, name: str, *, row: int = 0, append: bool = False, **about: Any) -> Any:
        """Write all that was added to a row as a document of the base's namespace, and empty the row.

        The tokens are encoded again in the store's own segments, so that the document is what it would be had it been
        added as a whole. The documents underneath are refreshed: what was committed goes on being found, unless their
        filters leave it out.

        Args:
            name: of the document.
            append: to the document of this name, instead of as a new one.
            about: ``source``, ``metadata``, ``time``, ``expires``, ``replace``, see ``MemoryStore.add_document``.

        Returns:
            the store's ``Receipt``.

        Raises:
            StoreError: there is nothing to commit, token ids are missing, or there is no store or it cannot take it;
                the session is then what it was.
        """
        base: Any = self.base
        if not hasattr(base, "store"):
            raise StoreError("this session is over no store; make it with store.bank(namespace).session()")
        ids = self._ids[row]
        if not ids or row in self._lacking:
            what = "tokens were added without their ids" if row in self._lacking else "nothing was added"
            raise StoreError(f"row {row} of the session cannot be committed: {what}; pass ids= to add")
        write = base.store.append if append else base.store.add_document
        receipt = write(base.namespace, name=name, ids=torch.cat(ids), **about)
        self.drop(torch.tensor([row]))
        base.refresh()
        return receipt


def _real(ids: Sequence[Tensor] | Tensor, kv: AttentionKV) -> list[Tensor]:
    """The ids (t,) of the real tokens of every row of ``kv``; MemoryBankError where there are more or fewer."""
    given = [each.detach().flatten().to("cpu", torch.long, copy=True) for each in ids]
    if isinstance(ids, Tensor) and kv.mask is not None:
        given = [each[keep.cpu()] for each, keep in zip(given, kv.mask.bool(), strict=True)]
    counts = [kv.keys.shape[2]] * len(kv.keys) if kv.mask is None else kv.mask.sum(1).tolist()
    if (lengths := [len(each) for each in given]) != counts:
        raise MemoryBankError(f"ids of {lengths} tokens must be those of the keys, {counts} real tokens in each row")
    return given


class JoinedMemory:
    """Row b reads the first row of ``banks[b]``; one bank may be there several times.

    Args:
        banks: memories of one chunk size; None is a row without memory.

    Raises:
        MemoryBankError: the list is empty, or its banks differ in chunk size, backbone or remembered layers.
    """

    def __init__(self, banks: Sequence[Memory | None]) -> None:
        self.banks = list(banks)
        for bank in banks:
            check_memory(bank)
        if not any(bank is not None for bank in self.banks):
            raise MemoryBankError(f"a list of {len(self.banks)} banks must hold one; pass memory=None to read nothing")
        self.rows = len(self.banks)
        self.chunk_size: int = _common("chunk_size", self.banks)
        self.fingerprint: str | None = _common("fingerprint", self.banks)
        self.memory_layers: tuple[int, ...] | None = _common("memory_layers", self.banks)

    @torch.no_grad()
    def search(
        self, queries: Tensor, num_chunks: int, rows: Tensor | None = None, *, layer: int = 0
    ) -> RetrievedMemory:
        """See ``Memory.search``; ``rows`` (B,) are places in the list."""
        places = rows_of(rows, queries.shape[0], self.rows, "queries")
        lines: dict[int, list[int]] = {}
        for line, place in enumerate(places):
            lines.setdefault(id(self.banks[place]), []).append(line)
        nowhere = lines.pop(id(None), [])
        order = [line for some in lines.values() for line in some]
        if not order:  # nothing, in the shape of what any bank finds
            lines[0] = [0]
        any_bank, parts = next(bank for bank in self.banks if bank is not None), []
        for some in lines.values():
            bank, asked = self.banks[places[some[0]]], queries if len(some) == len(places) else queries[some]
            first_row = torch.zeros(len(some), dtype=torch.long)
            parts.append((any_bank if bank is None else bank).search(asked, num_chunks, first_row, layer=layer))
        found = parts[0]
        if nowhere or len(parts) > 1:
            together = [torch.cat(each)[: len(order)] for each in zip(*_found(parts), strict=True)]
            padded = [torch.cat((each, each.new_zeros(len(nowhere), *each.shape[1:]))) for each in together]
            back = torch.tensor(order + nowhere).argsort().to(queries.device)
            found = _packed([each[back] for each in padded], parts)
        return replace(found, memory_rows=torch.tensor(places, device=queries.device))

    def provenance(self, row: int, chunk: int) -> ChunkOrigin:
        """Where a chunk of ``banks[row]`` came from."""
        bank = self.banks[within("row", row, self.rows)]
        assert bank is not None, "nothing is found in such a row"
        return bank.provenance(0, chunk)


class EncodedText:
    """What a text leaves in memory, segment by segment, and any run of its segments as a memory.

    A segment's keys and values depend on that segment alone, since the model that writes memory never reads it. So the
    text is encoded once; to hide something in it, only the segments that hold it are encoded again, and replace the old
    ones for as long as the question takes.

    Args:
        model: a ``LongMem`` or another model with ``encode``.
        ids: (n, T) token ids of the text; T a multiple of the model's chunk size.
        progress: called with the number of segments done.

    Raises:
        ConfigError: chunks would straddle segments.
    """

    def __init__(self, model: Any, ids: Tensor, progress: Callable[[int], Any] = lambda done: None) -> None:
        size = model.config.chunk_size
        if problems := not_a_multiple("window", ids.shape[1], "chunk_size", size):
            raise ConfigError(problems)
        self.model, self.ids = model, ids
        self.per_segment = ids.shape[1] // size
        self.bank = MemoryBank.for_model(model, 1, ids.numel())
        for number, segment in enumerate(ids, 1):
            self.bank.add(self._encoded(segment))
            progress(number)

    def run(self, first: int, count: int, most_tokens: int | None = None) -> MemoryBank:
        """A bank to read of ``count`` segments from number ``first`` on, or of their last ``most_tokens`` tokens."""
        start, end = first * self.per_segment, (first + count) * self.per_segment
        if most_tokens is not None:
            start = max(start, end - most_tokens // self.bank.chunk_size)
        return self.bank.run(start, end)

    @contextmanager
    def holding(
        self, first: int, count: int, changed: Mapping[int, Sequence[int]], most_tokens: int | None = None
    ) -> Iterator[MemoryBank]:
        """While open, ``run`` of the same text with some segments of other tokens.

        Args:
            first: number of the first segment.
            count: how many.
            changed: token ids (T,) of changed segments, by their number in the whole text.
            most_tokens: only the last so many tokens are remembered; None is all.
        """
        kept = []
        try:
            for number, ids in changed.items():
                # one at a time: other batch sizes round differently
                alone = MemoryBank.for_model(self.model, 1, len(ids), fingerprint=self.bank.fingerprint)
                alone.add(self._encoded(torch.tensor(ids)))
                place = self.run(number, 1)
                kept.append((place, place.state_dict()))
                place.load_state_dict(alone.state_dict())
            yield self.run(first, count, most_tokens)
        finally:
            for place, state in kept:
                place.load_state_dict(state)

    @torch.no_grad()
    def _encoded(self, segment: Tensor) -> AttentionKV:
        kv: AttentionKV = self.model.encode(segment[None].to(self.model.device))
        return kv


def rows_under(memory: Memory | None, count: int, reader: str, argument: str) -> Tensor:
    """(count,) the memory's row for each row of what reads it, where nobody says: its own, or the only one there is.

    Raises:
        MemoryBankError: it has another number of rows; the ``argument`` of the ``reader`` says which.
    """
    rows = getattr(memory, "rows", count)
    if rows not in (1, count):
        raise MemoryBankError(
            f"the memory has {rows} rows, {reader} {count}; pass {argument}= to say which row each one reads"
        )
    return torch.zeros(count, dtype=torch.long) if rows == 1 else torch.arange(count)


def _common(name: str, memories: Sequence[Memory | None]) -> Any:
    """What all memories that know it say of themselves; None where none knows it."""
    values = {value for memory in memories if (value := getattr(memory, name, None)) is not None}
    if len(values) > 1:
        raise MemoryBankError(
            f"{name} differs among memories that are read together: {', '.join(map(str, values))}; they must be of one "
            "model, the same layers and one chunk size"
        )
    return next(iter(values), None)


def best_of(parts: Sequence[RetrievedMemory], num_chunks: int) -> RetrievedMemory:
    """For every query the best chunks of several searches, exact; of equal ones those of the first search.

    Args:
        parts: what the same queries (B, H, T, D) found in several memories, with chunk numbers that tell the memories
            apart; each part is the best ``num_chunks`` of its memory, or all there is.
        num_chunks: R.
    """
    together = [torch.cat(each, dim=-1) for each in zip(*_found(parts), strict=True)]
    _, mask, scores, *_ = together
    # a stable order, so that equal scores are taken from the first part
    order = scores.masked_fill(~mask, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[..., :num_chunks]
    return _packed([each.gather(-1, order) for each in together], parts)


def _found(parts: Sequence[RetrievedMemory]) -> Iterator[tuple[Tensor, ...]]:
    """Of each part, (B, H, T, R) each: line of the chunk-head in all tables, mask, score, length, number, period."""
    first = 0
    for part in parts:
        yield part.lines + first, part.chunk_mask, part.scores, part.sizes, part.chunks, part.period
        first += math.prod(part.storage.shape[:3])


def _packed(found: Sequence[Tensor], parts: Sequence[RetrievedMemory]) -> RetrievedMemory:
    """The found chunk-heads in a storage of their own, (1, P + 1, 1, 2, S, D); the last slot is the null chunk."""
    line, mask, scores, length, number, period = found
    device = scores.device
    tables = [part.storage.flatten(0, 2) for part in parts]  # (lines, 2, S, D) of chunk-heads
    first = list(accumulate(map(len, tables), initial=0))
    wanted, slots = torch.unique(line[mask], return_inverse=True)
    dtype = reduce(torch.promote_types, (table.dtype for table in tables))
    storage = torch.zeros(1, len(wanted) + 1, 1, *tables[0].shape[1:], dtype=dtype, device=device)
    ends = torch.searchsorted(wanted, torch.tensor(first, device=device)).tolist()
    for table, begin, end, at in zip(tables, ends, ends[1:], first, strict=False):
        storage[0, begin:end, 0] = table.index_select(0, (wanted[begin:end] - at).to(table.device)).to(storage)
    lengths = torch.zeros(1, len(wanted) + 1, dtype=torch.long, device=device)
    numbers, periods = torch.full_like(lengths, -1), torch.full_like(lengths, -1)
    lengths[0, slots], numbers[0, slots], periods[0, slots] = length[mask], number[mask], period[mask]
    return RetrievedMemory(
        chunk_ids=torch.full(mask.shape, len(wanted), device=device).masked_scatter_(mask, slots),
        chunk_mask=mask,
        scores=scores.masked_fill(~mask, 0.0),
        storage=storage,
        lengths=lengths,
        rows=torch.zeros(mask.shape[0], dtype=torch.long, device=device),
        version=sum(part.version for part in parts),
        live_version=lambda: sum(part.live_version() for part in parts),
        sources=numbers,
        periods=periods,
    )
