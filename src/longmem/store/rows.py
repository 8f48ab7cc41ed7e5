"""Between the catalog's rows and the records that callers see."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from longmem.errors import StoreDamaged, StoreError
from longmem.store.records import DocumentInfo, Layout
from longmem.store.schema import DocumentRow


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
        return json.dumps(dict(metadata or {}), sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"metadata of {name!r} must be a JSON object ({error}); use strings, numbers, lists"
        ) from error


def matches(row: DocumentRow, where: Mapping[str, Any] | None) -> bool:
    """Whether a document's metadata has every key of ``where`` with an equal value."""
    if not where:
        return True
    metadata = metadata_of(row)
    return all(key in metadata and metadata[key] == value for key, value in where.items())
