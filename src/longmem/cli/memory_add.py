"""``longmem memory add`` and ``append``: files, folders, JSON lines, archives and standard input into a store."""

from __future__ import annotations

import json
import logging
import sys
import time as clock
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longmem.cli.common import ShownProgress, counted, layout_of, load_model, load_tokenizer, say
from longmem.cli.options import EXPIRY, MOMENT, expiry, key_values, moment, options
from longmem.errors import DataError, LongMemError, StoreError

if TYPE_CHECKING:
    from longmem.data.text import Document
    from longmem.store.records import NewDocument, Receipt, Report
    from longmem.store.store import MemoryStore

log = logging.getLogger(__name__)
DTYPES = ("float16", "bfloat16", "float32", "int8")
STDIN = "-"

_READING: Any = [
    click.option("--jsonl", is_flag=True, help="Standard input is JSON lines, not one text."),
    click.option("--field", default="text", help="The text in JSON lines."),
    click.option("--include", multiple=True, metavar="PATTERN", help="Take only these names; repeatable."),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave these names out; repeatable."),
    click.option("--suffix", multiple=True, help="What counts as text in folders; repeatable. Default: .txt ..."),
    click.option(
        "--undecodable", type=click.Choice(["error", "skip", "replace"]), default="error",
        help="What becomes of files and JSON lines that are not UTF-8; skip leaves out any line that cannot be read.",
    ),
    click.option("--batch-tokens", type=click.IntRange(min=1), help="Tokens that go through the backbone together."),
]  # fmt: skip


def _reading(function: Any) -> Any:
    for option in reversed(_READING):
        function = option(function)
    return function


@click.command(
    epilog="Example: longmem memory add notes/ chat.jsonl --model models/small/sidenet --namespace ada --expires 90d"
)
@click.argument("paths", nargs=-1, required=True)
@options("store", "namespace", "model", "backbone", "device", "tokenizer")
@click.option("--name", help="Of the document, if it is a single one; needed for a text from standard input.")
@click.option("--prefix", default="", help="Put before every document's name.")
@click.option(
    "--metadata", multiple=True, metavar="KEY=VALUE", callback=key_values, help="Or a JSON object; repeatable."
)
@click.option("--source", help="Where the text came from; default: its path.")
@click.option("--time", type=MOMENT, help="When it was said; documents are in this order. Default: now.")
@click.option("--expires", type=EXPIRY, help="From when on it is not found any more: 30d, 12h, or a date.")
@click.option("--replace", is_flag=True, help="Take the place of other texts of the same names.")
@click.option("--append", is_flag=True, help="Go on with the documents of the same names; new ones are made.")
@click.option("--keep", multiple=True, metavar="FIELD", help="A field of JSON lines to keep as metadata; repeatable.")
@_reading
@click.option("--dtype", type=click.Choice(DTYPES), help="Of keys and values, in a new store. Default: float16.")
@click.option(
    "--chunk-size", type=click.IntRange(min=1), help="Tokens per chunk, in a new store. Default: the model's."
)
@click.option(
    "--segment", "segment_tokens", type=click.IntRange(min=1),
    help="Tokens read at once, in a new store. Default: the model's window, at most 1024.",
)  # fmt: skip
@click.option("--workers", default="1", metavar="N|ray|ray:N", help="Processes that encode, or actors of Ray.")
@options("json")
def add(paths: tuple[str, ...], path: Path, namespace: str, as_json: bool, **given: Any) -> None:
    """Remember texts, each as a document.

    PATHS are files, folders (read with all below them), .jsonl files, tar and zip archives, any of these compressed
    (.gz, .xz, .bz2), patterns, or - for standard input. A file is named by its path within the folder that was given.
    A line of JSON has its text in "text" and may have "id" (the name), "source", "metadata" (an object), "time" and
    "expires".

    What is there already is not encoded again. An interrupted call loses nothing that it has reported; the same call
    again goes on where it stopped. A document is there whole or not at all.
    """
    if given["replace"] and given["append"]:
        raise StoreError("--replace and --append contradict each other; choose one")
    if given["append"] and given["workers"] != "1":
        raise StoreError("--append encodes one document at a time, in one process; leave --workers out")
    unused = [f"--{key}" for key in ("metadata", "keep", "source", "time", "expires") if given["append"] and given[key]]
    if unused:
        raise StoreError(f"--append leaves all but the text as it is; leave {', '.join(unused)} out, or add without it")
    _add(paths, path, namespace, as_json, given)


@click.command(epilog="Example: cat today.txt | longmem memory append - --name diary --model models/small/sidenet")
@click.argument("paths", nargs=-1, required=True)
@options("store", "namespace", "model", "backbone", "device", "tokenizer")
@click.option("--name", help="Of the document; default: the file's.")
@_reading
@options("json")
def append(paths: tuple[str, ...], path: Path, namespace: str, as_json: bool, **given: Any) -> None:
    """Remember more of documents that are there.

    The texts of PATHS are put after those of the documents of their names, as if both had been added at once. The same
    as add --append.
    """
    _add(paths, path, namespace, as_json, {**given, "append": True})


def _add(paths: tuple[str, ...], path: Path, namespace: str, as_json: bool, given: dict[str, Any]) -> None:
    from longmem.store.store import MemoryStore

    name, workers, appending = given["name"], given.get("workers", "1"), given.get("append", False)
    found = _new_documents(_read(paths, given), namespace, given)
    first = list(islice(found, 1 if name is None else 2))  # before the model: wrong paths show at once
    if not first:
        raise DataError("no text was left to add; see --exclude and --undecodable")
    if len(first) > 1:
        raise StoreError(f"--name ({name}) is for one text, and more came; leave it out, or add them one by one")
    loaded = load_model(given["model"], layout_of(path, writing=True), given["device"], given["backbone"])
    names = ("dtype", "chunk_size", "segment_tokens", "batch_tokens")
    settings: dict[str, Any] = {each: given.get(each) for each in names}
    words = load_tokenizer(given["tokenizer"], loaded)
    with (
        MemoryStore.open(path, model=loaded.model, tokenizer=words, **settings) as store,
        ShownProgress() as progress,
        _Printed(namespace, as_json, appending) as printed,
    ):
        documents = chain(first, found)
        if appending:
            receipts = _appended(store, namespace, documents, progress)
        else:
            number = int(workers) if workers.isdigit() else workers
            receipts = store.add_documents(namespace, documents, workers=number, progress=progress)
        for receipt in receipts:
            printed.show(receipt)


def _read(paths: tuple[str, ...], given: dict[str, Any]) -> Iterator[Document]:
    """The texts that the arguments name.

    Raises:
        DataError: something is missing, empty or not UTF-8; in the words of the options.
        StoreError: standard input is asked for twice, or has no name.
    """
    from longmem.data.text import TextSource, WaysOut, read_documents, read_stream

    name, lines = given["name"], given["jsonl"]
    if paths.count(STDIN) > 1:
        raise StoreError("- stands for standard input, which can be read once; leave the others out")
    if STDIN in paths and not lines and name is None:
        raise StoreError("a text from standard input needs a --name (or --jsonl, if it is JSON lines)")
    settings = {each: given[each] for each in ("include", "exclude", "field", "undecodable")}
    if given["suffix"]:
        settings["suffixes"] = tuple(each if each.startswith(".") else f".{each}" for each in given["suffix"])
    settings["ways_out"] = WaysOut(
        undecodable="convert it, exclude it, or pass --undecodable skip or replace",
        line="mend the line, or pass --undecodable skip",
        suffixes="name others with --suffix",
        field="name it with --field",
    )
    if files := tuple(each for each in paths if each != STDIN):
        yield from read_documents(TextSource(files, **settings))
    if STDIN in paths:
        yield from read_stream(sys.stdin.buffer, STDIN if lines else name or STDIN, lines=lines, **settings)


def _new_documents(documents: Iterator[Document], namespace: str, given: dict[str, Any]) -> Iterator[NewDocument]:
    """Texts with what the options and their own JSON say of them; the options win.

    Raises:
        DataError: what a line of JSON says cannot be used.
    """
    from longmem.store.room import check_names

    for document in documents:
        try:
            new = _new_document(document, given)
            check_names(namespace, new)
        except (ValueError, TypeError, OverflowError, StoreError) as error:
            if not document.record:
                raise
            fault = (
                f"{document.place}: {error}"
                if isinstance(error, StoreError)
                else (f"{document.place}: metadata must be an object, time and expires dates or seconds ({error})")
            )
            if given["undecodable"] != "skip":
                raise DataError(f"{fault}; mend the line, or pass --undecodable skip") from error
            log.warning("%s; skipped", fault)
        else:
            yield new


def _new_document(document: Document, given: dict[str, Any]) -> NewDocument:
    from longmem.store.records import NewDocument

    record = document.record
    metadata = {} if record.get("metadata") is None else record["metadata"]
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata are {metadata!r:.60}")
    kept = {key: record[key] for key in given.get("keep", ()) if key in record}
    moments: dict[str, Any] = {
        key: read(record[key]) if given.get(key) is None and record.get(key) is not None else given.get(key)
        for key, read in (("time", moment), ("expires", expiry))
    }
    return NewDocument(
        name=given.get("prefix", "") + (given["name"] or document.id),
        text=document.text,
        source=given.get("source") or str(record.get("source") or document.source),
        metadata={**metadata, **kept, **(given.get("metadata") or {})} or None,
        replace=given.get("replace", False),
        **moments,
    )


def _appended(
    store: MemoryStore, namespace: str, documents: Iterable[NewDocument], progress: Report
) -> Iterator[Receipt]:
    for new in documents:
        try:
            store.document(namespace, new.name)
        except StoreError:  # a new one
            yield from store.add_documents(namespace, [new], progress=progress)
        else:
            yield store.append(namespace, new.text, name=new.name, progress=progress)


class _Printed:
    """Receipts as they come: a line for each, or items of one JSON document; at the end the sum."""

    def __init__(self, namespace: str, as_json: bool, appending: bool) -> None:
        self._namespace, self._as_json, self._appending = namespace, as_json, appending
        self._counts: Counter[str] = Counter()
        self._tokens = self._reused = 0
        self._begun = clock.monotonic()

    def __enter__(self) -> _Printed:
        if self._as_json:
            click.echo(f'{{"namespace": {json.dumps(self._namespace, ensure_ascii=False)}, "documents": [', nl=False)
        return self

    def show(self, receipt: Receipt) -> None:
        """A document that is durable now."""
        first = not self._counts
        self._counts[receipt.status] += 1
        self._tokens += receipt.tokens
        self._reused += receipt.reused_tokens
        if self._as_json:
            line = json.dumps(asdict(receipt), ensure_ascii=False)
            click.echo(f"{'' if first else ','}\n {line}", nl=False)
        else:
            print_receipt(receipt)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if self._as_json:
            end = {"tokens": self._tokens, "reused_tokens": self._reused, "complete": error is None}
            click.echo(f"\n], {json.dumps(end)[1:]}")
        number = counted(sum(self._counts.values()), "document")
        if error is None:
            kinds = ", ".join(f"{count:,} {status}" for status, count in self._counts.items())
            rate = self._tokens / max(1e-9, clock.monotonic() - self._begun)
            known = f", {self._reused:,} of them known before" if self._reused else ""
            say(f"{number} ({kinds}): {counted(self._tokens, 'token')}{known}; {rate:,.0f} tokens/s")
        elif isinstance(error, KeyboardInterrupt | LongMemError):
            # appended twice would be there twice
            again = "append the others" if self._appending else "the same command again goes on from there"
            say(f"{number} stored whole before this; {again}")


def print_receipt(receipt: Receipt) -> None:
    """A line for a document."""
    click.echo(f"{receipt.status:<9}  {counted(receipt.tokens, 'token'):>16}  {receipt.name}")
