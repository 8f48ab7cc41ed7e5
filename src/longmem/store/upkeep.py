"""Forgetting, compacting and verifying.

Forget deletes rows: no search finds the documents any more. Compact copies what is still used into a new generation of
data files, makes them the catalog's in one transaction, and writes the catalog anew: after it no byte is left.
"""

from __future__ import annotations

import time as clock
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate

from longmem.errors import StoreDamaged
from longmem.store.catalog import CATALOG, Catalog, Piece, until_found
from longmem.store.disk import REPAIR, GenerationGone, StoredChunks, append, failpoint, paths_of
from longmem.store.encode import Encoder
from longmem.store.records import (
    CompactReport,
    ForgetReport,
    Problem,
    Progress,
    Report,
    Selection,
    VerifyReport,
    composed,
)

COPY_BYTES = 64 << 20
"""What compacting holds at a time."""


def forget(catalog: Catalog, namespace: str, selection: Selection) -> ForgetReport:
    """Delete documents, expired ones too. See ``MemoryStore.forget``."""
    namespace = composed(namespace)
    with catalog.writing(), catalog.write() as db:
        found = catalog.documents(namespace, selection, expired=True)
        db.executemany("DELETE FROM document WHERE id = ?", [(each.id,) for each in found])
    return ForgetReport(namespace, clock.time(), [(each.name, each.tokens) for each in found])


def compact(catalog: Catalog, progress: Report | None) -> CompactReport:
    """See ``MemoryStore.compact``."""
    with catalog.writing():
        before = sum(catalog.sizes())
        with catalog.write() as db:
            expired = db.execute("DELETE FROM document WHERE expires <= ?", (clock.time(),)).rowcount
        with catalog.read() as db:
            used = {row[0] for row in db.execute("SELECT DISTINCT piece FROM part")}.union(*catalog.pinned)
            pieces, generation = catalog.pieces(), catalog.meta("generation")
        living, dead = [each for each in pieces if each.id in used], [each for each in pieces if each.id not in used]
        files = catalog.sizes()[0]
        # what an interrupted add left after the last record goes, too
        if dead or files > sum(each.chunks for each in living) * catalog.layout.chunk_bytes:
            places = _copy(catalog, generation + 1, living, progress)
            failpoint("compact.copied")
            with catalog.write() as db:
                db.executemany("DELETE FROM piece WHERE id = ?", [(each.id,) for each in dead])
                moved = zip(places, (each.id for each in living), strict=False)
                db.executemany("UPDATE piece SET first = ? WHERE id = ?", moved)
                changed = [(generation + 1, "generation"), (places[-1], "records")]
                db.executemany("UPDATE meta SET value = ? WHERE key = ?", changed)
            failpoint("compact.committed")
            catalog.remove(paths_of(catalog.folder, generation))
        catalog.vacuum()
        failpoint("compact.vacuumed")
        emptied = catalog.empty_log()
        return CompactReport(expired, sum(each.tokens for each in dead), before, sum(catalog.sizes()), emptied)


def _copy(catalog: Catalog, generation: int, living: list[Piece], progress: Report | None) -> list[int]:
    """Write the living pieces, one after the other, as the next generation; where each is then, and where they end."""
    for path in paths_of(catalog.folder, generation):  # of a compact that failed
        path.unlink(missing_ok=True)
    places = [*accumulate((each.chunks for each in living), initial=0)]
    if not living:
        return places
    with catalog.read():
        chunks = catalog.chunks()
    held: list[StoredChunks] = []
    done, size = 0, catalog.layout.chunk_bytes
    for piece, end in zip(living, places[1:], strict=True):
        held.append(chunks.run(piece.first, piece.chunks))
        if held[-1].crc() != piece.crc:
            raise StoreDamaged(f"{_place(catalog, piece)}: these bytes are not what was written; {REPAIR}")
        if end == places[-1] or (end - done) * size >= COPY_BYTES:
            append(catalog.folder, catalog.layout, generation, done, held)
            done, held = end, []
            if progress is not None:
                name = paths_of(catalog.folder, generation)[0].name
                progress(Progress("rewrite", done * size, places[-1] * size, "bytes", name))
    return places


def verify(catalog: Catalog, encoder: Encoder, *, repair: bool, progress: Report | None) -> VerifyReport:
    """See ``MemoryStore.verify``."""
    if repair:
        catalog.writing()
    report, bad = until_found(lambda: _check(catalog, progress))
    if not (repair and bad):
        return report
    same = [_repair(catalog, encoder, piece) for piece in bad]
    problems = [replace(each, repaired=each.kind in ("piece", "file")) for each in report.problems]
    rebuilt = sum(piece.tokens for piece in bad)
    return replace(report, problems=problems, rebuilt_tokens=rebuilt, same_bits=all(same))


def _check(catalog: Catalog, progress: Report | None) -> tuple[VerifyReport, list[Piece]]:
    """Read the catalog and every record in use, of one state; also the pieces that have to be encoded again."""
    problems: list[Problem] = []
    bad: list[Piece] = []
    read = documents = 0
    try:
        with catalog.apart() as other, other.read() as db:
            lines = [line for (line,) in db.execute("PRAGMA integrity_check") if line != "ok"]
            problems += [Problem("catalog", CATALOG, f"{line}; restore a backup") for line in lines]
            pieces, chunks = other.pieces(), _chunks(catalog, other, problems)
            total = sum(each.chunks for each in pieces) * other.layout.chunk_bytes
            for piece in pieces:
                if (problem := _of_piece(other, chunks, piece)) is not None:
                    problems.append(problem)
                    bad += [piece] * (problem.kind == "piece")
                read += piece.chunks * other.layout.chunk_bytes
                if progress is not None:
                    progress(Progress("check", read, total, "bytes", CATALOG))
            problems += _of_documents(other, {each.id: each.tokens for each in pieces})
            documents = len(other.documents(expired=True))
            read += other.sizes()[1]
    except GenerationGone:
        raise
    except StoreDamaged as error:
        problems.append(Problem("catalog", CATALOG, str(error)))
    return VerifyReport(problems, read, documents), bad


def _chunks(catalog: Catalog, other: Catalog, problems: list[Problem]) -> StoredChunks | None:
    """The data files; None where they are lost or cut."""
    try:
        return other.chunks()
    except StoreDamaged as error:
        generation = other.meta("generation")
        if isinstance(error, GenerationGone) and catalog.meta("generation") != generation:
            raise  # replaced meanwhile
        problems.append(Problem("file", paths_of(other.folder, generation)[0].name, str(error)))
        return None


def _of_piece(catalog: Catalog, chunks: StoredChunks | None, piece: Piece) -> Problem | None:
    if catalog.tokens(piece.id).digest() != piece.digest:
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
        whole = ends == [*(part.first_token for part in parts), document.tokens]
        if not whole or any(part.tokens > tokens.get(part.piece, 0) for part in parts):
            what = "its parts do not make the whole; restore a backup, or forget it"
            yield Problem("document", f"{document.namespace}/{document.name}", what)


def _repair(catalog: Catalog, encoder: Encoder, piece: Piece) -> bool:
    """Encode a piece again and write it after the last record; whether it has the bits it had."""
    chunks = encoder.encode([catalog.tokens(piece.id).ids])[0]
    with catalog.writing():
        with catalog.read():
            generation, first = catalog.meta("generation"), catalog.meta("records")
        append(catalog.folder, catalog.layout, generation, first, [chunks])
        with catalog.write() as db:
            db.execute("UPDATE piece SET first = ?, crc = ? WHERE id = ?", (first, chunks.crc(), piece.id))
            db.execute("UPDATE meta SET value = ? WHERE key = 'records'", (first + len(chunks),))
    return chunks.crc() == piece.crc


def _place(catalog: Catalog, piece: Piece) -> str:
    kv, keys = paths_of(catalog.folder, catalog.meta("generation"))
    return f"{kv.name} and {keys.name}, chunks {piece.first} to {piece.first + piece.chunks}"
