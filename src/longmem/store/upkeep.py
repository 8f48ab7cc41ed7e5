"""What a keeper of a store does: compact, verify, export and import.

Compact copies what is still used into a new generation of data files, makes them the catalog's in one transaction, and
writes the catalog anew: after it no byte of what was forgotten is left.

An export is a tar file with one safetensors file for every piece, and ``manifest.json`` at its end; see
docs/memory-format.md.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import time as clock
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from longmem.errors import StoreDamaged, StoreError
from longmem.files import to_disk, whole
from longmem.store.adding import Planned, Receipt, commit, known, status_of
from longmem.store.catalog import CATALOG, Catalog, DocumentInfo, Piece, Selection
from longmem.store.disk import (
    REPAIR,
    GenerationGone,
    Layout,
    Progress,
    Report,
    StoredChunks,
    append_chunks,
    failpoint,
    file_errors,
    paths_of,
    until_found,
)
from longmem.store.encode import Encoder, NewDocument, Tokens, composed, joined_tokens


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

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong now."""
        return all(problem.repaired for problem in self.problems)


def compact(catalog: Catalog, progress: Report | None) -> CompactReport:
    """See ``MemoryStore.compact``."""
    with catalog.writing():
        before = sum(catalog.sizes())
        with catalog.write() as db:
            expired = db.execute("DELETE FROM document WHERE expires <= ?", (clock.time(),)).rowcount
        with catalog.read() as db:
            used = {row[0] for row in db.execute("SELECT DISTINCT piece FROM part")}
            used.update(*list(catalog.pinned.values()))
            pieces, generation = catalog.pieces(), catalog.meta("generation")
        living, dead = [each for each in pieces if each.id in used], [each for each in pieces if each.id not in used]
        files = catalog.sizes()[0]
        # what an interrupted add left after the last record goes, too
        if dead or files > sum(each.chunks for each in living) * catalog.layout.chunk_bytes:
            _rewrite(catalog, generation, living, dead, progress)
        catalog.vacuum()
        failpoint("compact.vacuumed")
        emptied = catalog.empty_log()
        return CompactReport(expired, sum(each.tokens for each in dead), before, sum(catalog.sizes()), emptied)


def _rewrite(
    catalog: Catalog, generation: int, living: list[Piece], dead: list[Piece], progress: Report | None
) -> None:
    """Copy the living pieces, one after the other, into the next generation, and make that the catalog's."""
    new, layout = paths_of(catalog.folder, generation + 1), catalog.layout
    for path in new:  # of a compact that failed
        path.unlink(missing_ok=True)
    places = [*accumulate((each.chunks for each in living), initial=0)]

    def copied() -> Iterator[StoredChunks]:
        with catalog.read():
            chunks = catalog.chunks()
        for piece, end in zip(living, places[1:], strict=True):
            run = chunks.run(piece.first, piece.chunks)
            if run.crc() != piece.crc:
                raise StoreDamaged(f"{_place(catalog, piece)}: these bytes are not what was written; {REPAIR}")
            yield run
            if progress is not None:
                size = layout.chunk_bytes
                progress(Progress("rewrite", end * size, places[-1] * size, "bytes", "data files"))

    append_chunks(catalog.folder, layout, generation + 1, 0, copied() if living else ())
    failpoint("compact.copied")
    with catalog.write() as db:
        db.executemany("DELETE FROM piece WHERE id = ?", [(each.id,) for each in dead])
        moved = zip(places, (each.id for each in living), strict=False)
        db.executemany("UPDATE piece SET first = ? WHERE id = ?", moved)
        changed = [(generation + 1, "generation"), (places[-1], "records")]
        db.executemany("UPDATE meta SET value = ? WHERE key = ?", changed)
    failpoint("compact.committed")
    catalog.remove(paths_of(catalog.folder, generation))


def verify(catalog: Catalog, encoder: Encoder, *, repair: bool, progress: Report | None) -> VerifyReport:
    """See ``MemoryStore.verify``."""
    if repair:
        catalog.writing()
    report, bad = until_found(lambda: _check(catalog, progress))
    if not (repair and bad):
        return report
    for piece in bad:
        _repair(catalog, encoder, piece)
    problems = [replace(each, repaired=each.kind in ("piece", "file")) for each in report.problems]
    return replace(report, problems=problems, rebuilt_tokens=sum(piece.tokens for piece in bad))


def _check(catalog: Catalog, progress: Report | None) -> tuple[VerifyReport, list[Piece]]:
    """Read the catalog and every record in use, of one state; also the pieces that have to be encoded again."""
    problems: list[Problem] = []
    bad: list[Piece] = []
    read = documents = 0
    try:
        with catalog.apart() as other, other.read() as db:
            lines = [line for (line,) in db.execute("PRAGMA integrity_check") if line != "ok"]
            problems += [Problem("catalog", CATALOG, f"{line}; restore a backup") for line in lines]
            pieces, chunks, (generation, _) = other.pieces(), None, other.end()
            try:
                chunks = other.chunks()
            except StoreDamaged as error:  # lost or cut, unless ``compact`` has replaced them meanwhile
                if isinstance(error, GenerationGone) and catalog.end()[0] != generation:
                    raise
                problems.append(Problem("file", paths_of(other.folder, generation)[0].name, str(error)))
            total = sum(each.chunks for each in pieces) * other.layout.chunk_bytes
            for piece in pieces:
                if (problem := _of_piece(other, chunks, piece)) is not None:
                    problems.append(problem)
                    bad += [piece] * (problem.kind == "piece")
                read += piece.chunks * other.layout.chunk_bytes
                if progress is not None:
                    progress(Progress("check", read, total, "bytes", "data files"))
            problems += _of_documents(other, {each.id: each.tokens for each in pieces})
            documents = len(other.documents(expired=True))
            read += other.sizes()[1]
    except GenerationGone:
        raise
    except StoreDamaged as error:
        problems.append(Problem("catalog", CATALOG, str(error)))
    return VerifyReport(problems, read, documents), bad


def _of_piece(catalog: Catalog, chunks: StoredChunks | None, piece: Piece) -> Problem | None:
    try:
        kept = catalog.tokens(piece.id).digest() == piece.digest
    except StoreDamaged:
        kept = False
    if not kept:
        what = "its token ids or text are not what was written; restore a backup, or forget its documents"
        return Problem("text", f"{CATALOG}, piece {piece.id}", what)
    end = piece.first + piece.chunks
    if chunks is not None and end <= len(chunks) and chunks.run(piece.first, piece.chunks).crc() == piece.crc:
        return None
    return Problem("piece", _place(catalog, piece), f"these bytes are not what was written; {REPAIR}")


def _of_documents(catalog: Catalog, tokens: dict[int, int]) -> Iterator[Problem]:
    """Every document is the sum of its parts; ``tokens``: of every piece."""
    for document in catalog.documents(expired=True):
        parts = catalog.parts(document.id)
        ends = [*accumulate((part.tokens for part in parts), initial=0)]
        complete = ends == [*(part.first_token for part in parts), document.tokens]
        if not complete or any(part.tokens > tokens.get(part.piece, 0) for part in parts):
            what = "its parts do not make the whole; restore a backup, or forget it"
            yield Problem("document", f"{document.namespace}/{document.name}", what)


def _repair(catalog: Catalog, encoder: Encoder, piece: Piece) -> None:
    """Encode a piece again and write it after the last record."""
    chunks = encoder.encode([catalog.tokens(piece.id).ids])[0]
    with catalog.writing():
        generation, first = catalog.end()
        end = append_chunks(catalog.folder, catalog.layout, generation, first, [chunks])
        with catalog.write() as db:
            db.execute("UPDATE piece SET first = ?, crc = ? WHERE id = ?", (first, chunks.crc(), piece.id))
            db.execute("UPDATE meta SET value = ? WHERE key = 'records'", (end,))


def _place(catalog: Catalog, piece: Piece) -> str:
    kv, keys = paths_of(catalog.folder, catalog.meta("generation"))
    return f"{kv.name} and {keys.name}, chunks {piece.first} to {piece.first + piece.chunks}"


# export and import

FORMATS = {"longmem-export-2": "pieces", "longmem-export-1": "contents"}
"""Formats that are read, and their folder of members; the first one is written."""
MANIFEST = "manifest.json"
_BAD = (tarfile.TarError, SafetensorError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def export(
    catalog: Catalog, namespace: str, path: Path, names: Sequence[str] | None, progress: Report | None
) -> list[DocumentInfo]:
    """See ``MemoryStore.export``."""
    if path.is_dir():
        raise StoreError(f"{path}: a folder; name a file to export to")

    def write() -> list[DocumentInfo]:
        with catalog.apart() as other, file_errors(path, "writing"), whole(path) as part:
            with tarfile.open(part, "w") as tar:
                found = _export(other, namespace, tar, Selection(names), progress)
            to_disk(part)
            failpoint("export.written")
        return found

    found = until_found(write)
    to_disk(path.parent)
    return found


def _export(
    catalog: Catalog, namespace: str, tar: tarfile.TarFile, selection: Selection, progress: Report | None
) -> list[DocumentInfo]:
    documents = catalog.documents(namespace, selection)
    if not documents:
        raise StoreError(
            f"namespace {namespace!r} has no documents to export; `longmem memory list` shows what there is"
        )
    chunks, sums = catalog.chunks(), dict[str, str]()
    parts = {each.id: catalog.parts(each.id) for each in documents}
    needed = {part.piece for each in parts.values() for part in each}
    for number, piece in enumerate((each for each in catalog.pieces() if each.id in needed), 1):
        digest = piece.digest.hex()
        data = _piece_bytes(catalog.tokens(piece.id), chunks.run(piece.first, piece.chunks), catalog.layout)
        sums[digest] = hashlib.sha256(data).hexdigest()
        _add(tar, f"pieces/{digest}.safetensors", data)
        if progress is not None:
            progress(Progress("copy", tar.offset, None, "bytes", f"piece {number}"))
    kept = ("name", "source", "metadata", "added", "expires", "tokens", "revision")
    entries = [
        {
            **{field: getattr(each, field) for field in kept},
            "pieces": [(part.digest.hex(), part.tokens) for part in parts[each.id]],
        }
        for each in documents
    ]
    about = {"format": next(iter(FORMATS)), "namespace": namespace, "layout": asdict(catalog.layout)}
    _add(tar, MANIFEST, json.dumps({**about, "documents": entries, "contents": sums}, indent=1).encode())
    return documents


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _piece_bytes(tokens: Tokens, chunks: StoredChunks, layout: Layout) -> bytes:
    arrays: dict[str, Any] = {
        "kv": chunks.kv,
        "keys": chunks.keys,
        "scales": chunks.scales,
        "token_ids": tokens.ids,
        "text": None if tokens.text is None else np.frombuffer(tokens.text.encode(), np.uint8),
        "starts": tokens.starts,
    }
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items() if array is not None}
    if layout.dtype == "bfloat16":
        tensors["kv"] = tensors["kv"].view(torch.bfloat16)
    return bytes(save(tensors))


class Archive:
    """An export, open to read; its members are read by name and nothing is unpacked.

    Attributes:
        namespace: that was exported.
        layout: of the store that it was exported from.
        plans: its documents, as they come into a catalog.
        sums: SHA-256 of every member, by the digest (hex) of its piece.

    Raises:
        StoreError: it is damaged, or none.
    """

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        self.path = path
        try:
            self._tar = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115
            self._members = {member.name: member for member in self._tar.getmembers() if member.isfile()}
            fields = json.loads(self._read(MANIFEST))
            if fields["format"] not in FORMATS:
                raise ValueError(f"format {fields['format']!r}, this version reads {', '.join(FORMATS)}")
            self._folder = FORMATS[fields["format"]]
            self.namespace = str(fields["namespace"])
            self.layout = Layout.from_fields(fields["layout"])
            self.sums = {bytes.fromhex(digest).hex(): str(each) for digest, each in fields["contents"].items()}
            self.plans = [self._plan(entry) for entry in fields["documents"]]
        except _BAD as error:
            raise StoreError(f"{path}: no whole export of a memory store ({error}); export it again") from error

    def _read(self, name: str) -> bytes:
        stream = self._tar.extractfile(self._members[name])
        assert stream is not None
        return stream.read()

    def piece(self, digest: str) -> tuple[Tokens, StoredChunks]:
        """Tokens and chunks of a piece.

        Raises:
            StoreError: they are not what was exported.
        """
        name = f"{self._folder}/{digest}.safetensors"
        try:
            data = self._read(name)
            if hashlib.sha256(data).hexdigest() != self.sums[digest]:
                raise ValueError("its bytes have changed")
            return _piece(load(data), digest, self.layout)
        except _BAD as error:
            message = f"{self.path}: {name} is damaged ({error}); nothing was imported: export again"
            raise StoreError(message) from error

    def _plan(self, entry: dict[str, Any]) -> Planned:
        pieces = [(bytes.fromhex(digest), int(tokens)) for digest, tokens in entry["pieces"]]
        about = {"source": entry["source"], "metadata": entry["metadata"]}
        new = NewDocument(entry["name"], **about, time=entry["added"], expires=entry["expires"])
        return Planned(self.namespace, new, int(entry["tokens"]), b"", pieces, int(entry["revision"]))


def _piece(tensors: dict[str, torch.Tensor], digest: str, layout: Layout) -> tuple[Tokens, StoredChunks]:
    """The inverse of ``_piece_bytes``; raises ValueError or KeyError where it does not fit digest and layout."""
    text = tensors["text"].numpy().tobytes().decode() if "text" in tensors else None
    tokens = Tokens(tensors["token_ids"].numpy(), text, None if text is None else tensors["starts"].numpy())
    if tokens.digest().hex() != digest:
        raise ValueError("its token ids and text are not those of its digest")
    kv = tensors["kv"].view(torch.int16) if layout.dtype == "bfloat16" else tensors["kv"]
    scales = tensors["scales"].numpy() if layout.dtype == "int8" else None
    return tokens, StoredChunks(kv.numpy(), tensors["keys"].numpy(), scales)


def import_archive(
    catalog: Catalog, encoder: Encoder, path: Path, namespace: str | None, progress: Report | None
) -> list[Receipt]:
    """See ``MemoryStore.import_``."""
    with catalog.writing(), file_errors(path, "reading"), path.open("rb") as stream:
        archive = Archive(stream, path)
        _check_layout(archive, catalog.layout, encoder)
        plans = [replace(plan, namespace=composed(namespace or plan.namespace)) for plan in archive.plans]
        for plan in plans:
            plan.new.check(plan.namespace, past=True)
            if catalog.find(plan.namespace, plan.new.name) is not None:  # is it the same?
                runs = [archive.piece(digest.hex())[0].slice(0, tokens) for digest, tokens in plan.pieces]
                plan.digest = joined_tokens(runs).digest()
                status_of(catalog, plan, "forget it first, or import into another namespace; nothing was imported")
        missing = [digest for digest in archive.sums if known(catalog, bytes.fromhex(digest), set()) is None]

        def pieces() -> Iterator[tuple[Tokens, StoredChunks]]:
            for number, digest in enumerate(missing, 1):
                yield archive.piece(digest)
                if progress is not None:
                    progress(Progress("copy", number, len(missing), "pieces", path.name))

        return commit(catalog, pieces(), plans, set())


def _check_layout(archive: Archive, ours: Layout, encoder: Encoder) -> None:
    """Raises StoreError where tensors of the archive mean nothing in this store."""
    theirs = archive.layout
    fields = ("memory_layers", "heads_kv", "head_dim", "chunk_size", "segment_tokens", "dtype", "fingerprint")
    for name in fields:
        here, there = getattr(ours, name), getattr(theirs, name)
        if here != there and not (name == "fingerprint" and encoder.accepts(there)):
            raise StoreError(
                f"{archive.path}: exported from a store with {name}={there} ({theirs.backbone}), this one has "
                f"{here} ({ours.backbone}); its tensors mean nothing here: add the text itself"
            )
