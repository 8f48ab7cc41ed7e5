"""Row counts and sums of check sums, so that a row which is lost is missed (see ``schema.TotalRow``)."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from longmem.errors import StoreDamaged
from longmem.store.schema import TABLES, DocumentRow, TotalRow, Value, check_sum, checked

ROOT = "totals"
COMMITS = "commits"
COUNTED = ("files", "contents", "texts", "documents", "pieces")
_MODULUS = 1 << 64


def scopes_of(kind: type[Any], row: tuple[Value, ...]) -> list[str]:
    """The scopes that a row is counted in."""
    table = TABLES[kind]
    if table not in COUNTED:
        return []
    return [table, f"documents:{row[1]!s}"] if kind is DocumentRow else [table]


def summed(sums: Iterable[bytes]) -> tuple[int, bytes]:
    """How many, and their total as a ``TotalRow`` keeps it."""
    numbers = [int.from_bytes(each, "little") for each in sums]
    return len(numbers), (sum(numbers) % _MODULUS).to_bytes(8, "little")


def read_total(connection: sqlite3.Connection, scope: str) -> TotalRow | None:
    """The row of a scope as it was read and checked; None where none is found."""
    found = connection.execute("SELECT scope, rows, total, check_sum FROM totals WHERE scope = ?", (scope,)).fetchone()
    return None if found is None else checked(TotalRow, found)


def all_totals(connection: sqlite3.Connection) -> dict[str, TotalRow]:
    """Every scope but the root, complete.

    Raises:
        StoreDamaged: one is damaged or lost.
    """
    found = connection.execute("SELECT scope, rows, total, check_sum FROM totals").fetchall()
    rows = {row.scope: row for row in (checked(TotalRow, each) for each in found)}
    root = rows.pop(ROOT, None)
    have = summed(each[-1] for each in found if each[0] != ROOT)
    if root is None or have != (root.rows, root.total):
        raise StoreDamaged(lost("totals", have[0], None if root is None else root.rows))
    return rows


def check_total(connection: sqlite3.Connection, scope: str, have: tuple[int, bytes]) -> None:
    """Compare the rows that were read with what a scope should have.

    Raises:
        StoreDamaged: a row is lost, or one is there that was not written.
    """
    row = read_total(connection, scope)
    if row is None and scope not in all_totals(connection):
        row = TotalRow(scope, 0, bytes(8))
    expected = None if row is None else (row.rows, row.total)
    if have != expected:
        raise StoreDamaged(lost(scope, have[0], None if row is None else row.rows))


def lost(scope: str, have: int, expected: int | None) -> str:
    """The line that says so."""
    rows = "an unknown number" if expected is None else str(expected)
    return (
        f"catalog.sqlite: {have} rows of {scope} where {rows} were written; "
        "restore a backup, or run `longmem memory verify` to see what is damaged"
    )


class Changes:
    """What a transaction adds to and takes from the scopes; written once, at its end."""

    def __init__(self, commits: int = 0) -> None:
        self._rows: dict[str, int] = defaultdict(int)
        self._rows[COMMITS] = commits
        self._sums: dict[str, int] = defaultdict(int)

    def note(self, kind: type[Any], row: tuple[Value, ...], sign: int) -> None:
        """A row comes (+1) or goes (-1)."""
        for scope in scopes_of(kind, row):
            self._rows[scope] += sign
            self._sums[scope] += sign * int.from_bytes(check_sum(kind, row), "little")

    def before(self, scope: str, sums: list[bytes]) -> tuple[int, bytes]:
        """What the table should say of a scope whose rows have these check sums now."""
        rows, total = summed(sums)
        number = (int.from_bytes(total, "little") - self._sums.get(scope, 0)) % _MODULUS
        return rows - self._rows.get(scope, 0), number.to_bytes(8, "little")

    def write(self, connection: sqlite3.Connection) -> int:
        """Bring the table up to date; the number of this transaction."""
        root = read_total(connection, ROOT) or TotalRow(ROOT, 0, bytes(8))
        rows, total = root.rows, int.from_bytes(root.total, "little")
        self._rows[COMMITS] += 1
        commits = 0
        for scope in self._rows:
            old = read_total(connection, scope)
            before = old or TotalRow(scope, 0, bytes(8))
            new = TotalRow(
                scope,
                before.rows + self._rows[scope],
                ((int.from_bytes(before.total, "little") + self._sums[scope]) % _MODULUS).to_bytes(8, "little"),
            )
            if scope == COMMITS:
                commits = new.rows
            if old is not None:
                rows, total = rows - 1, total - int.from_bytes(check_sum(TotalRow, old), "little")
            if new.rows or scope in COUNTED:
                rows, total = rows + 1, total + int.from_bytes(check_sum(TotalRow, new), "little")
                _put(connection, new)
            else:
                connection.execute("DELETE FROM totals WHERE scope = ?", (scope,))
        _put(connection, TotalRow(ROOT, rows, (total % _MODULUS).to_bytes(8, "little")))
        return commits


def _put(connection: sqlite3.Connection, row: TotalRow) -> None:
    connection.execute("INSERT OR REPLACE INTO totals VALUES (?, ?, ?, ?)", (*row, check_sum(TotalRow, row)))
