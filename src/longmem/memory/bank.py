"""``MemoryBank``: the memory a model searches, in RAM or on the device.

B batch rows · T segment tokens · H query heads · Hkv key/value heads of one layer · n remembered layers ·
D head_dim · S tokens per chunk · R retrieved chunks
"""

from __future__ import annotations

import copy
import time as clock
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longmem.errors import ConfigError, MemoryBankError
from longmem.memory.chunks import Slots, joined, refuse_unfit, split
from longmem.memory.index import Index, make_indexes, rows_of, search_chunks
from longmem.types import AttentionKV, ChunkOrigin, RetrievedMemory


@dataclass
class _Lane:
    """Where the text of a row has got to."""

    document: str | None = None
    open: bool = False  # False: the next token begins a document, whatever its name
    next_token: int = 0
    waiting: int = 0  # tail tokens short of a chunk


class MemoryBank:
    """Keys and values of past tokens, chunk by chunk, one row per batch lane.

    Reading (``search``) never changes the bank, and several threads may read at once. Writing (``add``) is left to the
    caller: after the read and, in training, after ``backward``. Tokens short of a chunk wait for the row's next
    ``add``; the end of a document closes them as a short chunk. A full row drops its oldest chunks. No row sees
    another.

    Args:
        rows: batch lanes.
        capacity_tokens: M, tokens each row holds.
        heads_kv: Hkv of one remembered layer.
        head_dim: D.
        chunk_size: S.
        memory_layers: 0-based backbone layers whose keys and values are stored, ascending; a model that remembers other
            layers refuses the bank. None: one layer, not known which.
        dtype: of the stored keys and values; their means, which are searched, are float32, taken before rounding.
        device: of all tensors.
        fingerprint: of the backbone that wrote the keys; another one's saved bank is refused.
        index: how keys are searched: "exact", "faiss", or an index that was never used.

    Raises:
        ConfigError: lists every setting that breaks a rule.
    """

    def __init__(
        self,
        rows: int,
        capacity_tokens: int,
        heads_kv: int,
        head_dim: int,
        chunk_size: int = 4,
        *,
        memory_layers: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        fingerprint: str | None = None,
        index: str | Index = "exact",
    ) -> None:
        sizes = {"rows": rows, "heads_kv": heads_kv, "head_dim": head_dim, "chunk_size": chunk_size}
        problems = [f"{name} ({value}) must be at least 1" for name, value in sizes.items() if value < 1]
        if chunk_size >= 1 and (capacity_tokens < chunk_size or capacity_tokens % chunk_size):
            below = capacity_tokens // chunk_size * chunk_size
            problems.append(
                f"capacity_tokens ({capacity_tokens}) must be a multiple of chunk_size ({chunk_size}); try "
                f"{f'{below} or ' if below else ''}{below + chunk_size}"
            )
        if memory_layers is not None and (not memory_layers or list(memory_layers) != sorted(set(memory_layers))):
            problems.append(f"memory_layers ({list(memory_layers)}) must name each layer once, ascending")
        if problems:
            raise ConfigError(problems)
        self.rows = rows
        self.capacity_tokens = capacity_tokens
        self.heads_kv = heads_kv
        self.head_dim = head_dim
        self.chunk_size = chunk_size
        self.memory_layers = None if memory_layers is None else tuple(memory_layers)
        self.layers = 1 if self.memory_layers is None else len(self.memory_layers)
        self.device = torch.device(device)
        self.fingerprint = fingerprint
        heads = self.layers * heads_kv
        self._slots = Slots(rows, capacity_tokens // chunk_size, heads, head_dim, chunk_size, dtype, self.device)
        self._indexes = make_indexes(index, self.layers)
        self._lanes = [_Lane() for _ in range(rows)]
        # the tail is kept unrounded: the mean key of its chunk is taken before rounding
        working = torch.promote_types(dtype, torch.float32)
        self._tail = torch.zeros(rows, heads, 2, chunk_size, head_dim, dtype=working, device=self.device)
        self._version = 0

    @classmethod
    def for_model(cls, model: Any, rows: int = 1, capacity_tokens: int | None = None, **settings: Any) -> MemoryBank:
        """A bank that fits this model; ``settings`` as in the constructor."""
        if "fingerprint" not in settings:  # that of a model in training takes all its weights to compute
            settings["fingerprint"] = model.fingerprint
        settings = {
            "chunk_size": model.config.chunk_size,
            "memory_layers": model.memory_layers,
            "device": getattr(model, "memory_device", model.device),
            "dtype": model.dtype,
            **settings,
        }
        capacity = model.config.memory_size if capacity_tokens is None else capacity_tokens
        return cls(rows, capacity, model.memory_heads, model.memory_head_dim, **settings)

    # reading

    @property
    def version(self) -> int:
        """How often the bank was written or reset."""
        return self._version

    @property
    def chunks(self) -> Tensor:
        """(rows,) chunks that each row can find."""
        return torch.tensor([self._slots.live(row) for row in range(self.rows)])

    @property
    def tokens(self) -> Tensor:
        """(rows,) tokens that each row can find; a waiting tail is not counted."""
        return self._slots.lengths.sum(1).cpu()

    @property
    def waiting(self) -> Tensor:
        """(rows,) tokens of each row that are still short of a chunk."""
        return torch.tensor([lane.waiting for lane in self._lanes])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on the device."""
        slots = self._slots
        return sum(each.nbytes for each in (slots.storage, slots.keys, slots.lengths, self._tail))

    def search(
        self, queries: Tensor, num_chunks: int, rows: Tensor | None = None, *, layer: int = 0
    ) -> RetrievedMemory:
        """See ``Memory.search``; what it returns refers to the storage of this bank.

        Raises:
            MemoryBankError: queries, rows or layer do not fit the bank.
        """
        read = rows_of(rows, queries.shape[0], self.rows, "queries")
        found = search_chunks(
            self._indexes[layer if 0 <= layer < self.layers else 0],
            queries,
            num_chunks,
            self._slots,
            read,
            [self._slots.live(row) for row in read],
            layer=layer,
            heads_kv=self.heads_kv,
            live_version=lambda: self._version,
        )
        return replace(found, sources=self._slots.numbers)

    def provenance(self, row: int, chunk: int) -> ChunkOrigin:
        """Where a chunk of a row came from; ``chunk`` is numbered as in ``RetrievedMemory.chunks``, by age."""
        (row,) = rows_of([row], 1, self.rows, "rows")
        end = self._slots.written[row]
        first = end - self._slots.live(row)
        if not first <= chunk < end:
            there = f"it holds {first} to {end - 1}" if end else "it is empty"
            raise MemoryBankError(f"chunk ({chunk}) is not in row {row}; {there}")
        return self._slots.origin(row, chunk)

    # writing

    @torch.no_grad()
    def add(
        self,
        kv: AttentionKV,
        *,
        rows: Tensor | None = None,
        documents: Sequence[str | None] | None = None,
        offsets: Sequence[int] | None = None,
        time: float | None = None,
    ) -> None:
        """Remember a segment.

        Args:
            kv: keys and values (B, n*Hkv, T, D) and, with padding on either side, their mask.
            rows: (B,) the bank row each batch row is written to; by default its own.
            documents: name of the document each row is in; another name than before closes the row's waiting
                tail. None: the document goes on.
            offsets: where in its document each row's first real token stands; by default, behind the last one.
                A jump closes the waiting tail.
            time: recorded with the chunks; by default now.

        Raises:
            MemoryBankError: shapes or rows do not fit the bank, or numbers are not finite or overflow its dtype;
                nothing was written.
        """
        pair = joined(kv, self.layers * self.heads_kv, self.head_dim)
        lanes = rows_of(rows, pair.shape[0], self.rows, "keys")
        for name, given in (("documents", documents), ("offsets", offsets)):
            if given is not None and len(given) != len(lanes):
                raise MemoryBankError(f"{name} ({len(given)} entries) must have one per row written ({len(lanes)})")
        if len(set(lanes)) != len(lanes):
            raise MemoryBankError(f"rows ({lanes}) must name each row once")
        refuse_unfit(pair, kv.mask, self._slots.storage.dtype, self.chunk_size)
        pair = pair.to(device=self.device, dtype=self._tail.dtype)
        mask = None if kv.mask is None or bool(kv.mask.all()) else kv.mask.to(self.device, torch.bool)
        now = clock.time() if time is None else time
        for line, row in enumerate(lanes):
            lane = self._lanes[row]
            document = lane.document if documents is None else documents[line]
            begins = not lane.open or document != lane.document
            expected = 0 if begins else lane.next_token
            offset = expected if offsets is None else offsets[line]
            if begins or offset != expected:
                self._close_tail(row, now)
            self._lanes[row] = _Lane(document, True, offset, lane.waiting)
            self._append(row, pair[line] if mask is None else pair[line][:, :, mask[line]], now)
        self._version += 1

    @torch.no_grad()
    def end_document(self, rows: Tensor | None = None) -> None:
        """Close the waiting tail of these rows (default: all) as a short chunk; what comes next is a new document."""
        for row in rows_of(rows, None, self.rows, "rows"):
            self._close_tail(row, clock.time())
            self._lanes[row] = _Lane()
        self._version += 1

    def reset(self, rows: Tensor | None = None) -> None:
        """Empty these rows (default: all)."""
        for row in rows_of(rows, None, self.rows, "rows"):
            self._lanes[row] = _Lane()
            self._slots.clear(row)
            for index in self._indexes:
                index.cleared(row)
        self._version += 1

    # saving

    def state_dict(self) -> dict[str, Any]:
        """Everything in the bank: tensors (copies, only what is in use) and plain containers."""
        return {
            "settings": self._settings(),
            "slots": self._slots.state_dict(),
            "tail": self._tail.clone(),
            "lanes": [vars(lane).copy() for lane in self._lanes],
            "version": self._version,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make this bank what the saved one was, also one of version 0.1.

        Raises:
            MemoryBankError: other settings or another backbone; the bank is as it was.
        """
        theirs = dict(state["settings"])
        if "memory_layer" in theirs:  # version 0.1
            layer = theirs.pop("memory_layer")
            theirs["memory_layers"] = None if layer is None else (layer,)
        if theirs.get("eviction", "oldest") != "oldest":
            raise MemoryBankError(f"saved bank has eviction {theirs['eviction']!r}, which is no more; fill it anew")
        if theirs.get("shared") and theirs["rows"] > 1:
            raise MemoryBankError("saved bank is one memory for all its rows, which is no more; fill one of a row anew")
        for name, mine in self._settings().items():
            saved = tuple(theirs[name]) if isinstance(theirs[name], list) else theirs[name]
            if mine == saved or (name in ("fingerprint", "memory_layers") and None in (mine, saved)):
                continue
            if name == "fingerprint":
                raise MemoryBankError(
                    f"saved bank is written by another backbone: its fingerprint is {saved}, this bank's is {mine}; "
                    "use the backbone that wrote it, or fill the bank anew"
                )
            raise MemoryBankError(
                f"saved bank is of another shape: its {name} is {saved}, this bank's is {mine}; "
                f"make the bank with {name}={saved} to load it"
            )
        self._slots.load_state_dict(state["slots"])
        for index in self._indexes:
            for row in range(self.rows):
                index.cleared(row)
        self._tail.copy_(state["tail"])
        self._lanes = [_Lane(**lane) for lane in state["lanes"]]
        self._version = max(self._version, state["version"]) + 1

    # how a segment becomes chunks

    def _append(self, row: int, tokens: Tensor, now: float) -> None:
        """Put tokens (n*Hkv, 2, t, D) behind what waits in a row, and store all whole chunks."""
        lane = self._lanes[row]
        chunks, rest = split(torch.cat((self._tail[row, :, :, : lane.waiting], tokens), dim=2), self.chunk_size)
        if len(chunks):
            self._write(row, chunks, torch.full((len(chunks),), self.chunk_size), now)
        lane.next_token += tokens.shape[2]
        lane.waiting = rest.shape[2]
        self._tail[row, :, :, : lane.waiting] = rest

    def _close_tail(self, row: int, now: float) -> None:
        """Store what waits in a row as one short chunk."""
        lane = self._lanes[row]
        if lane.waiting:
            chunk = self._tail[row].clone()
            chunk[:, :, lane.waiting :] = 0.0
            self._write(row, chunk[None], torch.tensor([lane.waiting]), now)
            lane.waiting = 0

    def _write(self, row: int, chunks: Tensor, lengths: Tensor, now: float) -> None:
        """Store chunks (m, n*Hkv, 2, S, D) that begin with what waits in a row."""
        lane = self._lanes[row]
        slots = self._slots.write(row, chunks, lengths, lane.document, lane.next_token - lane.waiting, now)
        for index in self._indexes:
            index.written(row, slots)

    def _settings(self) -> dict[str, Any]:
        """What a saved bank must share with the one that loads it."""
        names = ("fingerprint", "memory_layers", "rows", "capacity_tokens", "heads_kv", "head_dim", "chunk_size")
        return {name: getattr(self, name) for name in names} | {"dtype": str(self._slots.storage.dtype)}


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
        if ids.shape[1] % size:
            raise ConfigError(
                f"window ({ids.shape[1]}) must be a multiple of chunk_size ({size}), so that segments can be changed "
                f"one by one; try {max(1, ids.shape[1] // size) * size}"
            )
        self.model, self.ids = model, ids
        self.per_segment = ids.shape[1] // size
        self.bank = MemoryBank.for_model(model, 1, ids.numel())
        for number, segment in enumerate(ids, 1):
            self.bank.add(self._encoded(segment))
            progress(number)

    def run(self, first: int, count: int, most_tokens: int | None = None) -> MemoryBank:
        """A bank to read of ``count`` segments from number ``first`` on, or of their last ``most_tokens`` tokens.

        It refers to the storage of the text; chunks are numbered, and tokens counted, from its beginning.
        """
        start, end = first * self.per_segment, (first + count) * self.per_segment
        if most_tokens is not None:
            start = max(start, end - most_tokens // self.bank.chunk_size)
        run = copy.copy(self.bank)
        run._slots = self.bank._slots.run(start, end)
        return run

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
                place = self.bank._slots.run(number * self.per_segment, (number + 1) * self.per_segment)
                kept.append((place, place.state_dict()))
                place.load_state_dict(alone._slots.state_dict())
            yield self.run(first, count, most_tokens)
        finally:
            for place, state in kept:
                place.load_state_dict(state)

    @torch.no_grad()
    def _encoded(self, segment: Tensor) -> AttentionKV:
        kv: AttentionKV = self.model.encode(segment[None].to(self.model.device))
        return kv
