"""``longmem memory``: a store of texts that a model remembers."""

from __future__ import annotations

import logging
import sys
import time as clock
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from longmem.cli import common as shared
from longmem.cli.common import AT_LEAST_1, FOLDER, ShownProgress, check_namespace, counted, options, say, show
from longmem.errors import DataError, LongMemError, StoreError

if TYPE_CHECKING:
    from longmem.data.text import Document
    from longmem.store import NewDocument

log = logging.getLogger(__name__)
STDIN = "-"


@click.group()
def command() -> None:
    """Keep texts that a model remembers: add, look up, search, forget, check.

    A store is a folder (--store, or LONGMEM_STORE). It holds namespaces, and these hold documents that no other
    namespace sees. Only adding, searching and some repairs need the model (--model, or LONGMEM_MODEL).

    \b
    longmem memory add notes/ --model models/small/sidenet
    longmem memory search "where is the key" --model models/small/sidenet
    longmem memory forget --name old.txt
    longmem memory compact
    """


# adding


@command.command(
    epilog="Example: longmem memory add notes/ chat.jsonl --model models/small/sidenet --namespace ada --expires 90d"
)
@click.argument("paths", nargs=-1, required=True)
@options("store", "namespace", "model", "backbone", "device", "tokenizer")
@click.option("--name", help="Of the document, if it is a single one; needed for a text from standard input.")
@click.option("--prefix", default="", help="Put before every document's name.")
@options("metadata")
@click.option("--time", type=shared.MOMENT, help="When it was said; documents are in this order. Default: now.")
@click.option("--expires", type=shared.EXPIRY, help="From when on it is not found any more: 30d, 12h, or a date.")
@click.option("--replace", is_flag=True, help="Take the place of other texts of the same names.")
@click.option("--jsonl", is_flag=True, help="Standard input is JSON lines, not one text.")
@click.option("--field", default="text", help="The text in JSON lines.")
@click.option("--keep", multiple=True, metavar="FIELD", help="A field of JSON lines to keep as metadata; repeatable.")
@click.option("--suffix", multiple=True, help="Of text in folders; repeatable. Default: .txt .md .rst .tex .py")
@click.option("--include", multiple=True, metavar="PATTERN", help="Take only these names; repeatable.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave these names out; repeatable.")
@click.option(
    "--undecodable", type=click.Choice(["error", "skip", "replace"]), default="error",
    help="What becomes of files and JSON lines that are not UTF-8; skip leaves out any line that cannot be read.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["float16", "bfloat16", "float32", "int8"]),
    help="Of keys and values, in a new store. Default: float16.",
)  # fmt: skip
@click.option("--workers", default="1", metavar="N|ray|ray:N", help="Processes that encode, or actors of Ray.")
@options("json")
def add(paths: tuple[str, ...], namespace: str, name: str | None, as_json: bool, **given: Any) -> None:
    """Remember texts, each as a document.

    PATHS are files, folders (read with all below them), .jsonl files, tar and zip archives, any of these compressed
    (.gz, .xz, .bz2), patterns, or - for standard input. A file is named by its path within the folder that was given.
    A line of JSON has its text in "text" and may have "id" (the name), "source", "metadata" (an object), "time" and
    "expires".

    What is there already is not encoded again. An interrupted call loses nothing that it has reported; the same call
    again goes on where it stopped. A document is there whole or not at all.
    """
    documents = _new_documents(_read(paths, name, given), namespace, name, given)
    first = list(islice(documents, 1 if name is None else 2))  # before the model: wrong paths show at once
    if not first:
        raise DataError("no text was left to add; see --exclude and --undecodable")
    if len(first) > 1:
        raise StoreError(f"--name ({name}) is for one text, and more came; leave it out, or add them one by one")
    workers = int(given["workers"]) if given["workers"].isdigit() else given["workers"]
    receipts, begun, complete = [], clock.monotonic(), False
    with shared.open_with_model(given, create=True, dtype=given["dtype"]) as store, ShownProgress() as progress:
        try:
            texts = chain(first, documents)
            for receipt in store.add_documents(namespace, texts, workers=workers, progress=progress):
                receipts.append(receipt)
                if not as_json:
                    click.echo(f"{receipt.status:<9}  {counted(receipt.tokens, 'token'):>16}  {receipt.name}")
            complete = True
        except (KeyboardInterrupt, LongMemError):
            stored = counted(len(receipts), "document")
            say(f"{stored} stored whole before this; the same command again goes on from there")
            raise
        finally:
            tokens = sum(each.tokens for each in receipts)
            if as_json:
                result = {"namespace": namespace, "documents": receipts, "tokens": tokens, "complete": complete}
                shared.print_json(result)
    kinds = ", ".join(f"{count:,} {status}" for status, count in Counter(each.status for each in receipts).items())
    rate = tokens / (clock.monotonic() - begun)
    say(f"{counted(len(receipts), 'document')} ({kinds}): {counted(tokens, 'token')}; {rate:,.0f} tokens/s")


def _read(paths: tuple[str, ...], name: str | None, given: dict[str, Any]) -> Iterator[Document]:
    """The texts that the arguments name; what is missing or not UTF-8 is a DataError in the words of the options."""
    from longmem.data.text import TextSource, read_documents, read_stream

    if STDIN in paths and not given["jsonl"] and name is None:
        raise StoreError("a text from standard input needs a --name (or --jsonl, if it is JSON lines)")
    settings = {each: given[each] for each in ("include", "exclude", "field", "undecodable")}
    settings["option"] = "pass --{} {}"
    if given["suffix"]:
        settings["suffixes"] = tuple(f".{each.removeprefix('.')}" for each in given["suffix"])
    if files := tuple(each for each in paths if each != STDIN):
        yield from read_documents(TextSource(files, **settings))
    if STDIN in paths:
        yield from read_stream(sys.stdin.buffer, name or STDIN, lines=given["jsonl"], **settings)


def _new_documents(
    documents: Iterator[Document], namespace: str, name: str | None, given: dict[str, Any]
) -> Iterator[NewDocument]:
    """Texts with what the options and their own JSON say of them; the options win.

    A line of JSON that says what cannot be used is a DataError, or left out with ``--undecodable skip``.
    """
    from longmem.store import NewDocument

    def when(key: str, read: Callable[[object], float]) -> Any:
        return given[key] if given[key] is not None or record.get(key) is None else read(record[key])

    for document in documents:
        record = document.record
        try:
            kept = {key: record[key] for key in given["keep"] if key in record}
            new = NewDocument(
                name=given["prefix"] + (name or document.id),
                text=document.text,
                source=str(record.get("source") or document.source),
                metadata={**dict(record.get("metadata") or {}), **kept, **(given["metadata"] or {})} or None,
                time=when("time", shared.moment),
                expires=when("expires", shared.expiry),
                replace=given["replace"],
            )
            new.check(namespace)
        except (ValueError, TypeError, OverflowError, StoreError) as error:
            if not record:
                raise
            fault = f"{document.place}: {error}"
            if not isinstance(error, StoreError):
                fault = f"{document.place}: metadata must be an object, time and expires dates or seconds ({error})"
            if given["undecodable"] != "skip":
                raise DataError(f"{fault}; mend the line, or pass --undecodable skip") from error
            log.warning("%s; skipped", fault)
        else:
            yield new


# looking


@command.command("list", epilog="Example: longmem memory list --namespace ada --where draft=true")
@options("store", "any_namespace", "where", "older_than", "before")
@click.option("--namespaces", "summary", is_flag=True, help="List the namespaces instead, whatever is in them.")
@options("json")
def list_(path: Path, namespace: str | None, summary: bool, as_json: bool, **conditions: Any) -> None:
    """List documents, oldest first; forget takes the same conditions."""
    where, before = conditions["where"], shared.edge(conditions)
    if summary and (where or before is not None):
        raise click.UsageError("--namespaces lists whole namespaces; leave out --where, --older-than and --before")
    with shared.open_store(path) as store:
        if namespace is not None:
            check_namespace(store, namespace)
        names = store.namespaces() if namespace is None else [namespace]
        if summary:
            stats = [{"namespace": name, **asdict(store.stats(name))} for name in names]
            show(as_json, {"namespaces": stats}, ("namespace", "documents", "tokens", "expired"))
            return
        listed = [info for name in names for info in store.documents(name, where)]
    found = [info for info in listed if before is None or info.added < before]
    show(as_json, {"documents": found}, ("namespace", "name", "tokens", "added", "expires", "metadata"))


@command.command("show", epilog="Example: longmem memory show notes.txt --text > notes.txt")
@click.argument("name")
@options("store", "namespace")
@click.option("--text", "with_text", is_flag=True, help="Print the text itself.")
@click.option("--tokenizer", help="Folder or hub id; to read a document that was added as token ids.")
@options("json")
def show_(path: Path, namespace: str, name: str, with_text: bool, tokenizer: str | None, as_json: bool) -> None:
    """Show a document: what is known of it, or its text."""
    from longmem.data.tokens import load_tokenizer

    with shared.open_store(path, tokenizer=load_tokenizer(tokenizer) if tokenizer else None) as store:
        known = asdict(store.document(namespace, name))
        text = {"text": store.text(namespace, name)} if with_text else {}
    if text and not as_json:
        click.echo(text["text"], nl=False)
    else:
        show(as_json, {**known, **text})


@command.command(epilog='Example: longmem memory search "where is the key" --model models/small/sidenet --top 5')
@click.argument("text", type=shared.TEXT)
@options("store", "namespace", "model", "backbone", "device", "tokenizer")
@click.option("--top", type=AT_LEAST_1, default=10, help="Chunks to show.")
@click.option("--around", type=click.IntRange(min=0), default=12, help="Tokens shown on each side.")
@click.option("--document", "documents", multiple=True, help="Only in this document; repeatable.")
@options("where")
@click.option("--after", type=shared.MOMENT, help="Only documents of this date or later.")
@options("before")
@options("json")
def search(text: str, namespace: str, documents: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Show which chunks the model's heads find for TEXT.

    TEXT - is read from standard input. Largest share first: the part of the heads' output that came from the chunk,
    the mean over TEXT's tokens and all heads. The score is the largest inner product of a query with the chunk's mean
    key. The chunk stands in [[ ]].
    """
    from longmem.data.text import read_stream

    query = next(read_stream(sys.stdin.buffer, "standard input")).text if text == STDIN else text
    if not query.strip():
        raise DataError("the text to search for is empty; say something")
    with shared.open_store(given["path"]) as store:  # before the model: a wrong name shows at once
        check_namespace(store, namespace)
    settings = {each: given[each] for each in ("where", "after", "before")}
    with shared.open_with_model(given, "read") as store:
        device = cast(Any, store.model).device
        bank = store.bank(namespace, documents=list(documents) or None, device=device, **settings)
        hits = bank.search_text(query, top=given["top"], around=given["around"])
    found = []
    for hit in hits:
        passage = f"{hit.passage.before}[[{hit.passage.text}]]{hit.passage.after}"
        numbers = {"share": hit.share, "score": hit.score, "passage": passage}
        found.append({**asdict(hit.origin), **asdict(hit.passage), **numbers})
    heads = ("share", "score", "document", "start_token", "time", "passage")
    show(as_json, {"query": query, "namespace": namespace, "hits": found}, heads)
    if not hits:
        say("nothing was found")


@command.command(epilog="Example: longmem memory stats --namespace ada")
@options("store", "any_namespace", "json")
def stats(path: Path, namespace: str | None, as_json: bool) -> None:
    """Show how much there is and what it takes.

    In the whole store, or in one namespace.
    """
    with shared.open_store(path) as store:
        if namespace is not None:
            check_namespace(store, namespace)
        found, layout = asdict(store.stats(namespace)), asdict(store.layout)
    show(as_json, {**found, "layout": layout} if as_json else {**found, **layout})


# forgetting and keeping


@command.command(epilog="Example: longmem memory forget --namespace ada --where draft=true --older-than 30d")
@options("store", "namespace")
@click.option("--name", help="This document.")
@options("where", "older_than", "before")
@click.option("--everything", is_flag=True, help="The whole namespace.")
@options("json")
def forget(path: Path, namespace: str, as_json: bool, **conditions: Any) -> None:
    """Forget documents of a namespace; all conditions given must hold.

    No search of any process finds them from now on. Their bytes leave the disk with `longmem memory compact`. Other
    namespaces are not touched, also where they hold the same text. `longmem memory list` with --where, --older-than or
    --before shows beforehand what these would forget.
    """
    conditions["before"] = shared.edge(conditions)
    del conditions["older_than"]
    with shared.open_store(path, "write") as store:
        found = store.forget(namespace, **conditions)
        if not found:
            check_namespace(store, namespace)
    forgotten = [{"name": each.name, "tokens": each.tokens} for each in found]
    tokens = sum(each.tokens for each in found)
    show(as_json, {"namespace": namespace, "tokens": tokens, "documents": forgotten}, ("name", "tokens"))
    after = "; `longmem memory compact` removes the bytes" if found else ""
    say(f"{counted(len(found), 'document')} of {namespace!r} forgotten{after}")


@command.command(epilog="Example: longmem memory compact --store memory")
@options("store", "json")
def compact(path: Path, as_json: bool) -> None:
    """Remove from the disk what is forgotten or expired.

    In all namespaces. Interrupted, it has done all of it or nothing; call it again.
    """
    with shared.open_store(path, "write") as store, ShownProgress() as progress:
        done = store.compact(progress=progress)
    show(as_json, asdict(done))
    if not done.emptied:
        say("a reader still holds bytes of what was forgotten; compact again when it has closed")


@command.command(epilog="Example: longmem memory verify --repair --model models/small/sidenet")
@options("store")
@click.option("--repair", is_flag=True, help="Encode what is damaged again from its token ids; needs the model.")
@options("model", "backbone", "device", "json")
def verify(repair: bool, as_json: bool, **given: Any) -> int:
    """Compare every byte with what was written.

    Prints each problem; the exit status is 1 if one is left. Without --repair nothing is changed.
    """
    with ShownProgress() as progress:
        with shared.open_store(given["path"]) as store:
            report = store.verify(progress=progress)
        if repair and not report.clean:
            with shared.open_with_model(given) as store:
                report = store.verify(repair=True, progress=progress)
    show(as_json, {**asdict(report), "clean": report.clean}, ("kind", "where", "what", "repaired"))
    return 0 if report.clean else 1


@command.command(epilog="Example: longmem memory export ada.tar --namespace ada")
@click.argument("archive", type=FOLDER)
@options("store", "namespace")
@click.option("--name", "names", multiple=True, help="Only this document; repeatable.")
@options("json")
def export(archive: Path, path: Path, namespace: str, names: tuple[str, ...], as_json: bool) -> None:
    """Write documents of a namespace to one archive.

    Encoded as they are: another store imports them without the model.
    """
    with shared.open_store(path) as store, ShownProgress() as progress:
        done = store.export(namespace, archive, list(names) or None, progress=progress)
    show(as_json, {"archive": archive, "documents": done}, ("name", "tokens"))


@command.command("import", epilog="Example: longmem memory import ada.tar --namespace ada")
@click.argument("archive", type=FOLDER)
@options("store")
@click.option("--namespace", "-n", help="To put the documents in; default: the one they were exported from.")
@options("model", "backbone", "device", "json")
def import_(archive: Path, path: Path, namespace: str | None, as_json: bool, model: str | None, **where: Any) -> None:
    """Add the documents of an archive, all or none.

    Their keys and values are taken as they are. The store must be of the same backbone, layers and sizes. Where there
    is none yet, one is made that fits, for which the model is needed. The tensors are believed: import only what comes
    from a store that you trust.
    """
    from longmem.store.store import MemoryStore
    from longmem.store.upkeep import Archive

    made: Any = {}
    if shared.layout_of(path, writing=True) is None:
        with archive.open("rb") as stream:
            layout = Archive(stream, archive).layout
        made = {name: getattr(layout, name) for name in ("dtype", "chunk_size", "segment_tokens")}
        made["model"], _ = shared.load_model(model, layout, **where)
    with MemoryStore.open(path, create=bool(made), **made) as store, ShownProgress() as progress:
        receipts = store.import_(archive, namespace, progress=progress)
    show(as_json, {"documents": receipts}, ("status", "tokens", "name"))


@command.command(epilog="Example: longmem memory size --heads-kv 8 --head-dim 128 --layers 32 --tokens 1M,50M")
@click.option("--heads-kv", type=AT_LEAST_1, required=True, help="Key/value heads of the backbone.")
@click.option("--head-dim", type=AT_LEAST_1, required=True, help="Its head dimension.")
@click.option("--layers", type=AT_LEAST_1, default=1, help="Its layers, for the comparison with a cache.")
@click.option(
    "--tokens",
    default="65536,1M,10M",
    callback=shared.by_comma(lambda word: round(float(word.upper().replace("M", "e6"))), "counts; try 65536,1M,10M"),
    help="How many to remember; M is a million.",
)
@options("json")
def size(heads_kv: int, head_dim: int, layers: int, tokens: list[int], as_json: bool) -> None:
    """Show how many bytes a memory of one layer takes.

    By token: keys and values in 16 and in 8 bits; the chunks' mean keys, which an open bank holds (keys and values are
    read for the chunks that are found); and, to compare, a full cache of all layers. In all, on disk: keys and values,
    mean keys, token ids and text.
    """
    from longmem.store.disk import token_bytes

    sizes: list[dict[str, Any]] = []
    for dtype in ("float16", "int8"):
        taken = token_bytes(heads_kv, head_dim, dtype)
        on_disk = {f"{count:,}": round(taken["disk"] * count) for count in tokens}
        sizes.append({"dtype": dtype, **taken, "cache": layers * 4 * heads_kv * head_dim, **on_disk})
    show(as_json, {"sizes": sizes}, list(sizes[0]))
