"""The bytes of an export: a tar file with one safetensors file for every content, and ``manifest.json`` at its end.

Member ``contents/<digest>.safetensors``: ``kv``, ``keys``, ``lengths`` and, with int8, ``scales`` as in a data file;
``token_ids`` (U32) and, of a text, ``text`` (U8, UTF-8) and ``starts`` (U32, where in the text each token begins).
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from longmem.errors import StoreError
from longmem.store.pieces import Tokens
from longmem.store.precision import StoredChunks
from longmem.store.records import DTYPES, Layout

FORMAT = "longmem-export-1"
MANIFEST = "manifest.json"
_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<i2", "I8": "<i1", "I32": "<i4", "U32": "<u4", "U8": "<u1"}


@dataclass(frozen=True)
class ArchivedDocument:
    """A document in an archive; ``pieces`` are digests (hex) of contents, each with how many of its tokens count."""

    name: str
    source: str | None
    metadata: dict[str, Any]
    added: float
    expires: float | None
    tokens: int
    revision: int
    pieces: list[tuple[str, int]]


@dataclass(frozen=True)
class Manifest:
    """What an archive holds; ``contents`` maps digests (hex) to the SHA-256 (hex) of their members."""

    namespace: str
    layout: Layout
    documents: list[ArchivedDocument]
    contents: dict[str, str]

    def to_json(self) -> bytes:
        """One JSON object."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """The inverse of ``to_json``; raises what such code raises where it is none."""
        fields = json.loads(data)
        if fields["format"] != FORMAT:
            raise ValueError(f"format {fields['format']!r}, this version reads {FORMAT!r}")
        documents = [
            ArchivedDocument(**{**each, "pieces": [(str(digest), int(tokens)) for digest, tokens in each["pieces"]]})
            for each in fields["documents"]
        ]
        return cls(str(fields["namespace"]), Layout(**fields["layout"]), documents, dict(fields["contents"]))


def member_name(digest: str) -> str:
    """Of a content in the archive."""
    return f"contents/{digest}.safetensors"


def content_bytes(tokens: Tokens, chunks: StoredChunks, layout: Layout) -> bytes:
    """A content as a safetensors file."""
    arrays: dict[str, tuple[str, NDArray[Any]]] = {
        "keys": ("F32", chunks.keys),
        "lengths": ("I32", chunks.lengths),
        "token_ids": ("U32", tokens.ids),
    }
    if chunks.scales is not None:
        arrays["scales"] = ("F32", chunks.scales)
    if tokens.text is not None and tokens.starts is not None:
        arrays["starts"] = ("U32", tokens.starts)
    arrays["kv"] = (DTYPES[layout.dtype][2], chunks.kv)
    if tokens.text is not None:
        arrays["text"] = ("U8", np.frombuffer(tokens.text.encode(), dtype=np.uint8))
    fields: dict[str, Any] = {"__metadata__": {"format": FORMAT}}
    parts, offset = [], 0
    for name, (kind, values) in arrays.items():
        parts.append(np.ascontiguousarray(values).astype(_NUMPY[kind], copy=False).tobytes())
        end = offset + len(parts[-1])
        fields[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(fields).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return b"".join([struct.pack("<Q", len(text)), text, *parts])


def read_content(data: bytes, digest: str, layout: Layout) -> tuple[Tokens, StoredChunks]:
    """The inverse of ``content_bytes``; raises ValueError or KeyError where it does not fit digest and layout."""
    (length,) = struct.unpack_from("<Q", data)
    fields = json.loads(data[8 : 8 + length])
    fields.pop("__metadata__", None)

    def array(name: str, kind: str, shape: tuple[int, ...]) -> NDArray[Any]:
        begin, end = fields[name]["data_offsets"]
        raw = data[8 + length + begin : 8 + length + end]
        if fields[name]["dtype"] != kind or len(raw) != math.prod(shape) * np.dtype(_NUMPY[kind]).itemsize:
            raise ValueError(f"array {name} is not {kind} {shape}")
        return np.frombuffer(raw, dtype=_NUMPY[kind]).reshape(shape)

    count = fields["token_ids"]["shape"][0]
    chunks, heads, dim, size = layout.chunks(count), layout.heads_kv, layout.head_dim, layout.chunk_size
    text = starts = None
    if "text" in fields:
        text = array("text", "U8", (fields["text"]["shape"][0],)).tobytes().decode()
        starts = array("starts", "U32", (count,))
    tokens = Tokens(array("token_ids", "U32", (count,)), text, starts)
    if tokens.digest().hex() != digest or not 0 < count <= layout.piece_tokens:
        raise ValueError("its token ids and text are not those of its digest")
    stored = StoredChunks(
        kv=array("kv", DTYPES[layout.dtype][2], (chunks, heads, 2, size, dim)),
        keys=array("keys", "F32", (chunks, heads, dim)),
        lengths=array("lengths", "I32", (chunks,)),
        scales=array("scales", "F32", (chunks, heads, 2)) if layout.dtype == "int8" else None,
    )
    if stored.lengths.tolist() != [size] * (chunks - 1) + [count - (chunks - 1) * size]:
        raise ValueError("its chunks have not the lengths that its tokens give")
    return tokens, stored


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> str:
    """Write a member; its SHA-256, hex."""
    import io

    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
    return hashlib.sha256(data).hexdigest()


class Archive:
    """An archive, open to read; its members are read by name and nothing is unpacked.

    Raises:
        StoreError: it is damaged, or none.
    """

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        self._path = path
        try:
            self._tar = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115
            self._members = {member.name: member for member in self._tar.getmembers() if member.isfile()}
            self.manifest = Manifest.from_json(self._read(MANIFEST))
        except (tarfile.TarError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StoreError(f"{path}: no whole export of a memory store ({error}); export it again") from error

    def content(self, digest: str, layout: Layout) -> tuple[Tokens, StoredChunks]:
        """Tokens and chunks of a content.

        Raises:
            StoreError: they are not what was exported.
        """
        name = member_name(digest)
        try:
            data = self._read(name)
            if hashlib.sha256(data).hexdigest() != self.manifest.contents[digest]:
                raise ValueError("its bytes have changed")
            return read_content(data, digest, layout)
        except (tarfile.TarError, EOFError, ValueError, KeyError, TypeError, struct.error) as error:
            raise StoreError(
                f"{self._path}: {name} is damaged ({error}); nothing was imported: export again"
            ) from error

    def _read(self, name: str) -> bytes:
        stream = self._tar.extractfile(self._members[name])
        assert stream is not None
        return stream.read()
