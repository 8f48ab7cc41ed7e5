"""What goes into a memory store and what it answers: plain records, and the rules that they keep.

S tokens per chunk · Hkv key/value heads of one layer · D head_dim · n remembered layers
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from numpy.typing import NDArray

from longmem.errors import StoreError

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
    def heads(self) -> int:
        """n * Hkv: the heads of a stored chunk, those of the first layer first."""
        return len(self.memory_layers) * self.heads_kv

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

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Layout:
        """The inverse of ``asdict``, also of a layout of format 1, which names one ``memory_layer``."""
        known = {**fields}
        if "memory_layer" in known:
            known["memory_layers"] = (known.pop("memory_layer"),)
        return cls(**{**known, "memory_layers": tuple(known["memory_layers"]), "format": FORMAT})


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

    def check(self, namespace: str) -> None:
        """Refuse what cannot be a namespace, a name, a source or a moment.

        Raises:
            StoreError: lists all that is wrong.
        """
        wrong = []
        for what, value in (("namespace", namespace), ("name", self.name)):
            # control characters would break lines and terminals; a surrogate is no Unicode
            if not isinstance(value, str) or not 0 < len(value) <= 1000 or _holds(value, "Cc", "Cs", "Zl", "Zp"):
                wrong.append(f"{what} ({value!r:.60}) must be 1 to 1000 characters, none of them for control")
        if self.source is not None and (not isinstance(self.source, str) or _holds(self.source, "Cs")):
            wrong.append(f"source ({self.source!r:.60}) must be a text")
        for what, moment in (("time", self.time), ("expires", self.expires)):
            if moment is not None and not (isinstance(moment, int | float) and math.isfinite(moment)):
                wrong.append(f"{what} ({moment!r}) must be seconds since the epoch")
        if wrong:
            raise StoreError("; ".join(wrong))


def composed(name: str) -> str:
    """A name in composed form (Unicode NFC), as all names are kept: what looks the same is the same."""
    return unicodedata.normalize("NFC", name) if isinstance(name, str) else name


def _holds(value: str, *kinds: str) -> bool:
    """Whether a character is of one of these categories of Unicode."""
    return any(unicodedata.category(character) in kinds for character in value)


def metadata_text(metadata: Mapping[str, Any] | None, name: str) -> str:
    """Metadata as the catalog keeps it.

    Raises:
        StoreError: it is no JSON object.
    """
    try:
        text = json.dumps(dict(metadata or {}), sort_keys=True, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        message = f"metadata of {name!r} must be a JSON object ({error}); use strings, numbers, lists"
        raise StoreError(message) from error
    return text


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
class Selection:
    """Which documents of a namespace; all conditions hold together."""

    documents: Sequence[str] | None = None  # their names; None is all
    where: Mapping[str, Any] | None = None  # metadata that they have: every key with an equal value
    after: float | None = None  # added at this time (seconds since the epoch) or later
    before: float | None = None  # added before this time
    max_tokens: int | None = None  # only the newest so many tokens, in whole chunks; ``of`` does not look at it

    def of(self, namespace: str, found: list[DocumentInfo]) -> list[DocumentInfo]:
        """Those of the namespace's documents that are meant.

        Raises:
            StoreError: a document that was named is not there.
        """
        if self.documents is not None:
            names = {composed(name) for name in self.documents}
            if missing := sorted(names - {each.name for each in found}):
                raise no_document(namespace, missing[0])
            found = [each for each in found if each.name in names]
        wanted, nothing = dict(self.where or {}), object()
        after = -math.inf if self.after is None else self.after
        before = math.inf if self.before is None else self.before
        return [
            each
            for each in found
            if after <= each.added < before
            and all(each.metadata.get(key, nothing) == value for key, value in wanted.items())
        ]


def no_document(namespace: str, name: str) -> StoreError:
    """The error of a name that is not there."""
    return StoreError(f"namespace {namespace!r} has no document {name!r}; `longmem memory list` shows its names")


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


Report = Callable[[Progress], object]
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


# how large a memory becomes

TOKENS = (65_536, 1_000_000, 10_000_000)  # the paper's memory, a shelf of books, a library
CHARACTERS_PER_TOKEN = 4.0  # of English prose, with the vocabularies of today's models


@dataclass(frozen=True)
class BackboneShape:
    """What of a backbone decides the size of its memory."""

    name: str
    layers: int  # of its decoder; memory keeps one of them
    heads_kv: int  # key/value heads of the layer that is kept
    head_dim: int


BACKBONES = [
    BackboneShape("GPT-2 (124M)", 12, 12, 64),
    BackboneShape("GPT-2 XL (1.5B)", 48, 25, 64),
    BackboneShape("GPT-2* of the paper (407M)", 24, 16, 64),
    BackboneShape("Pythia-410M", 24, 16, 64),
    BackboneShape("Pythia-6.9B", 32, 32, 128),
    BackboneShape("SmolLM2-135M", 30, 3, 64),
    BackboneShape("Qwen2.5-0.5B", 24, 2, 64),
    BackboneShape("Qwen2.5-7B", 28, 4, 128),
    BackboneShape("Qwen3-0.6B", 28, 8, 128),
    BackboneShape("Qwen3-8B", 36, 8, 128),
    BackboneShape("Llama-2-7B", 32, 32, 128),
    BackboneShape("Llama-3.2-1B", 16, 8, 64),
    BackboneShape("Llama-3-8B", 32, 8, 128),
    BackboneShape("Llama-3-70B", 80, 8, 128),
    BackboneShape("Mistral-7B", 32, 8, 128),
    BackboneShape("Gemma-2-2B", 26, 4, 256),
    BackboneShape("Gemma-2-9B", 42, 8, 256),
    BackboneShape("Phi-3-mini (3.8B)", 32, 32, 96),
]  # as their published configurations have it


def memory_size(backbone: BackboneShape, *, dtype: Dtype = "float16", chunk_size: int = 4) -> dict[str, float]:
    """Bytes that a token of this backbone takes; the short chunk at the end of a document takes those of a whole one.

    Returns:
        ``keys_values`` in the data files, ``chunk_keys`` (float32: what a search reads, and what an open bank holds),
        ``small`` (scales of int8), ``catalog`` (an estimate: token ids, where each begins, and text), ``disk`` (all of
        these), and for comparison ``cache``, the backbone's ordinary cache of all layers in 16 bits.

    Raises:
        StoreError: a number that is not at least 1.
    """
    heads, dim = backbone.heads_kv, backbone.head_dim
    numbers = {"heads_kv": heads, "head_dim": dim, "layers": backbone.layers, "chunk_size": chunk_size}
    for name, number in numbers.items():
        if number < 1:
            raise StoreError(f"{name} ({number}) must be at least 1")
    layout = Layout("", "", backbone.name, (0,), heads, dim, chunk_size, chunk_size, dtype, created=0.0)
    keys = 4 * heads * dim
    parts = {
        "keys_values": layout.record_bytes / chunk_size,
        "chunk_keys": keys / chunk_size,
        "small": (layout.key_bytes - keys) / chunk_size,
        "catalog": 4 + 4 + CHARACTERS_PER_TOKEN,
    }
    return {**parts, "disk": sum(parts.values()), "cache": backbone.layers * 2 * 2.0 * heads * dim}


def size_table(
    backbones: Sequence[BackboneShape] = BACKBONES, *, chunk_size: int = 4, tokens: Sequence[int] = TOKENS
) -> tuple[list[str], list[list[str]]]:
    """The sizes in words: column heads, and a row for every backbone; on disk in fp16 and in int8."""
    heads = ["backbone", "KV heads", "fp16/token", "int8/token", "chunk keys/token", "full cache/token"]
    heads += [f"{_short(count)} tokens" for count in tokens]
    rows = []
    for backbone in backbones:
        half, small = (memory_size(backbone, chunk_size=chunk_size, dtype=dtype) for dtype in ("float16", "int8"))
        row = [backbone.name, f"{backbone.heads_kv} x {backbone.head_dim}"]
        row += map(_in_bytes, (half["keys_values"], small["keys_values"], half["chunk_keys"], half["cache"]))
        row += [f"{_in_bytes(half['disk'] * count)} / {_in_bytes(small['disk'] * count)}" for count in tokens]
        rows.append(row)
    return heads, rows


def _in_bytes(number: float) -> str:
    """``4.0 KiB``, ``3.8 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.{0 if unit == 'B' else 1}f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def _short(count: int) -> str:
    """``10M``, ``65,536``."""
    for size, letter in ((1_000_000, "M"), (1000, "k")):
        if count >= size and count % size == 0:
            return f"{count // size:,}{letter}"
    return f"{count:,}"
