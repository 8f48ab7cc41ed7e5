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
PIECE_SEGMENTS = 16
"""Segments of one piece, at most: the unit of deduplication, of check sums and of resuming after an interruption."""


@dataclass(frozen=True)
class Layout:
    """What is fixed when a store is made; equal token ids in equal layouts leave equal tensors.

    Attributes:
        store_id: 16 random hex digits.
        fingerprint: of the backbone whose keys and values are kept.
        backbone: its name.
        memory_layers: the remembered layers, 0-based, ascending.
        heads_kv: Hkv.
        head_dim: D.
        chunk_size: S.
        segment_tokens: T, tokens that the backbone sees together; a multiple of S.
        dtype: of the stored keys and values.
        created: seconds since the epoch.
        format: of the files, 2.
    """

    store_id: str
    fingerprint: str
    backbone: str
    memory_layers: tuple[int, ...]
    heads_kv: int
    head_dim: int
    chunk_size: int
    segment_tokens: int
    dtype: Dtype
    created: float
    format: int = FORMAT

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
    """A document to add: either ``text`` or ``ids``.

    Attributes:
        name: unique in its namespace.
        text: what to remember.
        ids: token ids to remember as they are, where there is no text.
        source: where it came from.
        metadata: a JSON object.
        time: when it was said, seconds since the epoch; None is now. Documents are in the order of their times.
        expires: seconds since the epoch from which on it is not found any more.
        replace: whether it may take the place of another text of this name.
    """

    name: str
    text: str | None = None
    ids: Sequence[int] | NDArray[Any] | torch.Tensor | None = None
    source: str | None = None
    metadata: Mapping[str, Any] | None = None
    time: float | None = None
    expires: float | None = None
    replace: bool = False


@dataclass(frozen=True)
class DocumentInfo:
    """A document of a namespace.

    Attributes:
        id: its number in the store, never given again.
        name: composed (Unicode NFC), as namespaces are.
        added: its time, seconds since the epoch.
        expires: seconds since the epoch from which on it is not found any more, or None.
        tokens: in it.
        chunks: in it.
        revision: 1, and one more at every append and replacement.
    """

    id: int
    namespace: str
    name: str
    source: str | None
    metadata: dict[str, Any]
    added: float
    expires: float | None
    tokens: int
    chunks: int
    revision: int

    def expired(self, now: float) -> bool:
        """Whether it is not found any more."""
        return self.expires is not None and self.expires <= now


@dataclass(frozen=True)
class Receipt:
    """What became of a document.

    Attributes:
        status: ``added``, ``replaced``, ``appended``, ``updated`` (same text, other expiry) or ``unchanged``.
        tokens: in the document now.
        chunks: in the document now.
        reused_tokens: those whose text this namespace had already; other namespaces do not count.
        revision: of the document now.
    """

    namespace: str
    name: str
    status: Status
    tokens: int
    chunks: int
    reused_tokens: int
    revision: int


@dataclass(frozen=True)
class Progress:
    """How far a long piece of work is.

    Attributes:
        step: what is done: ``encode``, ``check``, ``rewrite``, ``copy``.
        done: so far, in ``unit``.
        total: in all, or None where it is not known (a stream).
        unit: ``tokens``, ``bytes`` or ``pieces``.
        name: the document or file at hand.
    """

    step: str
    done: int
    total: int | None
    unit: str
    name: str


Report = Callable[[Progress], None]
"""Called with the progress of long work; an exception that it raises ends the work with everything as before."""


@dataclass(frozen=True)
class ForgetReport:
    """What was forgotten: names and token counts.

    Attributes:
        namespace: of the documents.
        time: when, seconds since the epoch.
        documents: names and token counts.
    """

    namespace: str
    time: float
    documents: list[tuple[str, int]]

    @property
    def tokens(self) -> int:
        """Tokens of all forgotten documents."""
        return sum(tokens for _, tokens in self.documents)


@dataclass(frozen=True)
class CompactReport:
    """What compacting did.

    Attributes:
        documents: expired ones that were removed.
        tokens: of pieces that no document used, removed.
        bytes_before, bytes_after: of data files and catalog.
        emptied: whether the write-ahead log could be emptied; a reader in a long snapshot keeps it, and with it bytes
            of forgotten text, until the next compact or close.
    """

    documents: int
    tokens: int
    bytes_before: int
    bytes_after: int
    emptied: bool


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be.

    Attributes:
        kind: ``catalog``, ``file``, ``piece`` (its keys and values), ``text`` (its token ids or text) or ``document``.
        where: file, and place in it.
        what: is wrong, and the way out.
        repaired: whether it is right again.
    """

    kind: str
    where: str
    what: str
    repaired: bool = False


@dataclass(frozen=True)
class VerifyReport:
    """What verifying found.

    Attributes:
        problems: all of them; none means that every byte in use is what was written.
        bytes: read.
        documents: checked.
        rebuilt_tokens: encoded again by the repair.
        same_bits: whether all that was encoded again has the bits it had; None where nothing was.
    """

    problems: list[Problem] = field(default_factory=list)
    bytes: int = 0
    documents: int = 0
    rebuilt_tokens: int = 0
    same_bits: bool | None = None

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong now."""
        return all(problem.repaired for problem in self.problems)


@dataclass(frozen=True)
class Stats:
    """How much there is; for one namespace as if it shared nothing with others.

    Attributes:
        namespaces: how many; 1 for one.
        documents, tokens, chunks: that can be found now.
        expired: documents past their time, still on disk.
        stored_bytes: of the chunks of these documents in data files.
        file_bytes, catalog_bytes: on disk; None for one namespace.
        dead_tokens: on disk until the next compact; None for one namespace.
    """

    namespaces: int
    documents: int
    tokens: int
    chunks: int
    expired: int
    stored_bytes: int
    file_bytes: int | None = None
    catalog_bytes: int | None = None
    dead_tokens: int | None = None
