"""Export and import: a tar file with one safetensors file for every piece, and ``manifest.json`` at its end.

Member ``pieces/<digest>.safetensors``: ``kv``, ``keys`` and, with int8, ``scales`` as in the data files; ``token_ids``
(U32) and, of a text, ``text`` (U8, UTF-8) and ``starts`` (U32, where in the text each token begins). Exports of format
1 have the same arrays in ``contents/``, and name one ``memory_layer``; they are read, too.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sqlite3
import tarfile
import time as clock
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from longmem.errors import StoreError
from longmem.store.adding import COMMIT_BYTES, insert_document, insert_piece, metadata_text
from longmem.store.catalog import Catalog, Part
from longmem.store.disk import Arrays, StoredChunks, append, failpoint, file_errors, sync_folder
from longmem.store.encode import Tokens, accepts, joined_tokens
from longmem.store.records import DTYPES, DocumentInfo, Layout, NewDocument, Progress, Receipt, Report, Status
from longmem.store.room import Room, check_names, composed, until_found
from longmem.store.runs import Selection

FORMATS = {"longmem-export-2": "pieces", "longmem-export-1": "contents"}
"""Formats that are read, and their folder of members; the first one is written."""
MANIFEST = "manifest.json"
_BAD = (tarfile.TarError, SafetensorError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def export(
    room: Room, namespace: str, path: Path, names: Sequence[str] | None, progress: Report | None
) -> list[DocumentInfo]:
    """See ``MemoryStore.export``."""
    with file_errors(path, "looking at"):
        if path.is_dir():
            raise StoreError(f"{path}: a folder; name a file to export to")
        path.parent.mkdir(parents=True, exist_ok=True)

    def write() -> list[DocumentInfo]:
        with room.catalog.apart() as catalog, catalog.read(), _placed(path) as stream:
            return _export(room, catalog, composed(namespace), stream, names, progress)

    found: list[DocumentInfo] = until_found(write)
    return found


def _export(
    room: Room,
    catalog: Catalog,
    namespace: str,
    stream: IO[bytes],
    names: Sequence[str] | None,
    progress: Report | None,
) -> list[DocumentInfo]:
    documents = Selection(documents=names).of(namespace, catalog.documents(namespace))
    if not documents:
        raise StoreError(
            f"namespace {namespace!r} has no documents to export; `longmem memory list` shows what there is"
        )
    arrays = Arrays(room.folder, room.layout, catalog.meta("generation"), catalog.meta("records"))
    parts = {each.id: catalog.parts(each.id) for each in documents}
    digests: dict[int, str] = {}
    sums: dict[str, str] = {}
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number, piece in enumerate(dict.fromkeys(part.piece for each in parts.values() for part in each), 1):
            query = "SELECT digest, first, count FROM piece WHERE id = ?"
            digest, first, count = catalog.row(query, piece)
            digests[piece] = digest.hex()
            data = _piece_bytes(catalog.tokens(piece), arrays.chunks(first, count), room.layout)
            sums[digests[piece]] = _add(tar, f"pieces/{digests[piece]}.safetensors", data)
            if progress is not None:
                progress(Progress("copy", tar.offset, None, "bytes", f"piece {number}"))
        manifest = {
            "format": next(iter(FORMATS)),
            "namespace": namespace,
            "layout": asdict(room.layout),
            "documents": [_entry(each, parts[each.id], digests) for each in documents],
            "contents": sums,
        }
        _add(tar, MANIFEST, json.dumps(manifest, indent=1).encode())
    failpoint("export.written")
    return documents


def _entry(document: DocumentInfo, parts: list[Part], digests: dict[int, str]) -> dict[str, Any]:
    kept = ("name", "source", "metadata", "added", "expires", "tokens", "revision")
    pieces = [(digests[part.piece], part.tokens) for part in parts]
    return {**{name: getattr(document, name) for name in kept}, "pieces": pieces}


def _piece_bytes(tokens: Tokens, chunks: StoredChunks, layout: Layout) -> bytes:
    kv = torch.from_numpy(chunks.kv.copy())
    tensors = {
        "kv": kv.view(torch.bfloat16) if layout.dtype == "bfloat16" else kv,
        "keys": torch.from_numpy(chunks.keys.copy()),
        "token_ids": torch.from_numpy(tokens.ids.copy()),
    }
    if chunks.scales is not None:
        tensors["scales"] = torch.from_numpy(chunks.scales.copy())
    if tokens.text is not None and tokens.starts is not None:
        tensors["text"] = torch.from_numpy(np.frombuffer(tokens.text.encode(), np.uint8).copy())
        tensors["starts"] = torch.from_numpy(tokens.starts.copy())
    data: bytes = save(tensors)
    return data


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> str:
    """Write a member; its SHA-256, hex."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
    return hashlib.sha256(data).hexdigest()


@contextmanager
def _placed(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that is at ``path``, durable, once the block has ended without an exception."""
    unfinished = path.with_name(f".{path.name}.partial")
    with file_errors(path, "writing"):
        try:
            with unfinished.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            unfinished.replace(path)
        except BaseException:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@dataclass(frozen=True)
class _Document:
    """A document of an archive; ``pieces`` are digests (hex), each with how many of its tokens count."""

    name: str
    source: str | None
    metadata: dict[str, Any]
    added: float
    expires: float | None
    tokens: int
    revision: int
    pieces: list[tuple[str, int]]


class Archive:
    """An export, open to read; its members are read by name and nothing is unpacked.

    Raises:
        StoreError: it is damaged, or none.
    """

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        self._path = path
        try:
            self._tar = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115
            self._members = {member.name: member for member in self._tar.getmembers() if member.isfile()}
            fields = json.loads(self._read(MANIFEST))
            if fields["format"] not in FORMATS:
                raise ValueError(f"format {fields['format']!r}, this version reads {', '.join(FORMATS)}")
            self._folder = FORMATS[fields["format"]]
            self.namespace = str(fields["namespace"])
            self.layout = Layout.from_fields(fields["layout"])
            self.sums: dict[str, str] = dict(fields["contents"])
            self.documents = [
                _Document(
                    **{**each, "name": composed(each["name"]), "pieces": [(str(d), int(t)) for d, t in each["pieces"]]}
                )
                for each in fields["documents"]
            ]
        except _BAD as error:
            raise StoreError(f"{path}: no whole export of a memory store ({error}); export it again") from error

    def piece(self, digest: str, layout: Layout) -> tuple[Tokens, StoredChunks]:
        """Tokens and chunks of a piece.

        Raises:
            StoreError: they are not what was exported.
        """
        name = f"{self._folder}/{digest}.safetensors"
        try:
            data = self._read(name)
            if hashlib.sha256(data).hexdigest() != self.sums[digest]:
                raise ValueError("its bytes have changed")
            return _piece(load(data), digest, layout)
        except _BAD as error:
            message = f"{self._path}: {name} is damaged ({error}); nothing was imported: export again"
            raise StoreError(message) from error

    def _read(self, name: str) -> bytes:
        stream = self._tar.extractfile(self._members[name])
        assert stream is not None
        return stream.read()


def _piece(tensors: dict[str, torch.Tensor], digest: str, layout: Layout) -> tuple[Tokens, StoredChunks]:
    """The inverse of ``_piece_bytes``; raises ValueError or KeyError where it does not fit digest and layout."""
    text = tensors["text"].numpy().tobytes().decode() if "text" in tensors else None
    tokens = Tokens(tensors["token_ids"].numpy(), text, None if text is None else tensors["starts"].numpy())
    count = layout.chunks(len(tokens))
    if tokens.digest().hex() != digest or not 0 < len(tokens) <= layout.piece_tokens:
        raise ValueError("its token ids and text are not those of its digest")
    wanted = {
        "kv": (DTYPES[layout.dtype], (count, layout.heads, 2, layout.chunk_size, layout.head_dim)),
        "keys": (torch.float32, (count, layout.heads, layout.head_dim)),
    }
    if layout.dtype == "int8":
        wanted["scales"] = (torch.float32, (count, layout.heads, 2))
    for name, (dtype, shape) in wanted.items():
        if tensors[name].dtype != dtype or tuple(tensors[name].shape) != shape:
            raise ValueError(f"array {name} is not {dtype} {shape}")
        if dtype.is_floating_point and not bool(tensors[name].isfinite().all()):
            raise ValueError(f"array {name} holds numbers that are not finite")
    kv = tensors["kv"].view(torch.int16) if layout.dtype == "bfloat16" else tensors["kv"]
    scales = tensors["scales"].numpy() if layout.dtype == "int8" else None
    return tokens, StoredChunks(kv.numpy(), tensors["keys"].numpy(), scales)


def import_archive(room: Room, path: Path, namespace: str | None, progress: Report | None) -> list[Receipt]:
    """See ``MemoryStore.import_``."""
    room.writing()
    with room.guard, file_errors(path, "reading"), path.open("rb") as stream:
        archive = Archive(stream, path)
        target = composed(namespace or archive.namespace)
        _check_layout(room, archive, path)
        for document in archive.documents:
            check_names(target, NewDocument(document.name, time=document.added, expires=document.expires))
            if not document.pieces or sum(tokens for _, tokens in document.pieces) != document.tokens:
                raise StoreError(f"{path}: document {document.name!r} is incomplete; export again")
        with room.catalog.read():
            for document in archive.documents:
                _status(room, archive, target, document)
            generation, first = room.catalog.meta("generation"), room.catalog.meta("records")
            missing = [digest for digest in archive.sums if room.catalog.piece_of(bytes.fromhex(digest)) is None]
        # the chunks go after the last record as they come, the transaction that counts them comes last
        fresh: list[tuple[bytes, Tokens, int, int, int]] = []
        held: list[StoredChunks] = []
        for number, digest in enumerate(missing, 1):
            tokens, chunks = archive.piece(digest, room.layout)
            fresh.append((bytes.fromhex(digest), tokens, first + sum(map(len, held)), len(chunks), chunks.crc()))
            held.append(chunks)
            if number == len(missing) or sum(run.nbytes for run in held) >= COMMIT_BYTES:
                append(room.folder, room.layout, generation, first, held)
                first, held = first + sum(map(len, held)), []
            if progress is not None:
                progress(Progress("copy", number, len(missing), "pieces", path.name))
        with room.catalog.write() as db:
            for row in fresh:
                insert_piece(db, *row)
            db.execute("UPDATE meta SET value = ? WHERE key = 'records'", (first,))
            return [_insert(db, room, archive, target, document) for document in archive.documents]


def _check_layout(room: Room, archive: Archive, path: Path) -> None:
    """Raises StoreError where tensors of the archive mean nothing in this store."""
    theirs, ours = archive.layout, room.layout
    model = None if room.encoder is None else room.encoder.model
    name = theirs.difference(ours)
    # a model may know several fingerprints of the same weights
    if name is None and theirs.fingerprint != ours.fingerprint and not (model and accepts(model, theirs.fingerprint)):
        name = "fingerprint"
    if name is not None:
        raise StoreError(
            f"{path}: exported from a store with {name}={getattr(theirs, name)} ({theirs.backbone}), this one has "
            f"{getattr(ours, name)} ({ours.backbone}); its tensors mean nothing here: add the text itself"
        )


def _status(room: Room, archive: Archive, namespace: str, document: _Document) -> Status:
    """Whether a document is new or the same.

    Raises:
        StoreError: another document has its name.
    """
    have = room.catalog.find(namespace, document.name)
    if have is None or have.expired(clock.time()):
        return "added"
    theirs = (document.source, document.metadata, document.added, document.expires, document.tokens)
    if (have.source, have.metadata, have.added, have.expires, have.tokens) == theirs:
        runs = [archive.piece(digest, archive.layout)[0].slice(0, tokens) for digest, tokens in document.pieces]
        if joined_tokens(runs).digest() == room.catalog.whole(have).digest():
            return "unchanged"
    raise StoreError(
        f"namespace {namespace!r} has another document {document.name!r}; forget it first, or import into another "
        "namespace; nothing was imported"
    )


def _insert(db: sqlite3.Connection, room: Room, archive: Archive, namespace: str, document: _Document) -> Receipt:
    status, layout = _status(room, archive, namespace, document), room.layout
    chunks, reused = layout.chunks(document.tokens), document.tokens
    if status == "added":
        pieces = []
        for place, (digest, tokens) in enumerate(document.pieces, 1):
            row = db.execute("SELECT id, tokens FROM piece WHERE digest = ?", (bytes.fromhex(digest),)).fetchone()
            if row is None or not 0 < tokens <= row[1]:
                raise StoreError(f"document {document.name!r} of the archive is incomplete; nothing was imported")
            if tokens % layout.segment_tokens and not (tokens == row[1] and place == len(document.pieces)):
                raise StoreError(f"document {document.name!r} of the archive is cut in a segment; nothing was imported")
            pieces.append((row[0], tokens))
        new = NewDocument(document.name, source=document.source, time=document.added, expires=document.expires)
        metadata = metadata_text(document.metadata, document.name)
        reused = insert_document(db, namespace, new, metadata, document.tokens, document.revision, pieces)
    return Receipt(namespace, document.name, status, document.tokens, chunks, reused, document.revision)
