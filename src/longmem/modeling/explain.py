"""What a forward pass read from memory: every chunk, who found it, and how much of the output it made.

B rows · T tokens · H heads · n remembered layers · R chunks per token and head
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from longmem.types import ChunkOrigin, Memory

if TYPE_CHECKING:
    from longmem.modeling.reading import LayerRead


@dataclass(frozen=True)
class ChunkReading:
    """One chunk, as one token or several read it.

    Attributes:
        chunk: its number in its row, as ``Memory.provenance`` counts; a bank that is written may number anew.
        origin: its document, offset and time, looked up when it was read.
        share: part of the heads' output that came from it, the mean over tokens, heads and layers. Over all chunks
            these sum to the mean share that was given to memory.
        score: largest inner product of a query with its mean key.
        layers: for every remembered layer whose heads found it, their mean part.
    """

    chunk: int
    origin: ChunkOrigin
    share: float
    score: float
    layers: dict[int, float]


@dataclass(frozen=True)
class Explanation:
    """What every token and head of one forward pass read: ``LongMem.forward(..., explain=True).explanation``.

    Attributes:
        rows: (B,) long, the memory row each batch row read.
        chunks: (B, n*H, T, R) long, the number of each chunk found, best first; -1 where fewer were there.
        scores: (B, n*H, T, R) float32, inner products of query and mean key; 0 where nothing was found.
        shares: (B, n*H, T, R) float32, the share of the head's output that came from this chunk: the share given to
            memory times the chunk's part of the attention over memory.
        origins: by memory row and chunk number, where each chunk came from.
        layers: the remembered layers, in the order of their heads.
    """

    rows: Tensor
    chunks: Tensor
    scores: Tensor
    shares: Tensor
    origins: dict[tuple[int, int], ChunkOrigin]
    layers: tuple[int, ...] = (0,)

    @classmethod
    def of(cls, memory: Memory, reads: Sequence[LayerRead]) -> Explanation:
        """Look up what the layers found, now: the memory may be written, or forget, a moment later."""
        first = reads[0].retrieved
        rows = first.rows if first.memory_rows is None else first.memory_rows
        chunks = torch.cat([read.retrieved.chunks for read in reads], dim=1)
        scores = torch.cat([read.retrieved.scores.float() for read in reads], dim=1)
        shares = torch.cat([cast(Tensor, read.shares).float() for read in reads], dim=1)
        # row and chunk in one integer; chunks stay below 1 << 40, a session's too (``memory.session.OVERLAY``)
        found = ((rows.view(-1, 1, 1, 1) << 40) + chunks)[chunks >= 0]
        pairs = [divmod(pair, 1 << 40) for pair in torch.unique(found).tolist()]
        origins = {(row, chunk): memory.provenance(row, chunk) for row, chunk in pairs}
        layers = tuple(read.layer for read in reads)
        return cls(rows.cpu(), chunks.cpu(), scores.cpu(), shares.cpu(), origins, layers)

    @property
    def share(self) -> Tensor:
        """(B, n*H, T), the share that each token and head gave to memory."""
        return self.shares.sum(-1)

    def token(self, position: int, row: int = 0, *, top: int | None = None) -> list[ChunkReading]:
        """What one token read, all its heads together, largest share first.

        ``position`` is of the token in the input; in ``generate`` the last one of a call chose the next token.
        """
        return self.over([position], row, top=top)

    def over(
        self, positions: Iterable[int] | None = None, row: int = 0, *, top: int | None = None
    ) -> list[ChunkReading]:
        """What several tokens of a batch row read together, at most ``top`` chunks; None: every token of the row."""
        at = torch.arange(self.chunks.shape[2]) if positions is None else torch.tensor([*positions], dtype=torch.long)
        chunks, shares, scores = (each[row][:, at].flatten(1) for each in (self.chunks, self.shares, self.scores))
        numbers, inverse = torch.unique(chunks, return_inverse=True)
        # (n, H, chunks); the slot of "nothing found" is dropped below
        shape = (len(self.layers), -1, len(numbers))
        parts = torch.zeros(chunks.shape[0], len(numbers)).scatter_add_(1, inverse, shares).view(shape) / max(
            1, len(at)
        )
        found = torch.zeros(chunks.shape[0], len(numbers), dtype=torch.bool).scatter_(1, inverse, True).view(shape)
        best = torch.full((len(numbers),), -torch.inf).scatter_reduce_(0, inverse.flatten(), scores.flatten(), "amax")
        share, by_layer, finders = parts.mean((0, 1)), parts.mean(1), found.any(1)
        order = [slot for slot in share.argsort(descending=True, stable=True).tolist() if int(numbers[slot]) >= 0]
        return [
            ChunkReading(
                chunk=int(numbers[slot]),
                origin=self.origins[int(self.rows[row]), int(numbers[slot])],
                share=float(share[slot]),
                score=float(best[slot]),
                layers={
                    layer: float(by_layer[place, slot])
                    for place, layer in enumerate(self.layers)
                    if finders[place, slot]
                },
            )
            for slot in order[:top]
        ]
