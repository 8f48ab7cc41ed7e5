"""The rows of the catalog and the check sum that each of them carries.

``check_sum`` is 8 bytes of BLAKE2b, personalised with the table's name, over the other columns in their order, each
written as a letter and its value, little-endian: ``n`` NULL · ``i`` a signed integer of 8 bytes · ``d`` an IEEE
double · ``t`` or ``b`` a length of 8 bytes and UTF-8 text or bytes.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any, NamedTuple, TypeVar

from longmem.errors import StoreDamaged

Value = int | float | str | bytes | None
Row = TypeVar("Row", bound=tuple[Any, ...])


class MetaRow(NamedTuple):
    """A constant of the store."""

    key: str
    value: str


class TotalRow(NamedTuple):
    """How many rows a scope has, and the sum of their check sums modulo 2^64 (8 bytes, little-endian).

    Scopes: the name of a table, ``documents:NAMESPACE``, and ``totals`` for all the other rows of this table, so that a
    row which is lost is missed. ``commits`` counts transactions.
    """

    scope: str
    rows: int
    total: bytes


class FileRow(NamedTuple):
    """A data file; ``blocks`` holds a CRC-32 (4 bytes, little-endian) for every 64 KiB of it."""

    id: str
    size: int
    chunks: int
    blocks: bytes


class ContentRow(NamedTuple):
    """A run of whole segments, and where its chunks lie."""

    id: int
    digest: bytes
    tokens: int
    chunks: int
    file: str
    first_chunk: int


class TextRow(NamedTuple):
    """What a content was made from; ``records`` holds 8 bytes of BLAKE2b for every stored chunk."""

    content: int
    token_ids: bytes
    text: str | None
    starts: bytes | None
    records: bytes


class DocumentRow(NamedTuple):
    """A document."""

    id: int
    namespace: str
    name: str
    source: str | None
    metadata: str
    added: float
    expires: float | None
    tokens: int
    pieces: int
    revision: int


class PieceRow(NamedTuple):
    """The first ``tokens`` tokens of a content as a part of a document."""

    document: int
    ordinal: int
    content: int
    first_token: int
    tokens: int


TABLES: dict[type[Any], str] = {
    MetaRow: "meta",
    TotalRow: "totals",
    FileRow: "files",
    ContentRow: "contents",
    TextRow: "texts",
    DocumentRow: "documents",
    PieceRow: "pieces",
}
KEYS: dict[type[Any], tuple[str, ...]] = {
    MetaRow: ("key",),
    TotalRow: ("scope",),
    FileRow: ("id",),
    ContentRow: ("id",),
    TextRow: ("content",),
    DocumentRow: ("id",),
    PieceRow: ("document", "ordinal"),
}
"""The columns that name a row."""


def check_sum(kind: type[Any], values: tuple[Value, ...]) -> bytes:
    """8 bytes over the columns of a row, see above."""
    digest = hashlib.blake2b(digest_size=8, person=TABLES[kind].encode())
    for value in values:
        if value is None:
            digest.update(b"n")
        elif isinstance(value, int):
            digest.update(b"i" + struct.pack("<q", value))
        elif isinstance(value, float):
            digest.update(b"d" + struct.pack("<d", value))
        elif isinstance(value, str):
            data = value.encode()
            digest.update(b"t" + struct.pack("<Q", len(data)) + data)
        else:
            digest.update(b"b" + struct.pack("<Q", len(value)))
            digest.update(value)
    return digest.digest()


def checked(kind: type[Row], values: tuple[Any, ...]) -> Row:
    """A row as it was read (its columns, then its check sum), if that is how it was written.

    Raises:
        StoreDamaged: it is not; names table and row.
    """
    *columns, expected = values
    if check_sum(kind, tuple(columns)) != expected:
        named = ", ".join(repr(value)[:60] for value in columns[: len(KEYS[kind])])
        raise StoreDamaged(
            f"catalog.sqlite: row {named} of table {TABLES[kind]} is not what was written; "
            "restore a backup, or run `longmem memory verify` to see what else is damaged"
        )
    return kind(*columns)
