"""Changing the catalog: rows come, go and change with their check sums and the totals."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from longmem.errors import StoreDamaged
from longmem.store.records import Layout
from longmem.store.schema import KEYS, TABLES, ContentRow, DocumentRow, FileRow, PieceRow, TextRow, check_sum
from longmem.store.snapshot import Snapshot, key_of
from longmem.store.totals import Changes, check_total


class Transaction(Snapshot):
    """Reads and changes the catalog; everything it does becomes true at once, when it ends."""

    def __init__(self, connection: sqlite3.Connection, path: Path, layout: Layout | None = None) -> None:
        super().__init__(connection, path, layout)
        self._changes = Changes()

    def insert(self, row: Any) -> None:
        """Write a new row."""
        kind = type(row)
        marks = ", ".join("?" * (len(row) + 1))
        self._connection.execute(f"INSERT INTO {TABLES[kind]} VALUES ({marks})", (*row, check_sum(kind, row)))
        self._changes.note(kind, row, +1)

    def delete(self, row: Any) -> None:
        """Remove a row that was read."""
        kind = type(row)
        where = " AND ".join(f"{name} = ?" for name in KEYS[kind])
        gone = self._connection.execute(f"DELETE FROM {TABLES[kind]} WHERE {where}", key_of(kind, row)).rowcount
        if gone != 1:
            raise StoreDamaged(
                f"catalog.sqlite: row {key_of(kind, row)} of table {TABLES[kind]} cannot be found to be removed; "
                "run `longmem memory verify`"
            )
        self._changes.note(kind, row, -1)

    def replace(self, old: Any, new: Any) -> None:
        """Change a row that was read; its key stays."""
        kind = type(new)
        sets = ", ".join(f"{name} = ?" for name in (*kind._fields, "check_sum"))
        where = " AND ".join(f"{name} = ?" for name in KEYS[kind])
        values = (*new, check_sum(kind, new), *key_of(kind, old))
        if self._connection.execute(f"UPDATE {TABLES[kind]} SET {sets} WHERE {where}", values).rowcount != 1:
            raise StoreDamaged(
                f"catalog.sqlite: row {key_of(kind, old)} of table {TABLES[kind]} cannot be found to be changed; "
                "run `longmem memory verify`"
            )
        self._changes.note(kind, old, -1)
        self._changes.note(kind, new, +1)

    def next_id(self, table: str) -> int:
        """The number of the next row of a table whose numbers are never given twice."""
        found = self._connection.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,)).fetchone()
        highest = self._connection.execute(f"SELECT max(id) FROM {table}").fetchone()[0]
        return max(found[0] if found else 0, highest or 0) + 1

    def _check_total(self, scope: str, sums: list[bytes]) -> None:
        check_total(self._connection, scope, self._changes.before(scope, sums))

    def recount(self, commits: int) -> None:
        """Make the totals anew from the rows, of so many transactions; for repair, when nothing else is wrong."""
        self._connection.execute("DELETE FROM totals")
        self._changes = Changes(commits)
        for kind in (FileRow, ContentRow, TextRow, DocumentRow, PieceRow):
            for row in self.rows(kind):
                self._changes.note(kind, row, +1)

    def remove_damaged(self, table: str, rowid: int) -> None:
        """Remove a row whose check sum is wrong; the totals have to be counted again."""
        self._connection.execute(f"DELETE FROM {table} WHERE rowid = ?", (rowid,))

    def defer_references(self) -> None:
        """Check references between tables at the end of this transaction only."""
        self._connection.execute("PRAGMA defer_foreign_keys = ON")

    def write_totals(self) -> int:
        """Count this transaction, and what it changed; its number."""
        return self._changes.write(self._connection)
