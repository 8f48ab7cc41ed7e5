"""From the arguments of ``longmem memory add`` to the documents that it adds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longmem.cli.memory.options import expiry, moment
from longmem.errors import DataError, StoreError

if TYPE_CHECKING:
    from longmem.data.text import Document
    from longmem.store.records import NewDocument

STDIN = "-"


@dataclass(frozen=True)
class Given:
    """What the options say of every document."""

    name: str | None
    prefix: str
    source: str | None
    metadata: dict[str, Any] | None
    keep: tuple[str, ...]
    time: float | None
    expires: float | None
    replace: bool


def read(paths: tuple[str, ...], name: str | None, lines: bool, settings: dict[str, Any]) -> Iterator[Document]:
    """The texts that the arguments name.

    Args:
        paths: files, folders, archives, patterns, ``-``.
        name: of a text from standard input.
        lines: whether standard input is JSON lines.
        settings: fields of ``TextSource``.

    Raises:
        DataError: something is missing, empty or not UTF-8; in the words of the options.
        StoreError: standard input is asked for twice, or has no name.
    """
    from longmem.data.text import HUB, TextSource, WaysOut, read_documents, read_stream

    if paths.count(STDIN) > 1:
        raise StoreError("- stands for standard input, which can be read once; leave the others out")
    if STDIN in paths and not lines and name is None:
        raise StoreError("a text from standard input needs a --name (or --jsonl, if it is JSON lines)")
    files = tuple(each if each.startswith(HUB) else str(Path(each).absolute()) for each in paths if each != STDIN)
    ways_out = WaysOut(
        undecodable="convert it, exclude it, or pass --undecodable skip or replace",
        line="mend the line, or pass --undecodable skip",
        suffixes="name others with --suffix",
        field="name it with --field",
    )
    settings = {**settings, "ways_out": ways_out}
    if files:
        yield from read_documents(TextSource(files, **settings))
    if STDIN in paths:
        yield from read_stream(sys.stdin.buffer, STDIN if lines else name or STDIN, lines=lines, **settings)


def new_documents(documents: Iterator[Document], given: Given) -> Iterator[NewDocument]:
    """Texts with what the options and their own JSON say of them; the options win.

    Raises:
        DataError: a line of JSON has metadata that are no object, or a time that is none.
    """
    from longmem.store.records import NewDocument

    for document in documents:
        record = document.record
        try:
            metadata = {**_object(record.get("metadata")), **{key: record[key] for key in given.keep if key in record}}
            said = given.time if given.time is not None else _optional(moment, record.get("time"))
            expires = given.expires if given.expires is not None else _optional(expiry, record.get("expires"))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{document.place}: metadata must be an object, time and expires dates or seconds ({error})"
            ) from error
        yield NewDocument(
            name=given.prefix + (given.name or document.id),
            text=document.text,
            source=given.source or record.get("source") or document.source,
            metadata={**metadata, **(given.metadata or {})} or None,
            time=said,
            expires=expires,
            replace=given.replace,
        )


def _object(value: object) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{value!r:.60} is none")
    return value


def _optional(read: Any, value: object) -> float | None:
    return None if value is None else float(read(value))


def first_of(found: Iterator[NewDocument], name: str | None) -> list[NewDocument]:
    """The first document; the second one too where a name was given, which must be for one alone."""
    documents = list(islice(found, 1 if name is None else 2))
    if not documents:
        raise DataError("no text was left to add; see --include and --exclude")
    if len(documents) > 1:
        raise StoreError(f"--name ({name}) is for one text, and more came; leave it out, or add them one by one")
    return documents
