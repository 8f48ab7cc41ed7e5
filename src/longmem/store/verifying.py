"""Verifying: every byte of a store compared with what was written, and whether forgotten text is gone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from longmem.errors import LongMemError, StoreDamaged, StoreError, StoreFull
from longmem.store.absence import report_is_absent, text_is_absent
from longmem.store.checking import CatalogCheck, check_catalog
from longmem.store.durable import file_errors
from longmem.store.lock import is_locked, read_holder
from longmem.store.records import ForgetReport, Problem, Progress, Report, VerifyReport
from longmem.store.repairing import Repairs, repair_catalog, repair_file
from longmem.store.room import Room
from longmem.store.schema import FileRow
from longmem.store.seal import check_seal
from longmem.store.segments import bad_blocks, file_name


@dataclass
class DamagedFile:
    """A data file that is not what was written.

    Attributes:
        blocks: that differ; None where the whole file is missing or has another size.
    """

    row: FileRow
    blocks: set[int] | None
    problem: Problem


@dataclass
class _Found:
    sealed: bool = False
    check: CatalogCheck = field(default_factory=CatalogCheck)
    catalog: list[Problem] = field(default_factory=list)
    files: list[DamagedFile] = field(default_factory=list)
    leftovers: list[Problem] = field(default_factory=list)
    bytes: int = 0


def verify(
    room: Room,
    *,
    repair: bool,
    absent: ForgetReport | None,
    absent_text: str | None,
    progress: Report | None,
) -> VerifyReport:
    """See ``MemoryStore.verify``."""
    with room.guard:
        found = _Found()
        _look_at_catalog(room, found)
        repairs = Repairs()
        if repair and found.catalog:
            found.catalog, found.check = repair_catalog(room, found.catalog, found.check, repairs)
        _look_at_files(room, found, progress)
        if repair:
            for damaged in found.files:
                damaged.problem = repair_file(room, damaged.row, damaged.blocks, damaged.problem, repairs)
            found.leftovers = _sweep(room, found)
        present: list[Problem] = []
        kept = 0
        if absent is not None:
            problems, kept = report_is_absent(room, found.check, absent)
            present += problems
        if absent_text is not None:
            present += text_is_absent(room, found.check, absent_text)
        problems = [*found.catalog, *(damaged.problem for damaged in found.files), *found.leftovers, *present]
        if repair and all(problem.repaired for problem in problems):
            with suppress(StoreFull):  # all is repaired; whoever writes next seals it
                room.catalog.seal()
            found.sealed = room.catalog.sealed
        return VerifyReport(
            problems=problems,
            files=len(found.check.files),
            bytes=found.bytes + room.catalog.disk_bytes,
            documents=len(found.check.documents),
            sealed=found.sealed,
            kept=kept,
            rebuilt_tokens=repairs.tokens,
            same_bits=repairs.same_bits,
        )


def _look_at_catalog(room: Room, found: _Found) -> None:
    holder = read_holder(room.folder)
    try:
        found.sealed = check_seal(room.folder, room.catalog.file)
    except StoreDamaged as error:
        found.catalog.append(_problem("seal", error))
    found.check = check_catalog(room.catalog)
    found.catalog += found.check.problems
    try:
        room.catalog.check_schema()
        if holder is not None:
            room.catalog.check_commits(holder.commits)
    except LongMemError as error:
        kind = "lost transactions" if "transactions" in str(error) else "structure"
        found.catalog.append(_problem(kind, error))


def _look_at_files(room: Room, found: _Found, progress: Report | None) -> None:
    total = sum(row.size for row in found.check.files.values())
    for row in found.check.files.values():

        def read(size: int, name: str = row.id) -> None:
            found.bytes += size
            if progress is not None:
                progress(Progress("check", found.bytes, total, "bytes", name))

        path = room.segments / file_name(row.id)
        damaged = _look_at_file(path, row, read)
        if damaged is not None and not (damaged.problem.kind == "missing file" and _removed(room, row)):
            found.files.append(damaged)
    # of a catalog in doubt nobody can say what it does not know, and a writer's unfinished files are its own
    doubt = any(not problem.repaired for problem in found.catalog)
    if not doubt and (room.lock is not None or not is_locked(room.folder)):
        found.leftovers = _leftovers(room, found.check)


def _look_at_file(path: Path, row: FileRow, read: Callable[[int], None]) -> DamagedFile | None:
    where = f"{path.parent.name}/{path.name}"
    try:
        size = path.stat().st_size
        if size != row.size:
            what = f"{size} bytes where {row.size} were written; `verify --repair` makes it again"
            return DamagedFile(row, None, Problem("size", where, what))
        bad = bad_blocks(path, row, read)
    except FileNotFoundError:
        problem = Problem("missing file", where, "is not there; `verify --repair` makes it again from the token ids")
        return DamagedFile(row, None, problem)
    except (LongMemError, OSError) as error:
        return DamagedFile(
            row, None, Problem("block", where, f"cannot be read ({error}); `verify --repair` makes it again")
        )
    if not bad:
        return None
    some = ", ".join(str(number) for number in bad[:8]) + (", ..." if len(bad) > 8 else "")
    what = f"{len(bad)} of {len(row.blocks) // 4} blocks are not what was written ({some})"
    return DamagedFile(row, set(bad), Problem("block", where, f"{what}; `verify --repair` makes them again"))


def _removed(room: Room, row: FileRow) -> bool:
    """Whether a writer has removed the file since we read the catalog."""
    with room.catalog.snapshot() as snapshot:
        return not snapshot.rows(FileRow, "WHERE id = ?", (row.id,))


def _leftovers(room: Room, check: CatalogCheck) -> list[Problem]:
    known = {file_name(name) for name in check.files}
    found = []
    with file_errors(room.folder, "listing"):
        for folder, kind, what in (
            (room.staging, "staging", "left by an unfinished write; the next writer removes it"),
            (room.segments, "orphan", "the catalog does not know it; the next writer removes it"),
        ):
            for path in sorted(folder.iterdir()) if folder.is_dir() else []:
                if path.name not in known or folder == room.staging:
                    found.append(Problem(kind, f"{folder.name}/{path.name}", what))
    return found


def _sweep(room: Room, found: _Found) -> list[Problem]:
    """Remove what unfinished writes left."""
    if not found.leftovers:
        return []
    with suppress(StoreError):  # what cannot be removed stays in the report
        room.sweep()
    return [replace(problem, repaired=not (room.folder / problem.where).exists()) for problem in found.leftovers]


def _problem(kind: str, error: Exception) -> Problem:
    where, _, what = str(error).partition(": ")
    return Problem(kind, Path(where).name, what)
