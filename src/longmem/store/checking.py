"""All that can be checked of a catalog without its data files: structure, rows, totals, and what follows of what."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from longmem.errors import StoreDamaged
from longmem.store.catalog import Catalog
from longmem.store.pieces import Tokens
from longmem.store.precision import RECORD_DIGEST
from longmem.store.records import Layout, Problem
from longmem.store.schema import (
    KEYS,
    TABLES,
    ContentRow,
    DocumentRow,
    FileRow,
    MetaRow,
    PieceRow,
    Row,
    TextRow,
    TotalRow,
    check_sum,
)
from longmem.store.segments import BLOCK, Arrangement
from longmem.store.snapshot import Snapshot
from longmem.store.sqlite import translated
from longmem.store.totals import COMMITS, COUNTED, ROOT, scopes_of, summed

_RESTORE = "restore a backup, or forget the documents that it belongs to"


@dataclass
class CatalogCheck:
    """What a catalog holds as far as it can be read, and what is wrong with it.

    Attributes:
        problems: all that were found. Of kind ``structure`` are those of SQLite's own structure, ``row`` those of
            single rows, ``relation`` what does not belong together.
        damaged: row numbers (rowid) of damaged rows, by table.
    """

    problems: list[Problem] = field(default_factory=list)
    damaged: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    files: dict[str, FileRow] = field(default_factory=dict)
    contents: dict[int, ContentRow] = field(default_factory=dict)
    texts: set[int] = field(default_factory=set)
    documents: dict[int, DocumentRow] = field(default_factory=dict)
    pieces: dict[int, list[PieceRow]] = field(default_factory=lambda: defaultdict(list))

    def raise_first(self) -> None:
        """StoreDamaged with the first problem, if there is one."""
        if self.problems:
            first, more = self.problems[0], len(self.problems) - 1
            rest = f" (and {more} more problems; `longmem memory verify` lists them)" if more else ""
            raise StoreDamaged(f"{first.where}: {first.what}{rest}")

    def contents_of(self, file: str) -> list[ContentRow]:
        """The contents that lie in a data file, in their order."""
        found = [row for row in self.contents.values() if row.file == file]
        return sorted(found, key=lambda row: row.first_chunk)

    def note(self, kind: str, where: str, what: str) -> None:
        """Add a problem."""
        self.problems.append(Problem(kind, where, what))


def check_catalog(catalog: Catalog) -> CatalogCheck:
    """Read all of a catalog and compare everything with everything; never raises for what it finds."""
    check = CatalogCheck()
    try:
        with catalog.snapshot(own=True) as snapshot:
            _structure(snapshot, check)
            layout = snapshot.layout
            sums: dict[str, list[bytes]] = defaultdict(list)
            for kind in (MetaRow, TotalRow, FileRow, ContentRow, TextRow, DocumentRow, PieceRow):
                for row, digest in _sound_rows(snapshot, kind, check):
                    _keep(check, row, layout)
                    for scope in scopes_of(kind, row):
                        sums[scope].append(digest)
            _totals(snapshot, check, sums)
            _relations(check, layout)
    except StoreDamaged as error:
        where, _, what = str(error).partition(": ")
        check.note("relation", where, what)
    return check


def _structure(snapshot: Snapshot, check: CatalogCheck) -> None:
    try:
        said = [line for (text,) in snapshot.raw("PRAGMA integrity_check(20)") for line in text.splitlines()]
        for line in dict.fromkeys(said):  # it says some things once for every row
            if line != "ok" and not line.startswith("***"):
                check.note("structure", "catalog.sqlite", f"{line}; {_RESTORE}")
        for table, row, parent, _ in snapshot.raw("PRAGMA foreign_key_check"):
            what = f"row {row} of {table} refers to a row of {parent} that is not there"
            check.note("relation", f"catalog.sqlite, {parent}", what)
    except sqlite3.Error as error:
        check.note("structure", "catalog.sqlite", str(translated(error, snapshot.path)).partition(": ")[2])


def _sound_rows(snapshot: Snapshot, kind: type[Row], check: CatalogCheck) -> Iterator[tuple[Row, bytes]]:
    table = TABLES[kind]
    number = "0" if kind is PieceRow else "rowid"  # pieces have none
    columns = ", ".join((number, *kind._fields, "check_sum"))  # type: ignore[attr-defined]
    try:
        for rowid, *values in snapshot.raw(f"SELECT {columns} FROM {table} NOT INDEXED"):
            row = kind(*values[:-1])
            if check_sum(kind, row) == values[-1]:
                yield row, values[-1]
            else:
                check.damaged[table].append(rowid)
                named = ", ".join(repr(value)[:60] for value in row[: len(KEYS[kind])])
                check.note("row", f"catalog.sqlite, table {table}, row {named}", f"is not what was written; {_RESTORE}")
    except sqlite3.Error as error:
        check.note("structure", f"catalog.sqlite, table {table}", str(translated(error, snapshot.path)))


def _keep(check: CatalogCheck, row: Any, layout: Layout) -> None:
    if isinstance(row, FileRow):
        check.files[row.id] = row
    elif isinstance(row, ContentRow):
        check.contents[row.id] = row
    elif isinstance(row, DocumentRow):
        check.documents[row.id] = row
    elif isinstance(row, PieceRow):
        check.pieces[row.document].append(row)
    elif isinstance(row, TextRow):
        check.texts.add(row.content)
        content = check.contents.get(row.content)
        if content is not None and not _fits(row, content):
            where = f"catalog.sqlite, table texts, row {row.content}"
            check.note("row", where, f"token ids, text and digest do not belong together; {_RESTORE}")


def _fits(row: TextRow, content: ContentRow) -> bool:
    lengths = (len(row.token_ids), len(row.records), None if row.starts is None else len(row.starts))
    starts = None if row.text is None else 4 * content.tokens
    if lengths != (4 * content.tokens, RECORD_DIGEST * content.chunks, starts):
        return False
    return Tokens.from_row(row).digest() == content.digest


def _totals(snapshot: Snapshot, check: CatalogCheck, sums: dict[str, list[bytes]]) -> None:
    if check.damaged.get("totals"):
        return  # reported already
    have = {row.scope: row for row in snapshot.rows(TotalRow)}
    commits = have.pop(COMMITS, None)
    root = have.pop(ROOT, None)
    rows = [row for row in (*have.values(), commits) if row is not None]
    expected = summed(check_sum(TotalRow, row) for row in rows)
    if root is None or (root.rows, root.total) != expected:
        check.note(
            "relation", "catalog.sqlite, table totals", f"{expected[0]} rows, not those that were written; {_RESTORE}"
        )
    for scope in sorted({*have, *sums}):
        row = have.get(scope)
        number, total = summed(sums.get(scope, []))
        if (row is None and (number or scope not in COUNTED)) or (row and (row.rows, row.total) != (number, total)):
            written = row.rows if row is not None else 0
            check.note("relation", f"catalog.sqlite, {scope}", f"{number} sound rows where {written} were written")


def _relations(check: CatalogCheck, layout: Layout) -> None:
    for number, document in check.documents.items():
        first = 0
        for ordinal, piece in enumerate(sorted(check.pieces[number], key=lambda row: row.ordinal)):
            content = check.contents.get(piece.content)
            whole = content is not None and (
                piece.tokens == content.tokens
                or (piece.tokens < content.tokens and piece.tokens % layout.segment_tokens == 0)
            )
            if (piece.ordinal, piece.first_token) != (ordinal, first) or piece.tokens <= 0 or not whole:
                where = f"catalog.sqlite, document {document.name!r} ({document.namespace})"
                check.note("relation", where, f"piece {piece.ordinal} does not fit; {_RESTORE}")
                break
            first += piece.tokens
        else:
            if (len(check.pieces[number]), first) != (document.pieces, document.tokens):
                where = f"catalog.sqlite, document {document.name!r} ({document.namespace})"
                check.note("relation", where, f"{first} of {document.tokens} tokens are there; {_RESTORE}")
    by_file: dict[str, list[ContentRow]] = defaultdict(list)
    for content in check.contents.values():
        by_file[content.file].append(content)
        if content.id not in check.texts or content.chunks != layout.chunks(content.tokens):
            check.note("relation", f"catalog.sqlite, content {content.id}", f"has no token ids that fit; {_RESTORE}")
    for file in check.files.values():
        spans = sorted((row.first_chunk, row.first_chunk + row.chunks) for row in by_file[file.id])
        begins = [0, *(end for _, end in spans)]
        if [begin for begin, _ in spans] != begins[:-1] or begins[-1] != file.chunks:
            check.note("relation", f"catalog.sqlite, file {file.id}", f"its contents do not fill it; {_RESTORE}")
        size = Arrangement(file.id, file.chunks, layout).bytes
        if file.size != size or len(file.blocks) != 4 * -(-size // BLOCK):
            check.note("relation", f"catalog.sqlite, file {file.id}", f"its size does not fit the layout; {_RESTORE}")
