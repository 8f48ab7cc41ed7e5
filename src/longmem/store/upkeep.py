"""Forgetting, compacting and verifying.

Forget deletes rows: no search finds the documents any more. Compact copies what is still used into a new generation of
data files, makes them the catalog's in one transaction, and writes the catalog anew: after it no byte is left.
"""

from __future__ import annotations

import time as clock
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from longmem.errors import StoreDamaged, StoreError
from longmem.store.catalog import CATALOG, Catalog, matches
from longmem.store.disk import REPAIR, Arrays, GenerationGone, StoredChunks, append, failpoint, paths_of
from longmem.store.records import CompactReport, ForgetReport, Problem, Progress, Report, VerifyReport
from longmem.store.room import Room, composed, until_found

COPY_BYTES = 64 << 20
"""What compacting holds at a time."""


def forget(
    room: Room, namespace: str, name: str | None, where: Mapping[str, Any] | None, before: float | None
) -> ForgetReport:
    """See ``MemoryStore.forget``."""
    room.writing()
    namespace, name = composed(namespace), None if name is None else composed(name)
    with room.guard, room.catalog.write() as db:
        found = [
            each
            for each in room.catalog.documents(namespace, expired=True)
            if (name is None or each.name == name) and (before is None or each.added < before) and matches(each, where)
        ]
        if name is not None and not found:
            raise StoreError(
                f"namespace {namespace!r} has no document {name!r} to forget (with the other conditions given); "
                "`longmem memory list` shows its names"
            )
        db.executemany("DELETE FROM document WHERE id = ?", [(each.id,) for each in found])
    return ForgetReport(namespace, clock.time(), [(each.name, each.tokens) for each in found])


def compact(room: Room, progress: Report | None) -> CompactReport:
    """See ``MemoryStore.compact``."""
    room.writing()
    catalog, layout = room.catalog, room.layout
    with room.guard:
        before = disk_bytes(room)
        with catalog.write() as db:
            expired = db.execute("DELETE FROM document WHERE expires <= ?", (clock.time(),)).rowcount
        pinned = {piece for each in room.pinned for piece in each}
        with catalog.read() as db:
            used = {row[0] for row in db.execute("SELECT DISTINCT piece FROM part")} | pinned
            rows = [_Row(*row) for row in db.execute(f"SELECT {_COLUMNS} FROM piece ORDER BY first")]
            generation = catalog.meta("generation")
        living, dead = [row for row in rows if row.id in used], [row for row in rows if row.id not in used]
        # what an interrupted add left after the last record goes, too
        if dead or before > sum(row.chunks for row in living) * layout.chunk_bytes + catalog.disk_bytes:
            total = _copy(room, generation, living, progress)
            failpoint("compact.copied")
            places = zip(np.cumsum([0, *(row.chunks for row in living)]).tolist(), living, strict=False)
            with catalog.write() as db:
                db.executemany("DELETE FROM piece WHERE id = ?", [(row.id,) for row in dead])
                db.executemany("UPDATE piece SET first = ? WHERE id = ?", [(first, row.id) for first, row in places])
                changed = [(generation + 1, "generation"), (total, "records")]
                db.executemany("UPDATE meta SET value = ? WHERE key = ?", changed)
            failpoint("compact.committed")
            room.remove(paths_of(room.folder, generation))
            room.mapped = None  # a map would keep the bytes of the old files on the disk
        catalog.vacuum()
        failpoint("compact.vacuumed")
        emptied = catalog.empty_log()
        return CompactReport(expired, sum(row.tokens for row in dead), before, disk_bytes(room), emptied)


class _Row(NamedTuple):
    """A piece without its text."""

    id: int
    digest: bytes
    tokens: int
    first: int
    chunks: int
    crc: int


_COLUMNS = "id, digest, tokens, first, count, crc"


def _copy(room: Room, generation: int, living: list[_Row], progress: Report | None) -> int:
    """Write the living pieces, one after the other, as the next generation; how many chunks it has."""
    for path in paths_of(room.folder, generation + 1):  # of a compact that failed
        path.unlink(missing_ok=True)
    if not living:
        return 0
    with room.catalog.read():
        arrays = room.arrays()
    held: list[StoredChunks] = []
    done, total, size = 0, sum(row.chunks for row in living), room.layout.chunk_bytes
    for number, row in enumerate(living, 1):
        held.append(_run(arrays, row))
        if held[-1].crc() != row.crc:
            raise StoreDamaged(f"{_place(room, row)}: these bytes are not what was written; {REPAIR}")
        if number == len(living) or sum(map(len, held)) * size >= COPY_BYTES:
            append(room.folder, room.layout, generation + 1, done, held)
            done, held = done + sum(map(len, held)), []
            if progress is not None:
                name = paths_of(room.folder, generation)[0].name
                progress(Progress("rewrite", done * size, total * size, "bytes", name))
    return done


def verify(room: Room, *, repair: bool, progress: Report | None) -> VerifyReport:
    """See ``MemoryStore.verify``."""
    if repair:
        room.writing()
    found: _Found = until_found(lambda: _check(room, progress))
    problems, tokens, same = found.problems, 0, None
    if repair and found.bad:
        same = False not in [_repair(room, row) for row in found.bad]
        tokens = sum(row.tokens for row in found.bad)
        problems = [replace(each, repaired=each.kind in ("piece", "file")) for each in problems]
    return VerifyReport(problems, found.bytes, found.documents, tokens, same)


@dataclass
class _Found:
    """What a check found; ``bad``: pieces to be encoded again."""

    problems: list[Problem] = field(default_factory=list)
    bad: list[_Row] = field(default_factory=list)
    bytes: int = 0
    documents: int = 0


def _check(room: Room, progress: Report | None) -> _Found:
    """Read the catalog and every record in use, of one state."""
    found = _Found()
    try:
        with room.catalog.apart() as catalog, catalog.read() as db:
            for (line,) in db.execute("PRAGMA integrity_check").fetchall():
                if line != "ok":
                    found.problems.append(Problem("catalog", CATALOG, f"{line}; restore a backup"))
            rows = [_Row(*row) for row in db.execute(f"SELECT {_COLUMNS} FROM piece ORDER BY first")]
            arrays = _arrays(room, catalog, found)
            total = sum(row.chunks for row in rows) * room.layout.chunk_bytes
            for row in rows:
                _check_piece(room, catalog, arrays, row, found)
                found.bytes += row.chunks * room.layout.chunk_bytes
                if progress is not None:
                    progress(Progress("check", found.bytes, total, "bytes", CATALOG))
            _check_documents(catalog, {row.id: row for row in rows}, found)
            found.bytes += catalog.disk_bytes
    except GenerationGone:
        raise
    except StoreDamaged as error:
        found.problems.append(Problem("catalog", CATALOG, str(error)))
    return found


def _arrays(room: Room, catalog: Catalog, found: _Found) -> Arrays | None:
    """The data files; None where they are lost or cut."""
    generation, records = catalog.meta("generation"), catalog.meta("records")
    try:
        return Arrays(room.folder, room.layout, generation, records)
    except StoreDamaged as error:
        with room.catalog.read():
            if room.catalog.meta("generation") != generation and isinstance(error, GenerationGone):
                raise  # replaced meanwhile
        found.problems.append(Problem("file", paths_of(room.folder, generation)[0].name, str(error)))
        return None


def _check_piece(room: Room, catalog: Catalog, arrays: Arrays | None, row: _Row, found: _Found) -> None:
    if catalog.tokens(row.id).digest() != row.digest:
        what = "its token ids or text are not what was written; restore a backup, or forget its documents"
        found.problems.append(Problem("text", f"{CATALOG}, piece {row.id}", what))
    elif arrays is None or row.first + row.chunks > arrays.count or _run(arrays, row).crc() != row.crc:
        what = f"these bytes are not what was written; {REPAIR}"
        found.problems.append(Problem("piece", _place(room, row), what))
        found.bad.append(row)


def _run(arrays: Arrays, row: _Row) -> StoredChunks:
    return arrays.chunks(row.first, row.chunks)


def _check_documents(catalog: Catalog, pieces: dict[int, _Row], found: _Found) -> None:
    """Every document is the sum of its parts."""
    for document in catalog.documents(expired=True):
        parts = catalog.parts(document.id)
        ends = [0, *accumulate(part.tokens for part in parts)]
        whole = ends[-1] == document.tokens and [part.first_token for part in parts] == ends[:-1]
        if not whole or any(part.piece not in pieces or part.tokens > pieces[part.piece].tokens for part in parts):
            what = "its parts do not make the whole; restore a backup, or forget it"
            found.problems.append(Problem("document", f"{document.namespace}/{document.name}", what))
        found.documents += 1


def _repair(room: Room, row: _Row) -> bool:
    """Encode a piece again and write it after the last record; whether it has the bits it had."""
    run = room.encoder_needed().encode([room.catalog.tokens(row.id).ids])[0]
    with room.guard:
        with room.catalog.read():
            generation, first = room.catalog.meta("generation"), room.catalog.meta("records")
        append(room.folder, room.layout, generation, first, [run])
        with room.catalog.write() as db:
            db.execute("UPDATE piece SET first = ?, crc = ? WHERE id = ?", (first, run.crc(), row.id))
            db.execute("UPDATE meta SET value = ? WHERE key = 'records'", (first + len(run),))
    return run.crc() == row.crc


def _place(room: Room, row: _Row) -> str:
    with room.catalog.read():
        kv, keys = paths_of(room.folder, room.catalog.meta("generation"))
    return f"{kv.name} and {keys.name}, chunks {row.first} to {row.first + row.chunks}"


def disk_bytes(room: Room) -> int:
    """Of data files and catalog."""
    return room.catalog.disk_bytes + file_bytes(room)


def file_bytes(room: Room) -> int:
    """Of the data files."""
    with room.catalog.read():
        paths = paths_of(room.folder, room.catalog.meta("generation"))
    return sum(path.stat().st_size for path in paths if path.exists())
