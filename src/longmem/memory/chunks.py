"""From tokens to chunks, and the storage that keeps them.

Hkv key/value heads of all remembered layers · n chunks · S tokens per chunk · D head_dim
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from longmem.errors import MemoryBankError
from longmem.types import AttentionKV, ChunkOrigin

Run = tuple[int, str | None, int, float]
"""Chunks written together: number of the first one, document, its first token there, time of writing."""


class Slots:
    """A ring of chunk slots for every row, the keys they are searched by, and where each chunk came from.

    Chunk number n of a row is in slot ``n % slots``: once the ring is full, a new chunk overwrites the oldest one, and
    the slots in use are always the first ones. The last slot is the null chunk, always zero: "nothing found".

    Attributes:
        storage: (rows, slots + 1, Hkv, 2, S, D), keys and values.
        keys: (rows, Hkv, slots, D), mean key of each chunk.
        lengths: (rows, slots + 1) long, real tokens in each chunk; 0 where a slot is not in use.
        numbers: (rows, slots + 1) long, of the chunk that ``write`` put in each slot; -1 of none.
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
        device: torch.device,
    ) -> None:
        self.slots = slots
        self.storage = torch.zeros(rows, slots + 1, heads, 2, chunk_size, head_dim, dtype=dtype, device=device)
        self.keys = torch.zeros(rows, heads, slots, head_dim, device=device)
        self.lengths = torch.zeros(rows, slots + 1, dtype=torch.long, device=device)
        self.numbers = torch.full_like(self.lengths, -1)
        self.written = [0] * rows
        self.runs: list[list[Run]] = [[] for _ in range(rows)]

    def live(self, row: int) -> int:
        """Chunks in use in this row."""
        return min(self.written[row], self.slots)

    def write(self, row: int, chunks: Tensor, lengths: Tensor, document: str | None, first: int, time: float) -> Tensor:
        """Store neighbouring chunks of a document in a row; of more than fit, the newest stay.

        Args:
            chunks: (n, Hkv, 2, S, D) with zeros behind the real tokens, not yet rounded.
            lengths: (n,) real tokens in each.
            document, first: where the first chunk begins.
            time: of writing.

        Returns:
            (M,) slots that were written.
        """
        self.runs[row].append((self.written[row], document, first, time))
        self.written[row] += len(chunks)
        # let go of runs whose last chunk is overwritten
        runs, oldest = self.runs[row], self.written[row] - self.slots
        del runs[: max(0, bisect_right(runs, oldest, key=itemgetter(0)) - 1)]
        kept = min(len(chunks), self.slots)
        numbers = torch.arange(self.written[row] - kept, self.written[row], device=self.numbers.device)
        slots = numbers % self.slots
        self.numbers[row][slots] = numbers
        chunks, lengths = chunks[-kept:], lengths[-kept:].to(self.storage.device)
        self.storage[row][slots] = chunks.to(self.storage.dtype)
        self.keys[row][:, slots] = mean_keys(chunks, lengths).transpose(0, 1).to(self.keys.dtype)
        self.lengths[row][slots] = lengths
        return slots

    def run(self, start: int, stop: int) -> Slots:
        """Chunks ``start`` to ``stop`` of full rows as slots of their own, of no document, in the same storage."""
        part, count = copy.copy(self), stop - start
        part.slots, part.storage, part.keys = count, self.storage[:, start:stop], self.keys[:, :, start:stop]
        part.lengths = self.lengths[:, start:stop]
        part.numbers = torch.arange(count, device=self.numbers.device).repeat(len(self.written), 1)
        part.written, part.runs = [count] * len(self.written), [[(0, None, 0, 0.0)] for _ in self.written]
        return part

    def clear(self, row: int) -> None:
        """Empty a row; its chunk numbers start again at zero."""
        self.written[row], self.runs[row] = 0, []
        self.lengths[row] = 0
        self.numbers[row] = -1

    def origin(self, row: int, number: int) -> ChunkOrigin:
        """Where a chunk that is still there came from."""
        runs = self.runs[row]
        begin, document, first, time = runs[bisect_right(runs, number, key=itemgetter(0)) - 1]
        start = first + (number - begin) * self.storage.shape[4]
        return ChunkOrigin(document, start, int(self.lengths[row, number % self.slots]), number, time)

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
        used = state["storage"].shape[1]
        self.lengths.zero_()
        self.storage[:, :used].copy_(state["storage"])
        self.keys[:, :, :used].copy_(state["keys"])
        self.lengths[:, :used].copy_(state["lengths"])
        self.written = list(state["written"])
        self.numbers.fill_(-1)
        for row, end in enumerate(self.written):
            numbers = torch.arange(end - self.live(row), end, device=self.numbers.device)
            self.numbers[row][numbers % self.slots] = numbers
        if "ledger" in state:
            self.runs = [self._runs_of(state["ledger"], row) for row in range(len(self.written))]
        else:
            self.runs = [list(runs) for runs in state["runs"]]

    def _runs_of(self, table: dict[str, Any], row: int) -> list[Run]:
        """A run for every chunk of a table of version 0.1: document, start, number and time of each slot."""
        spelled = {number: name for name, number in table["names"].items()}
        columns = (table[name][row, : self.live(row)].tolist() for name in ("number", "document", "start", "time"))
        runs = [(n, spelled.get(document), start, time) for n, document, start, time in zip(*columns, strict=True)]
        return sorted(runs, key=itemgetter(0))


def joined(kv: AttentionKV, heads: int, head_dim: int) -> Tensor:
    """Keys and values next to each other, (B, Hkv, 2, T, D), without gradient; a MemoryBankError if they do not fit."""
    if kv.keys.dim() != 4 or (kv.keys.shape[1], kv.keys.shape[3]) != (heads, head_dim):
        shape = tuple(kv.keys.shape)
        raise MemoryBankError(f"keys {shape} must be (B, {heads}, T, {head_dim}), as this bank was made for")
    if kv.values.shape != kv.keys.shape:
        raise MemoryBankError(f"values {tuple(kv.values.shape)} must have the shape of keys {tuple(kv.keys.shape)}")
    rows_tokens = (kv.keys.shape[0], kv.keys.shape[2])
    if kv.mask is not None and kv.mask.shape != rows_tokens:
        raise MemoryBankError(f"mask {tuple(kv.mask.shape)} must be {rows_tokens}: rows and tokens of the keys")
    return torch.stack((kv.keys.detach(), kv.values.detach()), dim=2)


def refuse_unfit(pair: Tensor, mask: Tensor | None, dtype: torch.dtype, chunk_size: int) -> None:
    """Refuse, with a MemoryBankError, numbers that memory cannot hold: one would make every later answer NaN.

    Args:
        pair: keys and values (B, Hkv, 2, T, D), to be stored as ``dtype``.
        mask: (B, T) bool, True at real tokens; padding may hold anything.
    """
    if mask is not None and not bool(mask.all()):
        pair = pair.masked_fill(~mask.to(pair.device, torch.bool)[:, None, None, :, None], 0.0)
    if not pair.numel():
        return
    most = torch.finfo(dtype).max
    most_key = min(most, torch.finfo(torch.float32).max / chunk_size)  # S keys are added in float32
    low, high = torch.aminmax(pair)
    if -low.item() <= most_key and high.item() <= most_key:  # NaN is below no limit
        return
    largest = pair.abs().amax(dim=(1, 3, 4)).double().cpu()  # (B, 2)
    for row, (key, value) in enumerate(largest.tolist()):
        for name, number, limit in (("keys", key, most_key), ("values", value, most)):
            if not number <= limit:
                raise MemoryBankError(
                    f"{name} of row {row} reach {number:.3g}, a bank of {dtype} holds {limit:.3g} at most; look for an "
                    "overflow in the model, or make the bank with dtype torch.bfloat16 or torch.float32"
                )


def split(tokens: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Whole chunks (..., t // S, Hkv, 2, S, D) of tokens (..., Hkv, 2, t, D), and the tail (..., Hkv, 2, t % S, D)."""
    whole = tokens.shape[-2] // chunk_size
    chunks = tokens[..., : whole * chunk_size, :].unflatten(-2, (whole, chunk_size))
    return chunks.movedim(-3, -5), tokens[..., whole * chunk_size :, :]


def mean_keys(chunks: Tensor, lengths: Tensor) -> Tensor:
    """Mean of the real keys of every chunk, before any rounding to the storage dtype.

    Args:
        chunks: (M, Hkv, 2, S, D) with zeros behind the real tokens, at least float32.
        lengths: (M,) real tokens per chunk, at least 1.

    Returns:
        (M, Hkv, D).
    """
    keys = chunks[:, :, 0]
    total = keys[:, :, 0].clone()
    # token by token, not by sum(): its order of adding depends on the shape, and adding in parts must equal adding
    # at once to the last bit
    for token in range(1, keys.shape[2]):
        total += keys[:, :, token]
    return total / lengths[:, None, None].to(total.dtype)
