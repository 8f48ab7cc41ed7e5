"""Forgetting: documents go at once, what was stored of them with the next ``compact``."""

from __future__ import annotations

import os
import time as clock
from collections.abc import Mapping
from typing import Any

from longmem.errors import StoreError
from longmem.store.absence import hashed, windows_of
from longmem.store.durable import failpoint
from longmem.store.records import ForgetReport, ForgottenContent
from longmem.store.room import Room
from longmem.store.rows import delete_document, matches
from longmem.store.schema import DocumentRow
from longmem.store.snapshot import Snapshot


def forget(
    room: Room,
    namespace: str,
    *,
    name: str | None,
    where: Mapping[str, Any] | None,
    older_than: float | None,
    before: float | None,
    everything: bool,
) -> ForgetReport:
    """See ``MemoryStore.forget``."""
    given = (name is not None, bool(where), older_than is not None, before is not None, everything)
    if not any(given):
        raise StoreError(
            "forget needs to know what: name=, where=, older_than=, before=, or everything=True; nothing was forgotten"
        )
    now = clock.time()
    if older_than is not None:
        before = now - older_than if before is None else min(before, now - older_than)
    with room.guard, room.catalog.transaction() as tx:
        rows = [
            row
            for row in tx.documents(namespace)
            if (name is None or row.name == name) and (before is None or row.added < before) and matches(row, where)
        ]
        if name is not None and not rows:
            raise StoreError(
                f"namespace {namespace!r} has no document {name!r} to forget (with the other conditions given); "
                "`longmem memory list` shows its names"
            )
        report = _report(tx, namespace, rows, now)
        for row in rows:
            delete_document(tx, row)
    failpoint("forget.committed")
    return report


def _report(snapshot: Snapshot, namespace: str, rows: list[DocumentRow], now: float) -> ForgetReport:
    key = os.urandom(16)
    numbers = sorted({piece.content for row in rows for piece in snapshot.pieces(row)})
    contents = []
    for number in numbers:
        content, text = snapshot.content(number), snapshot.text(number)
        contents.append(
            ForgottenContent(
                digest=content.digest.hex(),
                tokens=content.tokens,
                records=text.records.hex(),
                windows=hashed(windows_of(text), key),
            )
        )
    return ForgetReport(
        namespace=namespace,
        time=now,
        store_id=snapshot.layout.store_id,
        key=key.hex(),
        documents=[(row.name, row.tokens) for row in rows],
        contents=contents,
    )
