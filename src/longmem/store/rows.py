"""Between the catalog's rows and the records that callers see."""

from __future__ import annotations

import json
import math
import time as clock
import unicodedata
from collections.abc import Mapping
from typing import Any

from longmem.errors import StoreDamaged, StoreError
from longmem.store.pieces import Tokens, joined
from longmem.store.records import DocumentInfo, Layout, NewDocument
from longmem.store.schema import DocumentRow
from longmem.store.snapshot import Snapshot
from longmem.store.transaction import Transaction


def info_of(row: DocumentRow, layout: Layout) -> DocumentInfo:
    """A document's row as its record."""
    return DocumentInfo(
        id=row.id,
        namespace=row.namespace,
        name=row.name,
        source=row.source,
        metadata=metadata_of(row),
        added=row.added,
        expires=row.expires,
        tokens=row.tokens,
        chunks=layout.chunks(row.tokens),
        revision=row.revision,
    )


def metadata_of(row: DocumentRow) -> dict[str, Any]:
    """A document's metadata."""
    try:
        found = json.loads(row.metadata)
    except ValueError as error:
        raise StoreDamaged(f"catalog.sqlite: metadata of document {row.name!r} is no JSON ({error})") from error
    assert isinstance(found, dict)
    return found


def metadata_text(metadata: Mapping[str, Any] | None, name: str) -> str:
    """Metadata as the catalog keeps it.

    Raises:
        StoreError: it is no JSON object.
    """
    try:
        text = json.dumps(dict(metadata or {}), sort_keys=True, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(
            f"metadata of {name!r} must be a JSON object ({error}); use strings, numbers, lists"
        ) from error
    return text


def matches(row: DocumentRow, where: Mapping[str, Any] | None) -> bool:
    """Whether a document's metadata has every key of ``where`` with an equal value."""
    if not where:
        return True
    metadata = metadata_of(row)
    return all(key in metadata and metadata[key] == value for key, value in where.items())


def is_expired(row: DocumentRow, now: float | None = None) -> bool:
    """Whether nobody finds a document any more."""
    return row.expires is not None and row.expires <= (clock.time() if now is None else now)


def find_live(snapshot: Snapshot, namespace: str, name: str) -> DocumentRow | None:
    """The document of that name that can be found now."""
    row = snapshot.document(namespace, name)
    return None if row is None or is_expired(row) else row


def whole_document(snapshot: Snapshot, row: DocumentRow) -> Tokens:
    """All tokens of a document, and its text if it was made from one."""
    runs = []
    for piece in snapshot.pieces(row):
        tokens = Tokens.from_row(snapshot.text(piece.content))
        runs.append(tokens if len(tokens) == piece.tokens else tokens.slice(0, piece.tokens))
    return joined(runs)


def delete_document(tx: Transaction, row: DocumentRow) -> None:
    """Remove a document; its contents stay until they are compacted."""
    for piece in tx.pieces(row):
        tx.delete(piece)
    tx.delete(row)


def _is_text(value: object) -> bool:
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _is_name(value: str) -> bool:
    """No control characters, which would break lines and terminals, and nothing that is no Unicode."""
    return all(unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp") for character in value)


def check_names(namespace: str, new: NewDocument) -> None:
    """Refuse what cannot be a namespace, a name, or a moment.

    Raises:
        StoreError: lists all that is wrong.
    """
    wrong = []
    for what, value in (("namespace", namespace), ("name", new.name)):
        if not isinstance(value, str) or not 0 < len(value) <= 1000 or not _is_name(value):
            wrong.append(f"{what} ({value!r:.60}) must be 1 to 1000 characters, none of them for control")
    if new.source is not None and not _is_text(new.source):
        wrong.append(f"source ({new.source!r:.60}) must be a text")
    for what, moment in (("time", new.time), ("expires", new.expires)):
        if moment is not None and not (isinstance(moment, int | float) and math.isfinite(moment)):
            wrong.append(f"{what} ({moment!r}) must be seconds since the epoch")
    if wrong:
        raise StoreError("; ".join(wrong))
