"""Telling that something is gone, knowing only hashes of it.

A report of forgetting holds a hash of every stored chunk record, and hashes of *windows*: stretches of 64 bytes, one
behind the other, of the token ids and the text as the catalog keeps them. Whatever run of at least 127 of these bytes
were left anywhere in a file, it would hold a whole window. To find windows at any offset, a cheap rolling hash is
compared first and a keyed BLAKE2b decides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from longmem.errors import StoreError
from longmem.store.checking import CatalogCheck
from longmem.store.durable import file_errors
from longmem.store.precision import RECORD_DIGEST
from longmem.store.records import ForgetReport, Problem
from longmem.store.room import Room
from longmem.store.schema import DocumentRow, TextRow
from longmem.store.segments import Arrangement, file_name

WINDOW = 64
_FACTOR = 0x9E3779B97F4A7C15  # odd: it has an inverse modulo 2^64
_INVERSE = pow(_FACTOR, -1, 1 << 64)


def windows_of(row: TextRow) -> list[bytes]:
    """The windows of a content: of its token ids, and of its text; what is shorter than one is its own window."""
    return [window for stretch in _stretches(row) for window in cut_windows(stretch)]


def cut_windows(stretch: bytes) -> list[bytes]:
    """Windows one behind the other; a rest at the end that is shorter belongs to none.

    Of a stretch that is shorter than a window, its first and last 32 or 16 bytes; shorter ones would be found anywhere.
    """
    if len(stretch) < WINDOW:
        short = 32 if len(stretch) >= 32 else 16
        return sorted({stretch[:short], stretch[-short:]}) if len(stretch) >= short else []
    return [stretch[start : start + WINDOW] for start in range(0, len(stretch) - WINDOW + 1, WINDOW)]


def hashed(windows: Iterable[bytes], key: bytes) -> dict[str, str]:
    """Windows as hashes: by length, 4 bytes of the rolling hash and 8 of the keyed one for each, hex."""
    by_length: dict[int, list[bytes]] = {}
    for window in windows:
        by_length.setdefault(len(window), []).append(window)
    return {
        str(length): b"".join(
            int(each).to_bytes(4, "little") + _keyed(window, key)
            for each, window in zip(_rolling_of(group, length), group, strict=True)
        ).hex()
        for length, group in by_length.items()
    }


class Sought:
    """Hashed windows, to be looked for in bytes.

    Args:
        parts: as ``hashed`` gives them.
        key: of the keyed hashes.
    """

    def __init__(self, parts: Iterable[dict[str, str]], key: bytes) -> None:
        self._key = key
        keyed: dict[int, set[bytes]] = {}
        cheap: dict[int, list[NDArray[np.uint32]]] = {}
        for part in parts:
            for length, text in part.items():
                table = np.frombuffer(bytes.fromhex(text), dtype=[("cheap", "<u4"), ("keyed", "V8")])
                cheap.setdefault(int(length), []).append(table["cheap"])
                keyed.setdefault(int(length), set()).update(each.tobytes() for each in table["keyed"])
        self._keyed = keyed
        self._cheap = {length: np.unique(np.concatenate(tables)) for length, tables in cheap.items()}

    @property
    def longest(self) -> int:
        """Bytes of the longest window; 0 where there is none."""
        return max(self._keyed, default=0)

    def excuse(self, data: bytes) -> None:
        """Look no longer for what stands in these bytes: they may be there."""
        for at in self.find(data):
            for length, group in self._keyed.items():
                group.discard(_keyed(data[at : at + length], self._key))

    def find(self, data: bytes) -> list[int]:
        """Offsets at which one of the windows stands."""
        found: list[int] = []
        raw = np.frombuffer(data, dtype=np.uint8)
        for length, group in self._keyed.items():
            if group and len(raw) >= length:
                candidates = np.flatnonzero(np.isin(_rolling(raw, length), self._cheap[length]))
                found.extend(
                    int(at) for at in candidates if _keyed(data[int(at) : int(at) + length], self._key) in group
                )
        return sorted(found)


def records_of(text: str) -> Iterator[bytes]:
    """The hashes of a report's chunk records."""
    data = bytes.fromhex(text)
    return (data[start : start + RECORD_DIGEST] for start in range(0, len(data), RECORD_DIGEST))


def _keyed(window: bytes, key: bytes) -> bytes:
    return hashlib.blake2b(window, digest_size=8, key=key).digest()


def _rolling_of(group: list[bytes], length: int) -> NDArray[np.uint32]:
    """The rolling hash of each of these windows."""
    table = np.frombuffer(b"".join(group), dtype=np.uint8).reshape(len(group), length)
    weighted = (table.astype(np.uint64) + np.uint64(1)) * _powers(_FACTOR, length)
    values: NDArray[np.uint64] = weighted.sum(axis=1, dtype=np.uint64)
    return (values >> np.uint64(32)).astype(np.uint32)


def _rolling(raw: NDArray[np.uint8], length: int) -> NDArray[np.uint32]:
    """A hash of 4 bytes of every stretch of ``length`` bytes of ``raw``, modulo 2^64 on the way."""
    powers = _powers(_FACTOR, len(raw) + 1)
    sums = np.zeros(len(raw) + 1, dtype=np.uint64)
    np.cumsum((raw.astype(np.uint64) + np.uint64(1)) * powers[:-1], out=sums[1:])
    count = len(raw) - length + 1
    values = (sums[length:] - sums[:count]) * _powers(_INVERSE, count)
    return (values >> np.uint64(32)).astype(np.uint32)


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    """base^0, base^1, ... modulo 2^64."""
    powers = np.full(count, base, dtype=np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


# looking for it in a store


def report_is_absent(room: Room, check: CatalogCheck, report: ForgetReport) -> tuple[list[Problem], int]:
    """What a store still has of what a report says was forgotten.

    Returns:
        problems, and how many of the report's contents other documents hold and so may stay.

    Raises:
        StoreError: the report is of another store.
    """
    if report.store_id != room.layout.store_id:
        raise StoreError(
            f"{room.folder}: the report is of store {report.store_id}, this one is {room.layout.store_id}; "
            "check the report against its own store"
        )
    live = {piece.content for pieces in check.pieces.values() for piece in pieces}
    wanted = {content.digest for content in report.contents}
    same = [row for row in check.contents.values() if row.digest.hex() in wanted]
    problems = [
        Problem("present", f"catalog.sqlite, content {row.id}", "forgotten, but on the disk until the next `compact`")
        for row in same
        if row.id not in live
    ]
    records = {record for content in report.contents for record in records_of(content.records)}
    sought = Sought((content.windows for content in report.contents), bytes.fromhex(report.key))
    with room.catalog.snapshot() as snapshot:
        for number in live & check.texts:
            text = snapshot.text(number)
            records.difference_update(records_of(text.records.hex()))
            for stretch in _stretches(text):
                sought.excuse(stretch)
    for document in check.documents.values():
        for value in (document.name, document.source or "", document.metadata):
            sought.excuse(value.encode())
    if records:
        problems += _in_data_files(room, check, records)
    problems += _in_other_files(room, check, sought)
    return problems, sum(row.id in live for row in same)


def text_is_absent(room: Room, check: CatalogCheck, text: str) -> list[Problem]:
    """Where a store still has a text: documents, contents of no document, and bytes of its files.

    Raises:
        StoreError: the text is empty.
    """
    if not text:
        raise StoreError("the text that should be absent is empty; give some characters of it")
    windows = cut_windows(text.encode()) if len(text.encode()) >= WINDOW else [text.encode()]
    tokenizer = room.find_tokenizer()
    if tokenizer is not None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        inner = ids[1:-1] if len(ids) > 4 else ids  # at its ends a text is cut into tokens by what stands beside it
        windows += cut_windows(np.array(inner, dtype="<u4").tobytes())
    key = b"text"
    sought = Sought([hashed(windows, key)], key)
    holders: dict[int, list[DocumentRow]] = {}
    for number, pieces in check.pieces.items():
        for piece in pieces:
            if number in check.documents:
                holders.setdefault(piece.content, []).append(check.documents[number])
    problems = []
    with room.catalog.snapshot() as snapshot:
        for number in check.texts:
            if any(sought.find(stretch) for stretch in _stretches(snapshot.text(number))):
                for document in holders.get(number, []):
                    where = f"document {document.name!r} ({document.namespace})"
                    problems.append(Problem("present", where, "has this text, or a part of it"))
                if number not in holders:
                    what = "of no document has this text, or a part of it, until the next `compact`"
                    problems.append(Problem("present", f"catalog.sqlite, content {number}", what))
    return problems + _in_other_files(room, check, sought)


def _stretches(row: TextRow) -> list[bytes]:
    return [row.token_ids] if row.text is None else [row.token_ids, row.text.encode()]


def _in_data_files(room: Room, check: CatalogCheck, records: set[bytes]) -> list[Problem]:
    """Data files with one of these chunk records."""
    problems = []
    for row in check.files.values():
        path = room.segments / file_name(row.id)
        begin, shape, _ = Arrangement(row.id, row.chunks, room.layout).arrays["kv"]
        size = room.layout.record_bytes
        found = 0
        with suppress(FileNotFoundError), path.open("rb") as stream:
            stream.seek(begin)
            for _ in range(shape[0]):
                found += hashlib.blake2b(stream.read(size), digest_size=RECORD_DIGEST).digest() in records
        if found:
            what = f"{found} chunks that were forgotten, until the next `compact`"
            problems.append(Problem("present", f"segments/{path.name}", what))
    return problems


def _in_other_files(room: Room, check: CatalogCheck, sought: Sought) -> list[Problem]:
    """Files, other than data files that the catalog knows, with one of the windows."""
    problems = []
    found = sum(len(sought.find(data)) for _, data in room.catalog.file.slabs(sought.longest))
    if found:
        what = f"{found} stretches of it stand in the file, until the next `compact`"
        problems.append(Problem("present", room.catalog.path.name, what))
    # not the -shm file, which holds no text and on which SQLite keeps its locks
    others = [room.folder / f"{room.catalog.path.name}-wal", *room.staging.glob("*"), *room.segments.glob("*")]
    known = {room.segments / file_name(name) for name in check.files}
    for path in others:
        if path in known:
            continue
        with suppress(FileNotFoundError), file_errors(path, "reading"):
            if sought.find(path.read_bytes()):
                problems.append(Problem("present", path.name, "stretches of it stand in the file"))
    return problems
