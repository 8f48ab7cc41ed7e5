"""``longmem memory``: a store of texts that a model remembers."""

from __future__ import annotations

import time as clock
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longmem.cli.common import (
    ShownProgress,
    check_namespace,
    counted,
    date,
    layout_of,
    load_model,
    load_tokenizer,
    one_line,
    open_store,
    print_columns,
    print_json,
    read_text,
    say,
)
from longmem.cli.memory_add import STDIN, add, append, print_receipt
from longmem.cli.options import FOLDER, MOMENT, checked, options, token_count
from longmem.errors import DataError, StoreError

if TYPE_CHECKING:
    from longmem.store.records import VerifyReport

SHOWN_HEADS = 4


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


for _verb in (add, append):
    command.add_command(_verb)


# looking


@command.command("list", epilog="Example: longmem memory list --namespace ada --where draft=true")
@options("store", "any_namespace", "where", "older_than", "before")
@click.option("--namespaces", "only_namespaces", is_flag=True, help="List the namespaces instead.")
@options("json")
def list_(
    path: Path,
    namespace: str | None,
    where: dict[str, Any] | None,
    older_than: float | None,
    before: float | None,
    only_namespaces: bool,
    as_json: bool,
) -> None:
    """List documents, oldest first; forget takes the same conditions."""
    edges = [edge for edge in (before, None if older_than is None else clock.time() - older_than) if edge is not None]
    with open_store(path) as store:
        if namespace is not None:
            check_namespace(store, namespace)
        names = store.namespaces() if namespace is None else [namespace]
        if only_namespaces:
            stats = {name: store.stats(name) for name in names}
            if as_json:
                print_json({"namespaces": stats})
            else:
                rows = [(name, each.documents, each.tokens, each.expired) for name, each in stats.items()]
                print_columns(("namespace", "documents", "tokens", "expired"), rows)
            return
        found = [
            info for name in names for info in store.documents(name, where) if info.added < min(edges, default=9e99)
        ]
    if as_json:
        print_json({"documents": found})
        return
    print_columns(
        ("namespace", "name", "tokens", "added", "expires", "metadata"),
        [
            (info.namespace, info.name, info.tokens, date(info.added), date(info.expires), _pairs(info.metadata))
            for info in found
        ],
    )


def _pairs(metadata: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in metadata.items())


@command.command(epilog="Example: longmem memory show notes.txt --text > notes.txt")
@click.argument("name")
@options("store", "namespace")
@click.option("--text", "with_text", is_flag=True, help="Print the text itself.")
@click.option("--tokenizer", help="Folder or hub id; to read a document that was added as token ids.")
@options("json")
def show(path: Path, namespace: str, name: str, with_text: bool, tokenizer: str | None, as_json: bool) -> None:
    """Show a document: what is known of it, or its text."""
    with open_store(path, tokenizer=load_tokenizer(tokenizer)) as store:
        check_namespace(store, namespace)
        info = store.document(namespace, name)
        text = store.text(namespace, name) if with_text else None
    if as_json:
        print_json(info if text is None else {**asdict(info), "text": text})
    elif text is not None:
        click.echo(text, nl=False)
    else:
        known = {**asdict(info), "added": date(info.added), "expires": date(info.expires)}
        for key, value in {**known, "metadata": _pairs(info.metadata) or None}.items():
            click.echo(f"{key:<9}  {'-' if value is None else f'{value:,}' if isinstance(value, int) else value}")


@command.command(epilog='Example: longmem memory search "where is the key" --model models/small/sidenet --top 5')
@click.argument("text")
@options("store", "namespace", "model", "backbone", "device", "tokenizer")
@click.option("--top", type=click.IntRange(min=1), default=10, help="Chunks to show.")
@click.option("--around", type=click.IntRange(min=0), default=12, help="Tokens shown on each side.")
@click.option("--document", "documents", multiple=True, help="Only in this document; repeatable.")
@options("where")
@click.option("--after", type=MOMENT, help="Only documents of this date or later.")
@options("before")
@click.option("--max-tokens", type=token_count(), help="Only the newest so many tokens.")
@click.option("--index", default="exact", help="How the keys are searched: exact, or faiss.")
@options("json")
def search(
    text: str,
    path: Path,
    namespace: str,
    documents: tuple[str, ...],
    top: int,
    around: int,
    as_json: bool,
    **given: Any,
) -> None:
    """Show which chunks the model's heads find for TEXT.

    TEXT - is read from standard input. Largest share first: the part of the heads' output that came from the chunk,
    the mean over TEXT's tokens and all heads. The score is the largest inner product of a query with the chunk's mean
    key. The chunk stands in [[ ]].
    """
    query = read_text(text) if text == STDIN else checked(text, "the text to search for")
    if not query.strip():
        raise DataError("the text to search for is empty; say something")
    layout = layout_of(path)
    with open_store(path) as store:  # before the model: wrong names show at once
        check_namespace(store, namespace)
        for document in documents:
            store.document(namespace, document)
    loaded = load_model(given["model"], layout, given["device"], given["backbone"])
    with open_store(path, model=loaded.model, tokenizer=load_tokenizer(given["tokenizer"], loaded)) as store:
        settings = {each: given[each] for each in ("where", "after", "before", "max_tokens", "index")}
        bank = store.bank(namespace, documents=list(documents) or None, device=loaded.model.device, **settings)
        hits = bank.search_text(query, top=top, around=around)
    if as_json:
        keys = ("document", "document_id", "start_token", "length", "time")
        found = [
            {
                **{key: getattr(hit.origin, key) for key in keys},
                "share": hit.share,
                "score": hit.score,
                "heads": hit.heads,
                **{key: getattr(hit.passage, key) for key in ("before", "text", "after")},
            }
            for hit in hits
        ]
        print_json({"query": query, "namespace": namespace, "hits": found})
        return
    for number, hit in enumerate(hits, 1):
        heads = [f"{head} ({part:.1%})" for head, part in hit.heads.items()]
        more = f" and {len(heads) - SHOWN_HEADS} more" if len(heads) > SHOWN_HEADS else ""
        click.echo(
            f"{number:>3}  share {hit.share:.2%}  score {hit.score:.2f}  {hit.origin.document}, token "
            f"{hit.origin.start_token:,}, {date(hit.origin.time)}; heads {', '.join(heads[:SHOWN_HEADS])}{more}"
        )
        click.echo(f"     {one_line(f'{hit.passage.before}[[{hit.passage.text}]]{hit.passage.after}')}")
    if not hits:
        say("nothing was found")


@command.command(epilog="Example: longmem memory stats --namespace ada")
@options("store", "any_namespace", "json")
def stats(path: Path, namespace: str | None, as_json: bool) -> None:
    """Show how much there is and what it takes.

    In the whole store, or in one namespace.
    """
    with open_store(path) as store:
        found, layout = store.stats(namespace), store.layout
        if namespace is not None and not found.documents and not found.expired:
            check_namespace(store, namespace)
    if as_json:
        print_json({**asdict(found), "layout": layout})
        return
    for key, value in asdict(found).items():
        if value is not None:
            click.echo(f"{key:<14}  {value:>16,}")
    layers = f"layer{'s' * (len(layout.memory_layers) > 1)} {', '.join(map(str, layout.memory_layers))}"
    shape = f"{layout.heads_kv} heads of {layout.head_dim}, {layout.dtype}"
    sizes = f"chunks of {layout.chunk_size}, segments of {layout.segment_tokens} tokens"
    click.echo(f"{'made for':<14}  {layout.backbone}, {layers}: {shape}, {sizes}")


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
    if not any(value not in (None, False) for value in conditions.values()):
        raise StoreError(
            "say what to forget: --name, --where, --older-than, --before, or --everything; nothing was forgotten"
        )
    with open_store(path, "write") as store:
        done = store.forget(namespace, **conditions)
        if not done.documents:
            check_namespace(store, namespace)
    if as_json:
        print_json({**asdict(done), "tokens": done.tokens})
    else:
        for name, tokens in done.documents:
            click.echo(f"forgotten  {counted(tokens, 'token'):>16}  {name}")
    after = "; `longmem memory compact` removes the bytes" if done.documents else ""
    say(f"{counted(len(done.documents), 'document')} of {namespace!r} forgotten{after}")


@command.command(epilog="Example: longmem memory compact --store memory")
@options("store", "json")
def compact(path: Path, as_json: bool) -> None:
    """Remove from the disk what is forgotten or expired.

    In all namespaces. Interrupted, it has done all of it or nothing; call it again.
    """
    with open_store(path, "write") as store, ShownProgress() as progress:
        done = store.compact(progress=progress)
    if as_json:
        print_json(done)
        return
    click.echo(
        f"{counted(done.tokens, 'token')} removed, {counted(done.documents, 'document')} had expired; "
        f"{done.bytes_before - done.bytes_after:,} bytes freed"
    )
    if not done.emptied:
        say("a reader still holds bytes of what was forgotten; compact again when it has closed")


@command.command(epilog="Example: longmem memory verify --repair --model models/small/sidenet")
@options("store")
@click.option("--repair", is_flag=True, help="Encode what is damaged again from its token ids; needs the model.")
@options("model", "backbone", "device", "json")
def verify(path: Path, repair: bool, as_json: bool, **given: Any) -> int:
    """Compare every byte with what was written.

    Prints each problem; the exit status is 1 if one is left. Without --repair nothing is changed.
    """
    with ShownProgress() as progress:
        with open_store(path) as store:
            report = store.verify(progress=progress)
        if repair and not report.clean:
            loaded = load_model(given["model"], layout_of(path), given["device"], given["backbone"])
            with open_store(path, "write", model=loaded.model) as store:
                report = store.verify(repair=True, progress=progress)
    if as_json:
        print_json({**asdict(report), "clean": report.clean})
    else:
        _print_verified(report)
    return 0 if report.clean else 1


def _print_verified(report: VerifyReport) -> None:
    for problem in report.problems:
        click.echo(f"{'repaired' if problem.repaired else problem.kind}: {problem.where}: {problem.what}")
    left = sum(not problem.repaired for problem in report.problems)
    found = (
        f"{left} of {counted(len(report.problems), 'problem')} left" if report.problems else "all is as it was written"
    )
    click.echo(f"{report.bytes:,} bytes, {counted(report.documents, 'document')}: {found}")
    if report.rebuilt_tokens:
        same = "with the same bits as before" if report.same_bits else "with other last bits (another machine or torch)"
        click.echo(f"{counted(report.rebuilt_tokens, 'token')} encoded again, {same}")


@command.command(epilog="Example: longmem memory export ada.tar --namespace ada")
@click.argument("archive", type=FOLDER)
@options("store", "namespace")
@click.option("--name", "names", multiple=True, help="Only this document; repeatable.")
@options("json")
def export(archive: Path, path: Path, namespace: str, names: tuple[str, ...], as_json: bool) -> None:
    """Write documents of a namespace to one archive.

    Encoded as they are: another store imports them without the model.
    """
    with open_store(path) as store, ShownProgress() as progress:
        check_namespace(store, namespace)
        documents = store.export(namespace, archive, list(names) or None, progress=progress)
    if as_json:
        print_json({"archive": archive, "documents": documents})
        return
    tokens = sum(info.tokens for info in documents)
    click.echo(f"{archive}: {counted(len(documents), 'document')}, {counted(tokens, 'token')}")


@command.command("import", epilog="Example: longmem memory import ada.tar --namespace ada")
@click.argument("archive", type=FOLDER)
@options("store")
@click.option("--namespace", "-n", help="To put the documents in; default: the one they were exported from.")
@options("model", "backbone", "device", "json")
def import_(archive: Path, path: Path, namespace: str | None, as_json: bool, **given: Any) -> None:
    """Add the documents of an archive, all or none.

    Their keys and values are taken as they are. The store must be of the same backbone, layers and sizes. Where there
    is none yet, one is made that fits, for which the model is needed. The tensors are believed: import only what comes
    from a store that you trust.
    """
    fitting = _made_to_fit(path, archive, given) if layout_of(path, writing=True) is None else None
    with open_store(path, "write", model=fitting) as store, ShownProgress() as progress:
        receipts = store.import_(archive, namespace, progress=progress)
    if as_json:
        print_json({"documents": receipts})
        return
    for receipt in receipts:
        print_receipt(receipt)


def _made_to_fit(path: Path, archive: Path, given: dict[str, Any]) -> Any:
    """Make a store that can take the archive; returns its model."""
    from longmem.store.archive import Archive
    from longmem.store.store import MemoryStore

    with archive.open("rb") as stream:
        layout = Archive(stream, archive).layout
    fitting = load_model(given["model"], layout, given["device"], given["backbone"]).model
    sizes: dict[str, Any] = {name: getattr(layout, name) for name in ("dtype", "chunk_size", "segment_tokens")}
    MemoryStore.open(path, model=fitting, **sizes).close()
    return fitting


@command.command(epilog="Example: longmem memory size --heads-kv 8 --head-dim 128 --layers 32 --tokens 1M,50M")
@click.option("--heads-kv", type=int, help="Key/value heads of a backbone that is not in the table.")
@click.option("--head-dim", type=int, help="Its head dimension.")
@click.option("--layers", type=int, default=1, help="Its layers, for the comparison with a cache.")
@click.option("--chunk-size", type=int, default=4, help="Tokens per chunk.")
@click.option("--tokens", default="65536,1M,10M", help="How many to remember; M is a million.")
@options("json")
def size(heads_kv: int | None, head_dim: int | None, layers: int, chunk_size: int, tokens: str, as_json: bool) -> None:
    """Show how many bytes a memory takes, by backbone.

    By token: keys and values in 16 and in 8 bits; the chunks' mean keys, which an open bank holds (keys and values are
    read for the chunks that are found); and, to compare, a full cache of all layers. In all, on disk, in 16 and in 8
    bits: keys and values, mean keys, token ids and text.
    """
    from longmem.store.sizes import BACKBONES, BackboneShape, memory_size, size_table

    if (heads_kv is None) != (head_dim is None):
        raise StoreError("--heads-kv and --head-dim go together; give both, or neither for the table")
    backbones = BACKBONES
    if heads_kv is not None and head_dim is not None:
        backbones = (BackboneShape("this one", layers, heads_kv, head_dim),)
    try:
        counts = [round(float(word.upper().replace("M", "e6"))) for word in tokens.replace("_", "").split(",")]
    except ValueError:
        raise click.BadParameter(f"{tokens!r} is no list of token counts; try 65536,1M,10M") from None
    if not as_json:
        print_columns(*size_table(backbones, chunk_size=chunk_size, tokens=counts))
        return
    sizes = [memory_size(each, chunk_size=chunk_size, dtype=kind) for each in backbones for kind in ("float16", "int8")]
    disk = [{"disk": each.disk, "disk_bytes": {str(n): each.disk_bytes(n) for n in counts}} for each in sizes]
    print_json({"sizes": [{**asdict(each), **more} for each, more in zip(sizes, disk, strict=True)]})
