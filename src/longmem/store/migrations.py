"""The catalog's schema as numbered steps, append only: step n makes schema n out of schema n - 1.

A new store runs all of them, an old one those it lacks, in one transaction with ``PRAGMA user_version``.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

from longmem.store.durable import failpoint

SCHEMA = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name"
"""What tells two schemas apart."""

_SCHEMA_1 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL, check_sum BLOB NOT NULL);
CREATE TABLE totals (scope TEXT PRIMARY KEY, rows INTEGER NOT NULL, total BLOB NOT NULL, check_sum BLOB NOT NULL);
CREATE TABLE files (
    id TEXT PRIMARY KEY, size INTEGER NOT NULL, chunks INTEGER NOT NULL, blocks BLOB NOT NULL, check_sum BLOB NOT NULL);
CREATE TABLE contents (
    id INTEGER PRIMARY KEY AUTOINCREMENT, digest BLOB NOT NULL UNIQUE, tokens INTEGER NOT NULL, chunks INTEGER NOT NULL,
    file TEXT NOT NULL REFERENCES files (id), first_chunk INTEGER NOT NULL, check_sum BLOB NOT NULL);
CREATE TABLE texts (
    content INTEGER PRIMARY KEY REFERENCES contents (id), token_ids BLOB NOT NULL, text TEXT, starts BLOB,
    records BLOB NOT NULL, check_sum BLOB NOT NULL);
CREATE TABLE documents (
    id INTEGER PRIMARY KEY AUTOINCREMENT, namespace TEXT NOT NULL, name TEXT NOT NULL, source TEXT,
    metadata TEXT NOT NULL, added REAL NOT NULL, expires REAL, tokens INTEGER NOT NULL, pieces INTEGER NOT NULL,
    revision INTEGER NOT NULL, check_sum BLOB NOT NULL, UNIQUE (namespace, name));
CREATE TABLE pieces (
    document INTEGER NOT NULL REFERENCES documents (id), ordinal INTEGER NOT NULL,
    content INTEGER NOT NULL REFERENCES contents (id), first_token INTEGER NOT NULL, tokens INTEGER NOT NULL,
    check_sum BLOB NOT NULL, PRIMARY KEY (document, ordinal)) WITHOUT ROWID;
CREATE INDEX pieces_by_content ON pieces (content);
CREATE INDEX contents_by_file ON contents (file);
"""


def _schema_1(connection: sqlite3.Connection) -> None:
    # not executescript: that would commit
    for statement in _SCHEMA_1.split(";"):
        connection.execute(statement)


MIGRATIONS: list[Callable[[sqlite3.Connection], None]] = [_schema_1]


def schema_number(connection: sqlite3.Connection) -> int:
    """The schema that a catalog has; 0 for an empty one."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def migrate(connection: sqlite3.Connection) -> bool:
    """Run, inside the open transaction, the steps that the catalog lacks; whether there were any."""
    have = schema_number(connection)
    if have == len(MIGRATIONS):
        return False
    failpoint("migrate.begun")
    for number, step in enumerate(MIGRATIONS[have:], have + 1):
        step(connection)
        # a pragma takes no parameters; the number is ours
        connection.execute(f"PRAGMA user_version = {number}")
        failpoint("migrate.step")
    return True


def expected_schema() -> list[tuple[str, ...]]:
    """Type, name, table and statement of everything the newest schema has, as ``sqlite_master`` keeps it."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        for step in MIGRATIONS:
            step(connection)
        return schema_of(connection)
    finally:
        connection.close()


def schema_of(connection: sqlite3.Connection) -> list[tuple[str, ...]]:
    """Type, name, table and statement of everything a catalog has."""
    return connection.execute(SCHEMA).fetchall()
