"""Reading the catalog: every row is compared with its check sum, and what is listed with its total."""

from __future__ import annotations

import math
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longmem.errors import StoreDamaged
from longmem.store.records import Layout
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
    Value,
    checked,
)
from longmem.store.totals import COMMITS, all_totals, check_total, lost, read_total, summed


class Snapshot:
    """One consistent state of the catalog, while its transaction is open.

    Every method raises StoreDamaged rather than give an answer that may be wrong.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path, layout: Layout | None = None) -> None:
        self._connection = connection
        self._layout = layout
        self.path = path

    @property
    def layout(self) -> Layout:
        """What is fixed for the whole store."""
        if self._layout is None:
            rows = self.rows(MetaRow)
            try:
                self._layout = Layout.from_meta({row.key: row.value for row in rows})
            except (KeyError, ValueError) as error:
                raise StoreDamaged(f"catalog.sqlite: table meta is incomplete ({error}); restore a backup") from error
        return self._layout

    def raw(self, statement: str, values: Sequence[Value] = ()) -> sqlite3.Cursor:
        """Columns as they are read, checked by nobody."""
        return self._connection.execute(statement, tuple(values))

    def rows(self, kind: type[Row], where: str = "", values: Sequence[Value] = ()) -> list[Row]:
        """Checked rows of a table; ``where`` is SQL behind the table's name."""
        return [row for row, _ in self.rows_and_sums(kind, where, values)]

    def rows_and_sums(
        self, kind: type[Row], where: str = "", values: Sequence[Value] = ()
    ) -> Iterator[tuple[Row, bytes]]:
        """Checked rows, each with its check sum."""
        table = TABLES[kind]
        columns = ", ".join(f"{table}.{name}" for name in (*kind._fields, "check_sum"))  # type: ignore[attr-defined]
        for values_read in self._connection.execute(f"SELECT {columns} FROM {table} {where}", tuple(values)):
            yield checked(kind, values_read), values_read[-1]

    def every(self, kind: type[Row]) -> list[Row]:
        """All rows of a counted table, in the order of their keys; none is missing."""
        found = list(self.rows_and_sums(kind, "NOT INDEXED ORDER BY " + ", ".join(KEYS[kind])))
        self._check_total(TABLES[kind], [each for _, each in found])
        return [row for row, _ in found]

    def _check_total(self, scope: str, sums: list[bytes]) -> None:
        check_total(self._connection, scope, summed(sums))

    def commits(self) -> int:
        """Transactions of the store's life."""
        row = read_total(self._connection, COMMITS)
        return 0 if row is None else row.rows

    def total(self, scope: str) -> TotalRow | None:
        """Count and sum of a scope (see ``TotalRow``); it changes whenever a row of the scope does."""
        return read_total(self._connection, scope)

    # documents

    def namespaces(self, now: float = -math.inf) -> list[str]:
        """Names of those with documents that have not expired at this moment, sorted; none is missing."""
        prefix = "documents:"
        totals = all_totals(self._connection)
        counts = {scope.removeprefix(prefix): row.rows for scope, row in totals.items() if scope.startswith(prefix)}
        for row in self.rows(DocumentRow, "WHERE expires <= ?", (now,)):
            counts[row.namespace] -= 1
        return sorted(name for name, count in counts.items() if count > 0)

    def documents(self, namespace: str) -> list[DocumentRow]:
        """All documents of a namespace, expired ones included, ordered by time and number; none is missing."""
        found = list(self.rows_and_sums(DocumentRow, "WHERE namespace = ?", (namespace,)))
        self._check_total(f"documents:{namespace}", [each for _, each in found])
        return sorted((row for row, _ in found), key=lambda row: (row.added, row.id))

    def document(self, namespace: str, name: str) -> DocumentRow | None:
        """The document of that name, expired or not; None where there is none for certain."""
        # a damaged index may hide a row: only a complete list says that there is none
        found = self.find(namespace, name)
        return found or next((row for row in self.documents(namespace) if row.name == name), None)

    def find(self, namespace: str, name: str) -> DocumentRow | None:
        """The same by the index alone; for writers, who checked the whole catalog when they opened it."""
        found = self.rows(DocumentRow, "WHERE namespace = ? AND name = ?", (namespace, name))
        return found[0] if found else None

    def pieces(self, document: DocumentRow) -> list[PieceRow]:
        """The parts of a document in order, complete."""
        return self._complete(document, self.rows(PieceRow, "WHERE document = ? ORDER BY ordinal", (document.id,)))

    def pieces_of(self, namespace: str, documents: Sequence[DocumentRow]) -> dict[int, list[PieceRow]]:
        """The parts of these documents of a namespace, by document number."""
        if len(documents) == 1:
            return {documents[0].id: self.pieces(documents[0])}
        where = (
            "JOIN documents ON documents.id = pieces.document WHERE documents.namespace = ? ORDER BY document, ordinal"
        )
        found: dict[int, list[PieceRow]] = defaultdict(list)
        for row in self.rows(PieceRow, where, (namespace,)):
            found[row.document].append(row)
        return {document.id: self._complete(document, found[document.id]) for document in documents}

    def _complete(self, document: DocumentRow, pieces: list[PieceRow]) -> list[PieceRow]:
        expected = 0
        for number, piece in enumerate(pieces):
            if (piece.ordinal, piece.first_token) != (number, expected):
                break
            expected += piece.tokens
        else:
            if (len(pieces), expected) == (document.pieces, document.tokens):
                return pieces
        raise StoreDamaged(
            lost(f"pieces of document {document.name!r} ({document.namespace})", len(pieces), document.pieces)
        )

    # contents

    def content(self, number: int) -> ContentRow:
        """A content that a piece refers to."""
        return self._one(ContentRow, number)

    def contents_of(self, namespace: str) -> dict[int, ContentRow]:
        """The contents that a namespace's documents refer to, by number."""
        where = (
            "WHERE id IN (SELECT content FROM pieces JOIN documents ON documents.id = pieces.document "
            "WHERE documents.namespace = ?)"
        )
        return {row.id: row for row in self.rows(ContentRow, where, (namespace,))}

    def content_by_digest(self, digest: bytes) -> ContentRow | None:
        """The content of this digest, or None."""
        found = self.rows(ContentRow, "WHERE digest = ?", (digest,))
        return found[0] if found else None

    def text(self, content: int) -> TextRow:
        """What a content was made from."""
        return self._one(TextRow, content)

    def holds(self, namespace: str, content: int) -> bool:
        """Whether a document of the namespace has this content."""
        where = (
            "JOIN documents ON documents.id = pieces.document "
            "WHERE pieces.content = ? AND documents.namespace = ? LIMIT 1"
        )
        return bool(self.rows(PieceRow, where, (content, namespace)))

    # data files

    def file(self, name: str) -> FileRow:
        """The record of a data file that a content lies in."""
        return self._one(FileRow, name)

    def files(self) -> list[FileRow]:
        """All data files; none is missing."""
        return self.every(FileRow)

    def _one(self, kind: type[Row], key: Value) -> Row:
        found = self.rows(kind, f"WHERE {KEYS[kind][0]} = ?", (key,))
        if not found:
            raise StoreDamaged(
                f"catalog.sqlite: row {key!r} of table {TABLES[kind]} is missing; "
                "restore a backup, or run `longmem memory verify` to see what else is damaged"
            )
        return found[0]


def key_of(kind: type[Any], row: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values of a row's key columns."""
    return row[: len(KEYS[kind])]
