"""Repairing: data files are made again from the token ids, the catalog's structure from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from longmem.errors import LongMemError, StoreDamaged, StoreError
from longmem.store.checking import CatalogCheck, check_catalog
from longmem.store.compacting import move_contents
from longmem.store.durable import failpoint, new_id
from longmem.store.pieces import Tokens
from longmem.store.precision import StoredChunks
from longmem.store.records import Problem
from longmem.store.room import Room
from longmem.store.schema import ContentRow, FileRow
from longmem.store.segments import DataFile, OtherBits, file_name, write_file
from longmem.store.transaction import Transaction

_OWN_STRUCTURE = {"seal", "structure", "lost transactions"}
_CAN_BE_MADE_AGAIN = {"files", "totals"}
_FOLLOWS = "catalog.sqlite, files"
"""Where the loss of a data file's record shows, too."""


@dataclass
class Repairs:
    """What was made again.

    Attributes:
        tokens: that were encoded again.
        same_bits: whether all of it has the bits it had; None where nothing was encoded.
    """

    tokens: int = 0
    same_bits: bool | None = None

    def note(self, tokens: int, same_bits: bool) -> None:
        """Add a file."""
        self.tokens += tokens
        if tokens:
            self.same_bits = same_bits and self.same_bits is not False


def repair_catalog(
    room: Room, problems: list[Problem], check: CatalogCheck, repairs: Repairs
) -> tuple[list[Problem], CatalogCheck]:
    """What is left of the catalog's problems, and what it holds now.

    Damaged records of data files, row counts, indices and free space can be made again. What a damaged row of a
    document, a text or a place of one said cannot be known.
    """
    try:
        rows = any(problem.kind == "row" for problem in problems)
        if any(not _can_be_repaired(problem, rows, check) for problem in problems):
            return problems, check
        if rows:
            _replace_rows(room, check, repairs)
        room.catalog.rebuild()
        again = check_catalog(room.catalog)
        if again.problems:
            return problems, check
        room.catalog.note_commits()
        room.catalog.seal()
    except LongMemError as error:
        return [*problems, Problem("structure", "catalog.sqlite", f"cannot be repaired: {error}")], check
    return [replace(problem, repaired=True) for problem in problems], again


def _can_be_repaired(problem: Problem, rows: bool, check: CatalogCheck) -> bool:
    if problem.kind == "row":
        return set(check.damaged) <= _CAN_BE_MADE_AGAIN
    return problem.kind in _OWN_STRUCTURE or (rows and problem.where == _FOLLOWS)


def _replace_rows(room: Room, check: CatalogCheck, repairs: Repairs) -> None:
    """Encode again what lies in data files whose record is damaged, and count the rows anew."""
    homeless: dict[str, list[ContentRow]] = {}
    for content in check.contents.values():
        if content.file not in check.files:
            homeless.setdefault(content.file, []).append(content)
    placed: list[str] = []
    moved: list[tuple[FileRow, list[ContentRow], list[StoredChunks]]] = []
    try:
        for contents in homeless.values():
            contents.sort(key=lambda row: row.first_chunk)
            parts = _encoded(room, contents)
            placed.append(new_id())
            file = write_file(room.staging, room.segments, placed[-1], parts, room.layout)
            failpoint("repair.placed")
            moved.append((file, contents, parts))
        with room.catalog.transaction() as tx:
            tx.defer_references()
            for table, numbers in check.damaged.items():
                for number in numbers:
                    tx.remove_damaged(table, number)
            for file, contents, parts in moved:
                tx.insert(file)
                repairs.note(sum(row.tokens for row in contents), _take_records(tx, contents, parts))
                move_contents(tx, file, contents)
            tx.recount(0 if room.lock is None else room.lock.holder.commits)
    except BaseException:
        room.discard(placed)
        raise
    failpoint("repair.committed")


def repair_file(room: Room, row: FileRow, blocks: set[int] | None, problem: Problem, repairs: Repairs) -> Problem:
    """Make a damaged data file again: what is whole is copied, the rest is encoded.

    Comes out what was written, the file takes its old place and the catalog does not change. Otherwise (another
    device or library rounds otherwise) it gets a new id.

    Args:
        blocks: that are damaged; None is all of it.
    """
    try:
        with room.catalog.snapshot() as snapshot:
            contents = snapshot.rows(ContentRow, "WHERE file = ? ORDER BY first_chunk", (row.id,))
        parts, encoded = _parts(room, row, blocks, contents)
        same = _write_again(room, row, contents, parts)
    except LongMemError as error:
        return replace(problem, what=f"{problem.what}; this failed: {error}")
    repairs.note(encoded, same)
    return replace(problem, repaired=True)


def _parts(
    room: Room, row: FileRow, blocks: set[int] | None, contents: Sequence[ContentRow]
) -> tuple[list[StoredChunks], int]:
    """The chunks of a file's contents in their order, and how many tokens had to be encoded."""
    room.forget_file(row.id)
    whole: dict[int, StoredChunks] = {}
    if blocks is not None:
        file = DataFile.open(room.segments / file_name(row.id), row, room.layout)
        for content in contents:
            first, last = content.first_chunk, content.first_chunk + content.chunks
            if not blocks & file.blocks_of(first, last):
                whole[content.id] = file.chunks(first, last)
    lost = [content for content in contents if content.id not in whole]
    for content, chunks in zip(lost, _encoded(room, lost), strict=True):
        whole[content.id] = chunks
    return [whole[content.id] for content in contents], sum(content.tokens for content in lost)


def _encoded(room: Room, contents: Sequence[ContentRow]) -> list[StoredChunks]:
    """Contents encoded again from their token ids."""
    if not contents:
        return []
    with room.catalog.snapshot() as snapshot:
        ids = [Tokens.from_row(snapshot.text(content.id)).ids for content in contents]
    made = dict(room.encoding().encode(ids))
    for number, content in enumerate(contents):
        if len(made[number]) != content.chunks:
            raise StoreDamaged(
                f"catalog.sqlite: content {content.id} has not the tokens of its {content.chunks} chunks"
            )
    return [made[number] for number in range(len(contents))]


def _write_again(room: Room, row: FileRow, contents: list[ContentRow], parts: list[StoredChunks]) -> bool:
    """Whether the file came out with the bits it had."""
    try:
        write_file(room.staging, room.segments, row.id, parts, room.layout, expected=row.blocks)
    except OtherBits:
        pass
    else:
        failpoint("repair.placed")
        room.forget_file(row.id)
        return True
    name = new_id()
    try:
        file = write_file(room.staging, room.segments, name, parts, room.layout)
        failpoint("repair.placed")
        with room.catalog.transaction() as tx:
            tx.insert(file)
            _take_records(tx, contents, parts)
            move_contents(tx, file, contents)
            tx.delete(row)
    except BaseException:
        room.discard([name])
        raise
    failpoint("repair.committed")
    with suppress(StoreError):  # what cannot be removed is left to the sweep
        room.unlink([row.id])
    return False


def _take_records(tx: Transaction, contents: Sequence[ContentRow], parts: Sequence[StoredChunks]) -> bool:
    """Bring the hashes of the stored chunks up to date; whether all were the same."""
    same = True
    for content, chunks in zip(contents, parts, strict=True):
        text = tx.text(content.id)
        records = chunks.records()
        if records != text.records:
            same = False
            tx.replace(text, text._replace(records=records))
    return same
