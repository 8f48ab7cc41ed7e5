"""What goes into a memory store and what it answers: plain records.

S tokens per chunk · Hkv key/value heads · D head_dim
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from numpy.typing import NDArray

from longmem.errors import StoreError

Dtype = Literal["float32", "float16", "bfloat16", "int8"]
Status = Literal["added", "replaced", "appended", "updated", "unchanged"]
DTYPES: dict[str, tuple[torch.dtype, int, str]] = {
    "float32": (torch.float32, 4, "F32"),
    "float16": (torch.float16, 2, "F16"),
    "bfloat16": (torch.bfloat16, 2, "BF16"),
    "int8": (torch.int8, 1, "I8"),
}
"""Stored types: torch's, bytes of one number, and the name in a data file."""

FORMAT = 1
PIECE_SEGMENTS = 16
"""Segments of one content, at most: the unit of deduplication and of going on after an interruption."""


@dataclass(frozen=True)
class Layout:
    """What is fixed when a store is made; equal token ids in equal layouts leave equal tensors.

    Attributes:
        format: of the files, 1.
        store_id: 16 random hex digits.
        fingerprint: of the backbone whose keys and values are kept.
        backbone: its name.
        memory_layer: m, 0-based.
        heads_kv: Hkv.
        head_dim: D.
        chunk_size: S.
        segment_tokens: T, tokens that the backbone sees together; a multiple of S.
        dtype: of the stored keys and values.
        created: seconds since the epoch.
    """

    store_id: str
    fingerprint: str
    backbone: str
    memory_layer: int
    heads_kv: int
    head_dim: int
    chunk_size: int
    segment_tokens: int
    dtype: Dtype
    created: float
    format: int = FORMAT

    @property
    def piece_tokens(self) -> int:
        """Tokens of a whole content."""
        return PIECE_SEGMENTS * self.segment_tokens

    @property
    def record_bytes(self) -> int:
        """Bytes of one chunk's keys and values, (Hkv, 2, S, D)."""
        return self.heads_kv * 2 * self.chunk_size * self.head_dim * DTYPES[self.dtype][1]

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk in a data file: keys and values, mean key, length and, with int8, scales."""
        scales = 8 * self.heads_kv if self.dtype == "int8" else 0
        return self.record_bytes + 4 * self.heads_kv * self.head_dim + 4 + scales

    def chunks(self, tokens: int) -> int:
        """Chunks of a run of tokens; the last one may be short."""
        return -(-tokens // self.chunk_size)

    def to_meta(self) -> dict[str, str]:
        """As rows of the catalog's ``meta`` table."""
        return {key: value if isinstance(value, str) else repr(value) for key, value in asdict(self).items()}

    @classmethod
    def from_meta(cls, meta: Mapping[str, str]) -> Layout:
        """The inverse of ``to_meta``."""
        kinds: dict[str, Callable[[str], Any]] = {"int": int, "float": float}
        return cls(
            **{name: kinds.get(str(kind.type), str)(meta[name]) for name, kind in cls.__dataclass_fields__.items()}
        )

    def difference(self, other: Layout) -> list[str]:
        """Names of the fields in which tensors written by one cannot be read as the other's."""
        fields = ("fingerprint", "memory_layer", "heads_kv", "head_dim", "chunk_size", "segment_tokens", "dtype")
        return [name for name in fields if getattr(self, name) != getattr(other, name)]


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
        expires: seconds since the epoch from which on nobody finds it.
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
        id: its number in the store, growing.
        added: its time, seconds since the epoch.
        expires: seconds since the epoch from which on nobody finds it, or None.
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
        """Whether nobody finds it any more."""
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
        total: in all, or None where nobody knows (a stream).
        unit: ``tokens``, ``bytes`` or ``contents``.
        name: the document or file at hand.
    """

    step: str
    done: int
    total: int | None
    unit: str
    name: str


Report = Callable[[Progress], None]
"""Called with the progress of long work; what it raises ends the work with everything as before."""


@dataclass(frozen=True)
class ForgottenContent:
    """What was stored of some text, as hashes only.

    Attributes:
        digest: of the token ids and the text, hex.
        tokens: how many.
        records: one hash of 8 bytes for every stored chunk, hex.
        windows: hashes of stretches of the token ids and the text as the catalog keeps them, see ``absence``.
    """

    digest: str
    tokens: int
    records: str
    windows: dict[str, str]


@dataclass(frozen=True)
class ForgetReport:
    """What was forgotten, so that it can be checked; holds names and hashes, never text.

    Attributes:
        namespace: of the documents.
        time: when, seconds since the epoch.
        store_id: of the store.
        key: of the keyed hashes, hex.
        documents: names and token counts.
        contents: what was stored of them.
    """

    namespace: str
    time: float
    store_id: str
    key: str
    documents: list[tuple[str, int]]
    contents: list[ForgottenContent]

    @property
    def tokens(self) -> int:
        """Tokens of all forgotten documents."""
        return sum(tokens for _, tokens in self.documents)

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps({"format": "longmem-forgotten-1", **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> ForgetReport:
        """The inverse of ``to_json``.

        Raises:
            StoreError: the text is no such report.
        """
        try:
            fields = json.loads(text)
            if fields.pop("format") != "longmem-forgotten-1":
                raise ValueError("another format")
            fields["documents"] = [(str(name), int(tokens)) for name, tokens in fields["documents"]]
            fields["contents"] = [ForgottenContent(**content) for content in fields["contents"]]
            return cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"not a report of `longmem memory forget` ({error}); give the JSON that it printed"
            ) from error


@dataclass(frozen=True)
class CompactReport:
    """What compacting did.

    Attributes:
        documents: expired ones that were removed.
        tokens: of contents that nobody referred to, removed.
        files_before, files_after: data files.
        bytes_before, bytes_after: of data files and catalog.
        emptied: whether the write-ahead log could be emptied; readers with a long snapshot keep it, and with it bytes
            of forgotten text, until the next compact or close.
    """

    documents: int
    tokens: int
    files_before: int
    files_after: int
    bytes_before: int
    bytes_after: int
    emptied: bool


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be.

    Attributes:
        kind: ``seal``, ``structure``, ``row``, ``missing file``, ``size``, ``block``, ``orphan``, ``staging``,
            ``lost transactions`` or ``present`` (text that should be absent).
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
        problems: all of them; none means that every byte is what was written.
        files: data files read.
        bytes: read.
        documents: checked.
        sealed: whether a seal covers the catalog's free space too.
        kept: where ``absent`` was asked: stored pieces of that text which other documents still hold.
        rebuilt_tokens: encoded again by the repair.
        same_bits: whether all that was rebuilt has the bits it had; None where nothing was rebuilt.
    """

    problems: list[Problem] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    documents: int = 0
    sealed: bool = False
    kept: int = 0
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
        files: data files; None for one namespace.
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
    files: int | None = None
    dead_tokens: int | None = None
