"""``longmem memory add``: files, folders, JSON lines, archives and standard input into a store."""

from __future__ import annotations

import json
import time as clock
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longmem.cli.memory.opening import layout_of, load_model, load_tokenizer, say
from longmem.cli.memory.options import (
    EXPIRY,
    MOMENT,
    json_option,
    key_values,
    model_options,
    namespace_option,
    store_option,
    tokenizer_option,
)
from longmem.cli.memory.printing import ShownProgress, as_plain, counted
from longmem.cli.memory.reading import Given, first_of, new_documents, read
from longmem.errors import LongMemError, StoreError

if TYPE_CHECKING:
    from longmem.store.records import NewDocument, Receipt, Report
    from longmem.store.store import MemoryStore
    from longmem.store.workers import Workers

DTYPES = ("float16", "bfloat16", "float32", "int8")


@click.command(
    epilog="Example: longmem memory add notes/ chat.jsonl --model models/small/sidenet --namespace ada --expires 90d",
)
@click.argument("paths", nargs=-1, required=True)
@store_option
@namespace_option
@model_options
@tokenizer_option
@click.option("--name", help="Of the document, where it is one; needed for a text from standard input.")
@click.option("--prefix", default="", help="Put before every document's name.")
@click.option(
    "--metadata", multiple=True, metavar="KEY=VALUE", callback=key_values, help="Or a JSON object; repeatable."
)
@click.option("--source", help="Where the text came from; default: its path.")
@click.option("--time", "said", type=MOMENT, help="When it was said; documents are in this order. Default: now.")
@click.option("--expires", type=EXPIRY, help="When nobody is to find it any more: 30d, 12h, or a date.")
@click.option("--replace", is_flag=True, help="Take the place of other texts of the same names.")
@click.option("--append", is_flag=True, help="Go on with the documents of the same names; new ones are made.")
@click.option("--jsonl", is_flag=True, help="Standard input is JSON lines, not one text.")
@click.option("--field", default="text", show_default=True, help="The text in JSON lines.")
@click.option("--keep", multiple=True, metavar="FIELD", help="A field of JSON lines to keep as metadata; repeatable.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Take only these names; repeatable.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave these names out; repeatable.")
@click.option(
    "--suffix", multiple=True, help="What counts as text in folders and archives; repeatable. Default: .txt ..."
)
@click.option(
    "--undecodable",
    type=click.Choice(["error", "skip", "replace"]),
    default="error",
    show_default=True,
    help="What becomes of a file that is not UTF-8.",
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Of keys and values, in a new store. Default: float16.")
@click.option(
    "--chunk-size", type=click.IntRange(min=1), help="Tokens per chunk, in a new store. Default: the model's."
)
@click.option(
    "--segment", "segment_tokens", type=click.IntRange(min=1), help="Tokens read at once, in a new store. Default: the "
    "model's window, at most 1024.",
)  # fmt: skip
@click.option("--batch-tokens", type=click.IntRange(min=1), help="Tokens that go through the backbone together.")
@click.option(
    "--workers",
    metavar="N|ray|ray:N",
    help="Processes that encode; or actors of a Ray cluster. Under torchrun its ranks do. Default: 1.",
)
@json_option
def add(
    paths: tuple[str, ...],
    path: Path,
    namespace: str,
    model: str | None,
    tokenizer: str | None,
    device: str,
    name: str | None,
    prefix: str,
    metadata: dict[str, Any] | None,
    source: str | None,
    said: float | None,
    expires: float | None,
    replace: bool,
    append: bool,
    jsonl: bool,
    field: str,
    keep: tuple[str, ...],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    suffix: tuple[str, ...],
    undecodable: str,
    dtype: str | None,
    chunk_size: int | None,
    segment_tokens: int | None,
    batch_tokens: int | None,
    workers: str | None,
    as_json: bool,
) -> None:
    """Remember texts, each as a document.

    PATHS are files, folders (read with what lies below), .jsonl files, tar archives, patterns, or - for standard
    input. A file is named by its path within the folder that was given. A line of JSON has its text in "text" and may
    have "id" (the name), "source", "metadata" (an object), "time" and "expires".

    What is there already is not encoded again. An interrupted call loses nothing that it has reported; the same
    call again goes on where it stopped. A document is there whole or not at all.
    """
    from longmem.store.store import MemoryStore

    if replace and append:
        raise StoreError("--replace and --append contradict each other; choose one")
    given = Given(name, prefix, source, metadata, keep, said, expires, replace)
    settings = {"include": include, "exclude": exclude, "field": field, "undecodable": undecodable}
    if suffix:
        settings["suffixes"] = tuple(each if each.startswith(".") else f".{each}" for each in suffix)
    with _encoders(workers, append) as encoders:
        if encoders is None:
            return
        found = new_documents(read(paths, name, jsonl, settings), given)
        first = first_of(found, name)  # before the model: wrong paths show at once
        layout = layout_of(path, writing=True)
        loaded = load_model(model, layout, device)
        with MemoryStore.open(
            path,
            model=loaded.model,
            tokenizer=load_tokenizer(tokenizer, loaded.tokenizer),
            dtype=dtype,  # type: ignore[arg-type]
            chunk_size=chunk_size,
            segment_tokens=segment_tokens,
            batch_tokens=batch_tokens,
        ) as store:
            documents = chain(first, found)
            with ShownProgress() as progress, _Printed(namespace, as_json, append) as printed:
                if append:
                    receipts = _appended(store, namespace, documents, progress)
                else:
                    receipts = store.add_documents(namespace, documents, workers=encoders, progress=progress)
                for receipt in receipts:
                    printed.show(receipt)


@contextmanager
def _encoders(workers: str | None, append: bool) -> Iterator[int | str | Workers | None]:
    """Whoever encodes; None in a process of torchrun that has done so for the first one."""
    from longmem.store.ranks import Ranks, under_torchrun
    from longmem.store.workers import workers_from

    started = under_torchrun()
    if append and (started or workers not in (None, "1")):
        raise StoreError("--append encodes one document at a time, in one process; leave --workers and torchrun away")
    if workers is not None and started:
        raise StoreError("under torchrun its ranks encode; leave --workers away")
    if not started:
        workers_from(workers or 1)  # before the model: a wrong value shows at once
        yield workers or 1
        return
    with Ranks() as ranks:
        if ranks.first:
            yield ranks
        else:
            ranks.serve()
            yield None


def _appended(
    store: MemoryStore, namespace: str, documents: Iterable[NewDocument], progress: Report
) -> Iterator[Receipt]:
    have = {info.name for info in store.documents(namespace)}
    for new in documents:
        if new.name in have:
            yield store.append(namespace, new.text, name=new.name, progress=progress)
        else:
            have.add(new.name)
            yield from store.add_documents(namespace, [new], progress=progress)


# printing


class _Printed:
    """Receipts as they come: a line for each, or items of one JSON document; at the end what all of it was."""

    def __init__(self, namespace: str, as_json: bool, append: bool) -> None:
        self._namespace = namespace
        self._as_json = as_json
        self._append = append
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
            line = json.dumps(as_plain(receipt), ensure_ascii=False)
            click.echo(f"{'' if first else ','}\n {line}", nl=False)
        else:
            click.echo(f"{receipt.status:<9}  {counted(receipt.tokens, 'token'):>16}  {receipt.name}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if self._as_json:
            end = {"tokens": self._tokens, "reused_tokens": self._reused, "complete": error is None}
            click.echo(f"\n], {json.dumps(end)[1:]}")
        number = sum(self._counts.values())
        if error is None:
            kinds = ", ".join(f"{count:,} {status}" for status, count in self._counts.items())
            rate = self._tokens / max(1e-9, clock.monotonic() - self._begun)
            known = f", {self._reused:,} of them known before" if self._reused else ""
            what = f"{counted(number, 'document')} ({kinds}): {counted(self._tokens, 'token')}{known}"
            say(f"{what}; {rate:,.0f} tokens/s")
        elif isinstance(error, KeyboardInterrupt | LongMemError):
            again = "append the others" if self._append else "the same command again goes on from there"
            say(f"{counted(number, 'document')} stored whole before this; {again}")
