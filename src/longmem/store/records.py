"""What goes into a memory store and what it answers: plain records. All names and fields here are public and final.

S tokens per chunk · Hkv key/value heads of one layer · D head_dim · n remembered layers
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from numpy.typing import NDArray

Dtype = Literal["float32", "float16", "bfloat16", "int8"]
Status = Literal["added", "replaced", "appended", "updated", "unchanged"]
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
FORMAT = 2
PIECE_SEGMENTS = 16  # of one piece, at most: the unit of deduplication, of check sums and of resuming an add


@dataclass(frozen=True)
class Layout:
    """What is fixed when a store is made; equal token ids in equal layouts leave equal tensors."""

    store_id: str  # 16 random hex digits
    fingerprint: str  # of the backbone whose keys and values are kept
    backbone: str  # its name
    memory_layers: tuple[int, ...]  # the remembered layers, 0-based, ascending
    heads_kv: int  # Hkv
    head_dim: int  # D
    chunk_size: int  # S
    segment_tokens: int  # T, tokens that the backbone sees together; a multiple of S
    dtype: Dtype  # of the stored keys and values
    created: float  # seconds since the epoch
    format: int = FORMAT  # of the files

    @property
    def layers(self) -> int:
        """n, how many layers are remembered."""
        return len(self.memory_layers)

    @property
    def heads(self) -> int:
        """n * Hkv: the heads of a stored chunk, those of the first layer first."""
        return self.layers * self.heads_kv

    @property
    def piece_tokens(self) -> int:
        """Tokens of a whole piece."""
        return PIECE_SEGMENTS * self.segment_tokens

    @property
    def record_bytes(self) -> int:
        """Bytes of one chunk's keys and values, (n * Hkv, 2, S, D)."""
        return self.heads * 2 * self.chunk_size * self.head_dim * DTYPES[self.dtype].itemsize

    @property
    def key_bytes(self) -> int:
        """Bytes of one chunk's mean keys, (n * Hkv, D) float32, and with int8 its scales, (n * Hkv, 2) float32."""
        return 4 * self.heads * (self.head_dim + (2 if self.dtype == "int8" else 0))

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk in the data files."""
        return self.record_bytes + self.key_bytes

    def chunks(self, tokens: int) -> int:
        """Chunks of a run of tokens; the last one may be short."""
        return -(-tokens // self.chunk_size)

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Layout:
        """The inverse of ``asdict``, also of a layout of format 1, which names one ``memory_layer``."""
        known = {**fields}
        if "memory_layer" in known:
            known["memory_layers"] = (known.pop("memory_layer"),)
        return cls(**{**known, "memory_layers": tuple(known["memory_layers"]), "format": FORMAT})

    def difference(self, other: Layout) -> str | None:
        """The first field in which tensors written by one cannot be read as the other's; None if they can."""
        fields = ("memory_layers", "heads_kv", "head_dim", "chunk_size", "segment_tokens", "dtype")
        return next((name for name in fields if getattr(self, name) != getattr(other, name)), None)


@dataclass(frozen=True)
class NewDocument:
    """A document to add: either ``text`` or ``ids``."""

    name: str  # unique in its namespace
    text: str | None = None
    ids: Sequence[int] | NDArray[Any] | torch.Tensor | None = None  # to remember as they are, where there is no text
    source: str | None = None  # where it came from
    metadata: Mapping[str, Any] | None = None  # a JSON object
    time: float | None = None  # seconds since the epoch, None is now; documents are in the order of their times
    expires: float | None = None  # seconds since the epoch from which on it is not found any more
    replace: bool = False  # whether it may take the place of another text of this name


@dataclass(frozen=True)
class DocumentInfo:
    """A document of a namespace."""

    id: int  # its number in the store, never given again
    namespace: str
    name: str  # composed (Unicode NFC), as namespaces are
    source: str | None
    metadata: dict[str, Any]
    added: float  # its time, seconds since the epoch
    expires: float | None  # seconds since the epoch from which on it is not found any more
    tokens: int
    chunks: int
    revision: int  # 1, and one more at every append and replacement

    def expired(self, now: float) -> bool:
        """Whether it is not found any more."""
        return self.expires is not None and self.expires <= now


@dataclass(frozen=True)
class Receipt:
    """What became of a document."""

    namespace: str
    name: str
    status: Status  # ``updated``: the same text with another expiry
    tokens: int  # in the document now
    chunks: int
    reused_tokens: int  # those whose text this namespace had already; other namespaces do not count
    revision: int


@dataclass(frozen=True)
class Progress:
    """How far a long piece of work is."""

    step: str  # ``encode``, ``check``, ``rewrite`` or ``copy``
    done: int  # so far, in ``unit``
    total: int | None  # None where it is not known (a stream)
    unit: str  # ``tokens``, ``bytes`` or ``pieces``
    name: str  # the document or file at hand


Report = Callable[[Progress], None]
"""Called with the progress of long work; an exception that it raises ends the work with everything as before."""


@dataclass(frozen=True)
class ForgetReport:
    """What was forgotten."""

    namespace: str
    time: float  # when, seconds since the epoch
    documents: list[tuple[str, int]]  # names and token counts

    @property
    def tokens(self) -> int:
        """Tokens of all forgotten documents."""
        return sum(tokens for _, tokens in self.documents)


@dataclass(frozen=True)
class CompactReport:
    """What compacting did."""

    documents: int  # expired ones that were removed
    tokens: int  # of pieces that no document used, removed
    bytes_before: int  # of data files and catalog
    bytes_after: int
    emptied: bool  # the write-ahead log; a reader in a long snapshot keeps it, and bytes of forgotten text in it


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be."""

    kind: str  # ``catalog``, ``file``, ``piece`` (keys and values), ``text`` (token ids or text) or ``document``
    where: str  # file, and place in it
    what: str  # is wrong, and the way out
    repaired: bool = False


@dataclass(frozen=True)
class VerifyReport:
    """What verifying found."""

    problems: list[Problem] = field(default_factory=list)  # none: every byte in use is what was written
    bytes: int = 0  # read
    documents: int = 0  # checked
    rebuilt_tokens: int = 0  # encoded again by the repair
    same_bits: bool | None = None  # whether all that was encoded again has the bits it had; None where nothing was

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong now."""
        return all(problem.repaired for problem in self.problems)


@dataclass(frozen=True)
class Stats:
    """How much there is; for one namespace as if it shared nothing with others."""

    namespaces: int  # 1 for one
    documents: int  # that can be found now, as are tokens and chunks
    tokens: int
    chunks: int
    expired: int  # documents past their time, still on disk
    stored_bytes: int  # of the chunks of these documents in data files
    file_bytes: int | None = None  # on disk, as is the catalog; None for one namespace
    catalog_bytes: int | None = None
    dead_tokens: int | None = None  # on disk until the next compact; None for one namespace
