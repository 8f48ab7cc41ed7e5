"""``MemoryBank``: the memory a model searches, in RAM or on the device.

B batch rows · T segment tokens · H query heads · Hkv key/value heads of one layer · n remembered layers ·
D head_dim · S tokens per chunk · R retrieved chunks
"""

from __future__ import annotations

import copy
import time as clock
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longmem.errors import ConfigError, MemoryBankError, not_a_multiple
from longmem.memory.index import Index, joined, make_indexes, mean_keys, refuse_overflow, rows_of, search_chunks, within
from longmem.types import AttentionKV, ChunkOrigin, RetrievedMemory, period


class Run(NamedTuple):
    """Chunks written together."""

    first: int  # number of the first one
    document: str | None
    token: int  # where in the document it begins
    time: float  # of writing
    ordinal: int  # how many documents the row has had before this one


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

    Every row is a ring of chunk slots: chunk number n is in slot ``n % slots``, so that a new chunk overwrites the
    oldest one once the ring is full, and the slots in use are always the first ones. The last slot is the null chunk,
    always zero: "nothing found".

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

    Attributes:
        storage: (rows, slots + 1, n*Hkv, 2, S, D), keys and values.
        keys: (rows, n*Hkv, slots, D), mean key of each chunk.
        lengths: (rows, slots + 1) long, real tokens in each chunk; 0 where a slot is not in use.
        numbers: (rows, slots + 1) long, of the chunk in each slot; -1 of none.
        periods: (rows, slots + 1) long, when it was said, see ``longmem.types.period``; -1 of none.
        version: how often the bank was written or reset.

    Raises:
        ConfigError: rows or capacity are below 1, the capacity is no multiple of the chunk size, or there is no such
                index.
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
        sizes = {"rows": rows, "capacity_tokens": capacity_tokens}
        problems = [f"{name} ({value}) must be at least 1" for name, value in sizes.items() if value < 1]
        if problems := problems or not_a_multiple("capacity_tokens", capacity_tokens, "chunk_size", chunk_size):
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
        slots = self._slots = capacity_tokens // chunk_size
        pair = (2, chunk_size, head_dim)
        self.storage = torch.zeros(rows, slots + 1, heads, *pair, dtype=dtype, device=self.device)
        self.keys = torch.zeros(rows, heads, slots, head_dim, device=self.device)
        self.lengths = torch.zeros(rows, slots + 1, dtype=torch.long, device=self.device)
        self.numbers = torch.full_like(self.lengths, -1)
        self.periods = torch.full_like(self.lengths, -1)
        self._written = [0] * rows  # chunks that each row was ever given; the next chunk's number
        self._runs: list[list[Run]] = [[] for _ in range(rows)]  # of the chunks that are still there, oldest first
        self._indexes = make_indexes(index, self.layers)
        self._lanes = [_Lane() for _ in range(rows)]
        # the tail is kept unrounded: the mean key of its chunk is taken before rounding
        working = torch.promote_types(dtype, torch.float32)
        self._tail = torch.zeros(rows, heads, *pair, dtype=working, device=self.device)
        self.version = 0

    @classmethod
    def for_model(cls, model: Any, rows: int = 1, capacity_tokens: int | None = None, **settings: Any) -> MemoryBank:
        """A bank that fits this model; ``settings`` as in the constructor."""
        if not hasattr(model, "memory_layers"):
            made = "LongMem.from_backbone(model) or TrainingFree.from_backbone(model)"
            raise ConfigError(f"a {type(model).__name__} reads no memory by itself; make a bank for {made}")
        if "fingerprint" not in settings:  # that of a model in training takes all its weights to compute
            settings["fingerprint"] = model.fingerprint
        settings = {
            "chunk_size": model.config.chunk_size,
            "memory_layers": model.memory_layers,
            "device": model.memory_device,
            "dtype": model.dtype,
            **settings,
        }
        capacity = model.config.memory_size if capacity_tokens is None else capacity_tokens
        return cls(rows, capacity, model.memory_heads, model.memory_head_dim, **settings)

    # reading

    @property
    def chunks(self) -> Tensor:
        """(rows,) chunks that each row can find."""
        return torch.tensor([self._live(row) for row in range(self.rows)])

    @property
    def tokens(self) -> Tensor:
        """(rows,) tokens that each row can find; a waiting tail is not counted."""
        return self.lengths.sum(1).cpu()

    @property
    def waiting(self) -> Tensor:
        """(rows,) tokens of each row that are still short of a chunk."""
        return torch.tensor([lane.waiting for lane in self._lanes])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on the device."""
        tensors = (self.storage, self.keys, self.lengths, self.numbers, self.periods, self._tail)
        return sum(each.nbytes for each in tensors)

    def search(
        self, queries: Tensor, num_chunks: int, rows: Tensor | None = None, *, layer: int = 0
    ) -> RetrievedMemory:
        """See ``Memory.search``; what it returns refers to the storage of this bank.

        Raises:
            MemoryBankError: queries or rows do not fit the bank.
        """
        read = rows_of(rows, queries.shape[0], self.rows, "queries")
        live, version = [self._live(row) for row in read], lambda: self.version
        found = search_chunks(self._indexes, queries, num_chunks, self, read, live, layer=layer, live_version=version)
        return replace(found, sources=self.numbers, periods=self.periods)

    def provenance(self, row: int, chunk: int) -> ChunkOrigin:
        """Where a chunk of a row came from; ``chunk`` is numbered as in ``RetrievedMemory.chunks``, by age."""
        end = self._written[within("row", row, self.rows)]
        first = end - self._live(row)
        if not first <= chunk < end:
            there = f"it holds {first} to {end - 1}" if end else "it is empty"
            raise MemoryBankError(f"chunk ({chunk}) is not in row {row}; {there}")
        runs = self._runs[row]
        run = runs[bisect_right(runs, chunk, key=itemgetter(0)) - 1]
        start = run.token + (chunk - run.first) * self.chunk_size
        return ChunkOrigin(run.document, start, int(self.lengths[row, chunk % self._slots]), chunk, run.time)

    def run(self, start: int, stop: int) -> MemoryBank:
        """The chunks in slots ``start`` to ``stop`` of full rows as a bank of its own, in the same storage.

        It knows no documents: chunks and tokens are counted from its beginning.
        """
        part = copy.copy(self)
        part._slots, part.capacity_tokens = stop - start, (stop - start) * self.chunk_size
        part.storage, part.lengths = self.storage[:, start:stop], self.lengths[:, start:stop]
        part.keys = self.keys[:, :, start:stop]
        part.numbers = torch.arange(part._slots, device=self.device).repeat(self.rows, 1)
        part.periods = period(0, part.numbers * self.chunk_size)
        part._written, part._runs = [part._slots] * self.rows, [[Run(0, None, 0, 0.0, 0)] for _ in range(self.rows)]
        return part

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
        refuse_overflow(pair, kv.mask, self.storage.dtype, self.chunk_size)
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
        self.version += 1

    @torch.no_grad()
    def end_document(self, rows: Tensor | None = None) -> None:
        """Close the waiting tail of these rows (default: all) as a short chunk; what comes next is a new document."""
        for row in rows_of(rows, None, self.rows, "rows"):
            self._close_tail(row, clock.time())
            self._lanes[row] = _Lane()
        self.version += 1

    def reset(self, rows: Tensor | None = None) -> None:
        """Empty these rows (default: all)."""
        for row in rows_of(rows, None, self.rows, "rows"):
            self._lanes[row] = _Lane()
            self._written[row], self._runs[row] = 0, []
            self.lengths[row], self.numbers[row], self.periods[row] = 0, -1, -1
            for index in self._indexes:
                index.cleared(row)
        self.version += 1

    # saving

    def state_dict(self) -> dict[str, Any]:
        """Everything in the bank: tensors (copies, only what is in use) and plain containers."""
        used = max(self._live(row) for row in range(self.rows))
        slots = {
            "storage": self.storage[:, :used].clone(),
            "keys": self.keys[:, :, :used].clone(),
            "lengths": self.lengths[:, :used].clone(),
            "written": list(self._written),
            "runs": [[run[:4] for run in runs] for runs in self._runs],  # ordinals follow from the order
        }
        return {
            "settings": self._settings(),
            "slots": slots,
            "tail": self._tail.clone(),
            "lanes": [vars(lane).copy() for lane in self._lanes],
            "version": self.version,
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
        if theirs.get("eviction", "oldest") != "oldest" or (theirs.get("shared") and theirs["rows"] > 1):
            raise MemoryBankError("saved bank is of a kind of version 0.1 that is no more; fill a bank anew")
        for name, mine in self._settings().items():
            saved = tuple(theirs[name]) if isinstance(theirs[name], list) else theirs[name]
            if mine == saved or (name in ("fingerprint", "memory_layers") and None in (mine, saved)):
                continue
            raise MemoryBankError(
                f"saved bank's {name} is {saved}, this bank's is {mine}; load it into one made as it was, for the "
                "backbone that wrote it, or fill the bank anew"
            )
        self._load_slots(state["slots"])
        for index in self._indexes:
            for row in range(self.rows):
                index.cleared(row)
        self._tail.copy_(state["tail"])
        self._lanes = [_Lane(**lane) for lane in state["lanes"]]
        self.version = max(self.version, state["version"]) + 1

    def _load_slots(self, state: dict[str, Any]) -> None:
        used = state["storage"].shape[1]
        self.lengths.zero_()
        self.numbers.fill_(-1)
        self.periods.fill_(-1)
        self.storage[:, :used].copy_(state["storage"])
        self.keys[:, :, :used].copy_(state["keys"])
        self.lengths[:, :used].copy_(state["lengths"])
        self._written = list(state["written"])
        for row in range(self.rows):
            saved = self._runs_of(state["ledger"], row) if "ledger" in state else state["runs"][row]
            self._runs[row] = []
            for run in saved:
                self._begin_run(row, *run)
            ends = [*(run.first for run in self._runs[row][1:]), self._written[row]]
            for run, end in zip(self._runs[row], ends, strict=False):  # a row without runs has an end, too
                self._number(row, run, end)

    def _runs_of(self, table: dict[str, Any], row: int) -> list[tuple[int, str | None, int, float]]:
        """A run for every chunk of a table of version 0.1: document, start, number and time of each slot."""
        spelled = {number: name for name, number in table["names"].items()}
        columns = (table[name][row, : self._live(row)].tolist() for name in ("number", "document", "start", "time"))
        runs = [(n, spelled.get(document), start, time) for n, document, start, time in zip(*columns, strict=True)]
        return sorted(runs, key=itemgetter(0))

    # how a segment becomes chunks

    def _live(self, row: int) -> int:
        """Chunks in use in this row."""
        return min(self._written[row], self._slots)

    def _append(self, row: int, tokens: Tensor, now: float) -> None:
        """Put tokens (n*Hkv, 2, t, D) behind what waits in a row, and store all whole chunks."""
        lane = self._lanes[row]
        together = torch.cat((self._tail[row, :, :, : lane.waiting], tokens), dim=2)
        count, rest = divmod(together.shape[2], self.chunk_size)
        whole = count * self.chunk_size
        if count:
            chunks = together[:, :, :whole].unflatten(2, (count, self.chunk_size)).movedim(2, 0)
            self._write(row, chunks, torch.full((count,), self.chunk_size), now)
        lane.next_token += tokens.shape[2]
        lane.waiting = rest
        self._tail[row, :, :, :rest] = together[:, :, whole:]

    def _close_tail(self, row: int, now: float) -> None:
        """Store what waits in a row as one short chunk."""
        lane = self._lanes[row]
        if lane.waiting:
            chunk = self._tail[row].clone()
            chunk[:, :, lane.waiting :] = 0.0
            self._write(row, chunk[None], torch.tensor([lane.waiting]), now)
            lane.waiting = 0

    def _write(self, row: int, chunks: Tensor, lengths: Tensor, now: float) -> None:
        """Store chunks (m, n*Hkv, 2, S, D) that begin with what waits in a row; of more than fit, the newest stay."""
        lane, runs = self._lanes[row], self._runs[row]
        run = self._begin_run(row, self._written[row], lane.document, lane.next_token - lane.waiting, now)
        self._written[row] += len(chunks)
        # let go of runs whose last chunk is overwritten
        oldest = self._written[row] - self._slots
        del runs[: max(0, bisect_right(runs, oldest, key=itemgetter(0)) - 1)]
        slots = self._number(row, run, self._written[row])
        chunks, lengths = chunks[-len(slots) :], lengths[-len(slots) :].to(self.device)
        self.lengths[row][slots] = lengths
        self.storage[row][slots] = chunks.to(self.storage.dtype)
        self.keys[row][:, slots] = mean_keys(chunks, lengths).transpose(0, 1).to(self.keys.dtype)
        for index in self._indexes:
            index.written(row, slots)

    def _begin_run(self, row: int, first: int, document: str | None, token: int, time: float) -> Run:
        """Append a run; another name than before, or a text that begins again, is another document."""
        runs, ordinal = self._runs[row], 0
        if runs:
            last = runs[-1]
            ordinal = last.ordinal + (document != last.document or token <= last.token)
        runs.append(Run(first, document, token, time, ordinal))
        return runs[-1]

    def _number(self, row: int, run: Run, end: int) -> Tensor:
        """Write numbers and periods of a run's chunks that are there, up to chunk ``end``; returns their slots."""
        numbers = torch.arange(max(run.first, self._written[row] - self._slots), end, device=self.device)
        slots = numbers % self._slots
        tokens = run.token + (numbers - run.first) * self.chunk_size
        self.numbers[row][slots], self.periods[row][slots] = numbers, period(run.ordinal, tokens)
        return slots

    def _settings(self) -> dict[str, Any]:
        """What a saved bank must share with the one that loads it."""
        names = ("fingerprint", "memory_layers", "rows", "capacity_tokens", "heads_kv", "head_dim", "chunk_size")
        return {name: getattr(self, name) for name in names} | {"dtype": str(self.storage.dtype)}
