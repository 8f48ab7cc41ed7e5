"""``MemoryBank``: the memory a model searches, in RAM or on the device.

B batch rows · T segment tokens · H query heads · Hkv key/value heads · D head_dim · S tokens per chunk ·
R retrieved chunks
"""

from __future__ import annotations

import time as clock
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from longmem.errors import ConfigError, MemoryBankError
from longmem.memory.chunking import real_tokens, split
from longmem.memory.index import Index, make_index
from longmem.memory.slots import ReleasedSlots, Slots
from longmem.types import AttentionKV, ChunkOrigin, RetrievedMemory

Eviction = Literal["oldest", "released"]
Boundary = Literal["keep", "reset"]


@dataclass
class _Lane:
    """What a row is in the middle of."""

    document: str | None = None
    open: bool = False  # False: the next token begins a document, whatever its name
    next_token: int = 0
    waiting: int = 0  # tail tokens short of a chunk


class MemoryBank:
    """Keys and values of past tokens, chunk by chunk, one row per batch lane.

    Reading (``search``) never changes the bank; writing (``add``) is the caller's, after the read and, in training,
    after ``backward``. Tokens short of a chunk wait for the row's next ``add``; the end of a document closes them as a
    short chunk. A full row drops its oldest chunks. No row sees another unless ``shared``.

    Args:
        rows: batch lanes.
        capacity_tokens: M, tokens each row holds; with ``shared``, tokens held in all.
        heads_kv: Hkv.
        head_dim: D.
        chunk_size: S.
        dtype: of the stored keys and values.
        key_dtype: of the mean keys that are searched; they are averaged in float32 before rounding.
        device: of all tensors.
        shared: one storage that every row writes to and searches.
        eviction: ``oldest``: a ring; ``released``: the rule of the released code, for parity (needs ``shared``):
            rows are flattened one after the other, a call's tail and its padding mask are dropped, and queries
            that find fewer than R chunks also read zeros.
        boundary: at the start of another document, ``keep`` the row's memory or ``reset`` it.
        fingerprint: of the backbone that wrote the keys; another one's saved bank is refused.
        memory_layer: of that backbone, whose keys they are; a model that remembers another layer refuses the bank.
        index: how keys are searched: a name of ``make_index``, or an index; exact by default.

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
        dtype: torch.dtype = torch.float32,
        key_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        shared: bool = False,
        eviction: Eviction = "oldest",
        boundary: Boundary = "keep",
        fingerprint: str | None = None,
        memory_layer: int | None = None,
        index: str | Index = "exact",
    ) -> None:
        problems = _problems(rows, capacity_tokens, heads_kv, head_dim, chunk_size, shared, eviction, boundary)
        if problems:
            raise ConfigError(problems)
        self.rows = rows
        self.capacity_tokens = capacity_tokens
        self.heads_kv = heads_kv
        self.head_dim = head_dim
        self.chunk_size = chunk_size
        self.device = torch.device(device)
        self.shared = shared
        self.eviction = eviction
        self.boundary = boundary
        self.fingerprint = fingerprint
        self.memory_layer = memory_layer
        kind = ReleasedSlots if eviction == "released" else Slots
        self._slots = kind(
            1 if shared else rows,
            capacity_tokens // chunk_size,
            heads_kv,
            head_dim,
            chunk_size,
            dtype,
            key_dtype,
            self.device,
            make_index(index),
        )
        self._lanes = [_Lane() for _ in range(rows)]
        # the tail is kept as it came, unrounded: its chunk's mean key is taken before rounding
        working = torch.promote_types(dtype, torch.float32)
        self._tail = torch.zeros(rows, heads_kv, 2, chunk_size, head_dim, dtype=working, device=self.device)
        self._version = 0

    @classmethod
    def for_model(cls, model: Any, rows: int = 1, capacity_tokens: int | None = None, **settings: Any) -> MemoryBank:
        """A bank that fits this LongMem model; ``settings`` as in the constructor."""
        if "fingerprint" not in settings:  # that of a model in training takes all its weights to compute
            settings["fingerprint"] = model.fingerprint
        settings = {
            "chunk_size": model.config.chunk_size,
            "memory_layer": getattr(model, "memory_layer", None),
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
        return torch.tensor([self._slots.live(self._storage_row(row)) for row in range(self.rows)])

    @property
    def tokens(self) -> Tensor:
        """(rows,) tokens that each row can find; a waiting tail is not counted."""
        stored = self._slots.lengths[:, : self._slots.slots].sum(1).cpu()
        return stored[[self._storage_row(row) for row in range(self.rows)]]

    @property
    def waiting(self) -> Tensor:
        """(rows,) tokens of each row that are still short of a chunk."""
        return torch.tensor([lane.waiting for lane in self._lanes])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors on the device."""
        return self._slots.nbytes + self._tail.numel() * self._tail.element_size()

    @torch.no_grad()
    def search(self, queries: Tensor, num_chunks: int, rows: Tensor | None = None) -> RetrievedMemory:
        """The best chunks for every query, per head, by inner product with the mean key.

        Args:
            queries: (B, H, T, D), position-free and unscaled; H a multiple of Hkv.
            num_chunks: R.
            rows: (B,) the bank row each batch row reads; by default its own.

        Returns:
            references into this bank, with (B, H, T, R) ids; masked where fewer than R chunks exist.
        """
        self._check_queries(queries, num_chunks)
        read = [self._storage_row(row) for row in self._rows_of(rows, queries.shape[0], "queries")]
        batch, heads, length, _ = queries.shape
        grouped = queries.detach().reshape(batch, self.heads_kv, -1, self.head_dim)
        live = [self._slots.live(row) for row in read]
        with torch.autocast(queries.device.type, enabled=False):
            scores, slots = self._slots.index.search(grouped, self._slots.keys, read, live, num_chunks)
        shape = (batch, heads, length, num_chunks)
        exists = torch.arange(num_chunks, device=self.device) < torch.tensor(live, device=self.device)[:, None]
        exists = exists[:, None, None, :].expand(shape)
        null = self._slots.slots
        # the released code lets missing chunks take part, as zeros, unless memory is empty
        mask = exists[..., :1].expand(shape).clone() if self.eviction == "released" else exists.clone()
        return RetrievedMemory(
            chunk_ids=slots.reshape(shape).masked_fill_(~exists, null),
            chunk_mask=mask,
            scores=scores.reshape(shape).masked_fill_(~exists, 0.0),
            storage=self._slots.storage,
            lengths=self._slots.lengths,
            rows=torch.tensor(read, device=self.device),
            version=self._version,
            live_version=self._live_version,
            sources=self._sources(),
        )

    def provenance(self, row: int, slot: int) -> ChunkOrigin:
        """Where the chunk in this slot of a row came from."""
        stored = self._storage_row(self._rows_of([row], 1, "rows")[0])
        live = self._slots.live(stored)
        if not 0 <= slot < live:
            raise MemoryBankError(f"slot ({slot}) of row {row} holds no chunk; slots in use: {live}, counted from 0")
        return self._slots.ledger.origin(stored, slot, int(self._slots.lengths[stored, slot]))

    def _sources(self) -> Tensor | None:
        """Slots are chunk numbers; but in released mode the null chunk can be found, and stands for nothing."""
        if self.eviction != "released":
            return None
        numbers = torch.arange(self._slots.slots + 1, device=self.device)
        return numbers.masked_fill_(numbers == self._slots.slots, -1)[None]

    def released_slots(self, retrieved: RetrievedMemory) -> Tensor:
        """Chunk ids as the released code numbers them: -1 where a query found fewer chunks than it asked for."""
        return retrieved.chunk_ids.masked_fill(retrieved.chunk_ids == self._slots.slots, -1)

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
            kv: keys and values (B, Hkv, T, D) and, with padding on either side, their mask.
            rows: (B,) the bank row each batch row is written to; by default its own.
            documents: name of the document each row is in; another name than before closes the row's waiting
                tail (and empties the row where ``boundary`` is ``reset``). None: the document goes on.
            offsets: where in its document each row's first real token stands; by default, behind the last one.
                A jump closes the waiting tail.
            time: recorded with the chunks; by default now.
        """
        tokens = self._joined(kv)
        lanes = self._rows_of(rows, tokens.shape[0], "keys")
        for name, given in (("documents", documents), ("offsets", offsets)):
            if given is not None and len(given) != len(lanes):
                raise MemoryBankError(f"{name} ({len(given)} entries) must have one per row written ({len(lanes)})")
        if len(set(lanes)) != len(lanes):
            raise MemoryBankError(f"rows ({lanes}) must name each row once")
        now = clock.time() if time is None else time
        if isinstance(self._slots, ReleasedSlots):
            self._add_released(self._slots, tokens, lanes, documents, offsets, now)
        else:
            self._begin(lanes, documents, offsets, now)
            self._add_masked(tokens, kv.mask, lanes, now)
        self._version += 1

    @torch.no_grad()
    def end_document(self, rows: Tensor | None = None) -> None:
        """Close the waiting tail of these rows (default: all) as a short chunk; what comes next is a new document."""
        lanes = self._rows_of(rows, None, "rows")
        self._close_tail(lanes, clock.time())
        for lane in lanes:
            self._lanes[lane] = _Lane()
        self._version += 1

    def reset(self, rows: Tensor | None = None) -> None:
        """Empty these rows (default: all)."""
        lanes = self._rows_of(rows, None, "rows")
        if self.shared and len(lanes) != self.rows:
            raise MemoryBankError(f"rows ({lanes}) of a shared bank cannot be reset alone; call reset() for all")
        self._slots.clear(sorted({self._storage_row(lane) for lane in lanes}))
        for lane in lanes:
            self._lanes[lane] = _Lane()
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
        """Make this bank what the saved one was; one with other settings, or of another backbone, is refused."""
        for name, mine in self._settings().items():
            theirs = state["settings"].get(name)
            unknown = name in ("fingerprint", "memory_layer") and None in (mine, theirs)
            if mine != theirs and not unknown:
                foreign = name == "fingerprint"
                what = "written by another backbone" if foreign else "of another shape"
                way_out = (
                    "use the backbone that wrote it, or fill the bank anew"
                    if foreign
                    else f"make the bank with {name}={theirs} to load it"
                )
                raise MemoryBankError(f"saved bank is {what}: its {name} is {theirs}, this bank's is {mine}; {way_out}")
        self._slots.load_state_dict(state["slots"])
        self._tail.copy_(state["tail"])
        self._lanes = [_Lane(**lane) for lane in state["lanes"]]
        self._version = max(self._version, state["version"]) + 1

    # how a segment becomes chunks

    def _joined(self, kv: AttentionKV) -> Tensor:
        """Keys and values side by side, (B, Hkv, 2, T, D), in the working dtype."""
        wanted = (self.heads_kv, self.head_dim)
        if kv.keys.dim() != 4 or (kv.keys.shape[1], kv.keys.shape[3]) != wanted:
            shape = tuple(kv.keys.shape)
            raise MemoryBankError(f"keys {shape} must be (B, {wanted[0]}, T, {wanted[1]}), as this bank was made for")
        if kv.values.shape != kv.keys.shape:
            raise MemoryBankError(f"values {tuple(kv.values.shape)} must have the shape of keys {tuple(kv.keys.shape)}")
        if kv.mask is not None and kv.mask.shape != (kv.keys.shape[0], kv.keys.shape[2]):
            expected = (kv.keys.shape[0], kv.keys.shape[2])
            raise MemoryBankError(f"mask {tuple(kv.mask.shape)} must be {expected}: rows and tokens of the keys")
        pair = torch.stack((kv.keys.detach(), kv.values.detach()), dim=2)
        return pair.to(device=self.device, dtype=self._tail.dtype)

    def _begin(
        self, lanes: list[int], documents: Sequence[str | None] | None, offsets: Sequence[int] | None, now: float
    ) -> None:
        """Turn to the named documents and offsets, closing the tails of those that ended."""
        ended, emptied = [], []
        turned: list[_Lane] = []
        for position, number in enumerate(lanes):
            lane = self._lanes[number]
            name = lane.document if documents is None else documents[position]
            other = not lane.open or name != lane.document
            expected = 0 if other else lane.next_token
            offset = expected if offsets is None else offsets[position]
            if other or offset != expected:
                ended.append(number)
            if other and self.boundary == "reset":
                emptied.append(number)
            turned.append(replace(lane, document=name, open=True, next_token=offset))
        self._close_tail([number for number in ended if number not in emptied], now)
        if emptied:
            self._slots.clear(emptied)
        for number, lane in zip(lanes, turned, strict=True):
            self._lanes[number] = replace(lane, waiting=0) if number in ended else lane

    def _add_masked(self, tokens: Tensor, mask: Tensor | None, lanes: list[int], now: float) -> None:
        """Append each row's real tokens; rows with equally many go together."""
        if mask is None or bool(mask.all()):
            each, lengths = None, [tokens.shape[3]] * len(lanes)
        else:
            each = real_tokens(tokens, mask.to(self.device, torch.bool))
            lengths = [row.shape[2] for row in each]
        for positions in self._alike([(self._lanes[n].waiting, t) for n, t in zip(lanes, lengths, strict=True)]):
            if each is not None:
                some = torch.stack([each[position] for position in positions])
            else:
                some = tokens if len(positions) == len(lanes) else tokens[positions]
            self._append([lanes[position] for position in positions], some, now)

    def _alike(self, sizes: list[tuple[int, int]]) -> list[list[int]]:
        """Positions of equal sizes; in a shared bank only neighbours, so that rows are written in order."""
        groups: dict[tuple[int, int, int], list[int]] = {}
        run = 0
        for position, size in enumerate(sizes):
            run += self.shared and position > 0 and size != sizes[position - 1]
            groups.setdefault((*size, run), []).append(position)
        return list(groups.values())

    def _append(self, lanes: list[int], tokens: Tensor, now: float) -> None:
        """Put tokens (L, Hkv, 2, t, D) behind what waits in these lanes; all wait with equally many."""
        added, waiting = tokens.shape[3], self._lanes[lanes[0]].waiting
        if waiting:
            tokens = torch.cat((self._tail[lanes, :, :, :waiting], tokens), dim=3)
        chunks, rest = split(tokens, self.chunk_size)
        first = [self._lanes[lane].next_token - waiting for lane in lanes]
        if chunks.shape[1]:
            self._write(lanes, chunks, torch.full(chunks.shape[:2], self.chunk_size), first, now)
        self._tail[lanes, :, :, : rest.shape[3]] = rest
        for lane in lanes:
            self._lanes[lane].waiting = rest.shape[3]
            self._lanes[lane].next_token += added

    def _close_tail(self, lanes: list[int], now: float) -> None:
        """Write what waits in these lanes as one short chunk each."""
        lanes = [lane for lane in lanes if self._lanes[lane].waiting]
        if not lanes:
            return
        lengths = torch.tensor([[self._lanes[lane].waiting] for lane in lanes])
        real = (torch.arange(self.chunk_size) < lengths).to(self.device)
        chunks = self._tail[lanes].masked_fill(~real[:, None, None, :, None], 0.0)
        first = [self._lanes[lane].next_token - self._lanes[lane].waiting for lane in lanes]
        self._write(lanes, chunks[:, None], lengths, first, now)
        for lane in lanes:
            self._lanes[lane].waiting = 0

    def _write(self, lanes: list[int], chunks: Tensor, lengths: Tensor, first: list[int], now: float) -> None:
        """Store chunks (L, n, Hkv, 2, S, D) whose first one begins at token ``first`` of its lane's document."""
        count = chunks.shape[1]
        documents = self._slots.ledger.ids([self._lanes[lane].document for lane in lanes])[:, None].expand(-1, count)
        start = torch.tensor(first)[:, None] + torch.arange(count) * self.chunk_size
        self._slots.write([self._storage_row(lane) for lane in lanes], chunks, lengths, documents, start, now)

    def _add_released(
        self,
        slots: ReleasedSlots,
        tokens: Tensor,
        lanes: list[int],
        documents: Sequence[str | None] | None,
        offsets: Sequence[int] | None,
        now: float,
    ) -> None:
        """OFFICIAL.md 1.4: rows one after the other, tail dropped, chunks may straddle rows, padding is kept."""
        length, size = tokens.shape[3], self.chunk_size
        chunks, _ = split(tokens.permute(1, 2, 0, 3, 4).flatten(2, 3)[None], size)
        count = chunks.shape[1]
        if not count:
            return
        slots.make_room(count, 2 * len(lanes) * length // size)
        self._begin(lanes, documents, offsets, now)
        first = torch.arange(count) * size  # of each chunk, in the flattened tokens
        starts = torch.tensor([self._lanes[lane].next_token for lane in lanes])
        ids = slots.ledger.ids([self._lanes[lane].document for lane in lanes])
        begin = starts[first // length] + first % length
        slots.write([0], chunks, torch.full((1, count), size), ids[first // length][None], begin[None], now)
        for lane in lanes:
            self._lanes[lane].next_token += length

    # small helpers

    def _live_version(self) -> int:
        return self._version

    def _storage_row(self, row: int) -> int:
        return 0 if self.shared else row

    def _rows_of(self, rows: Tensor | Sequence[int] | None, batch: int | None, what: str) -> list[int]:
        """Bank rows as plain numbers; by default all, in order."""
        if rows is None:
            if batch is not None and batch != self.rows:
                raise MemoryBankError(f"{what} have {batch} rows, the bank has {self.rows}; pass rows= to say which")
            return list(range(self.rows))
        chosen = [int(row) for row in (rows.tolist() if isinstance(rows, Tensor) else rows)]
        if batch is not None and len(chosen) != batch:
            raise MemoryBankError(f"rows ({len(chosen)} entries) must have one per row of the {what} ({batch})")
        outside = [row for row in chosen if not 0 <= row < self.rows]
        if outside:
            raise MemoryBankError(f"rows ({outside[0]}) must lie in 0..{self.rows - 1}, the rows of this bank")
        return chosen

    def _check_queries(self, queries: Tensor, num_chunks: int) -> None:
        if queries.dim() != 4 or queries.shape[3] != self.head_dim:
            raise MemoryBankError(
                f"queries {tuple(queries.shape)} must be (B, H, T, {self.head_dim}), with the head_dim of this bank"
            )
        if queries.shape[1] % self.heads_kv:
            raise MemoryBankError(
                f"queries have {queries.shape[1]} heads, which must be a multiple of the bank's {self.heads_kv} "
                "key/value heads"
            )
        if num_chunks < 1:
            raise MemoryBankError(f"num_chunks ({num_chunks}) must be at least 1")
        if queries.device.type != self.device.type:
            raise MemoryBankError(f"queries are on {queries.device}, the bank on {self.device}; move one of them")

    def _settings(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "memory_layer": self.memory_layer,
            "rows": self.rows,
            "capacity_tokens": self.capacity_tokens,
            "heads_kv": self.heads_kv,
            "head_dim": self.head_dim,
            "chunk_size": self.chunk_size,
            "dtype": str(self._slots.storage.dtype),
            "key_dtype": str(self._slots.keys.dtype),
            "shared": self.shared,
            "eviction": self.eviction,
            "boundary": self.boundary,
        }


def _problems(
    rows: int,
    capacity: int,
    heads_kv: int,
    head_dim: int,
    chunk_size: int,
    shared: bool,
    eviction: str,
    boundary: str,
) -> list[str]:
    """Every broken rule of the constructor, one line each."""
    sizes = {"rows": rows, "heads_kv": heads_kv, "head_dim": head_dim, "chunk_size": chunk_size}
    found = [f"{name} ({value}) must be at least 1" for name, value in sizes.items() if value < 1]
    if chunk_size >= 1:
        rest = capacity % chunk_size
        if capacity < chunk_size:
            found.append(f"capacity_tokens ({capacity}) must hold at least one chunk; try {chunk_size}")
        elif rest:
            tries = f"{capacity - rest} or {capacity - rest + chunk_size}"
            found.append(f"capacity_tokens ({capacity}) must be a multiple of chunk_size ({chunk_size}); try {tries}")
        elif eviction == "released" and capacity < 2 * chunk_size:
            found.append(f"capacity_tokens ({capacity}) must hold two chunks in released mode; try {2 * chunk_size}")
    if eviction not in ("oldest", "released"):
        found.append(f"eviction ({eviction!r}) must be one of oldest, released")
    if eviction == "released" and not shared:
        found.append("eviction ('released') needs shared=True: the released code has one memory for all rows")
    if boundary not in ("keep", "reset"):
        found.append(f"boundary ({boundary!r}) must be one of keep, reset")
    if boundary == "reset" and shared:
        found.append("boundary ('reset') cannot be kept with shared=True; use boundary='keep', or a row per lane")
    return found
