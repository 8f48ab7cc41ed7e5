"""``longmem memory list`` and ``show``."""

from __future__ import annotations

import time as clock
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longmem.cli.memory.opening import check_namespace, load_tokenizer, open_to_read
from longmem.cli.memory.options import (
    DURATION,
    MOMENT,
    any_namespace_option,
    json_option,
    namespace_option,
    store_option,
    where_option,
)
from longmem.cli.memory.printing import as_plain, date, print_columns, print_json

if TYPE_CHECKING:
    from longmem.store.records import DocumentInfo


@click.command(
    "list", short_help="List documents.", epilog="Example: longmem memory list --namespace ada --where draft=true"
)
@store_option
@any_namespace_option
@where_option
@click.option("--older-than", type=DURATION, help="Only documents at least so old: 30d, 12h.")
@click.option("--before", type=MOMENT, help="Only documents from before this date.")
@click.option("--namespaces", "only_namespaces", is_flag=True, help="List the namespaces instead.")
@json_option
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
    now = clock.time()
    edges = [edge for edge in (before, None if older_than is None else now - older_than) if edge is not None]
    with open_to_read(path) as store:
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
        documents = [
            info for name in names for info in store.documents(name, where) if all(info.added < edge for edge in edges)
        ]
    if as_json:
        print_json({"documents": documents})
        return
    heads = ("namespace", "name", "tokens", "added", "expires", "metadata")
    print_columns(heads, [_line(info) for info in documents])


def _line(info: DocumentInfo) -> tuple[object, ...]:
    metadata = ", ".join(f"{key}={value}" for key, value in info.metadata.items())
    return (info.namespace, info.name, info.tokens, date(info.added), date(info.expires), metadata)


@click.command(
    short_help="Show a document, or its text.", epilog="Example: longmem memory show notes.txt --text > notes.txt"
)
@click.argument("name")
@store_option
@namespace_option
@click.option("--text", "with_text", is_flag=True, help="Print the text itself.")
@click.option("--tokenizer", help="Folder or hub id; to read a document that was added as token ids.")
@json_option
def show(path: Path, namespace: str, name: str, with_text: bool, tokenizer: str | None, as_json: bool) -> None:
    """Show a document: what is known of it, or its text."""
    from longmem.store.store import MemoryStore

    words = load_tokenizer(tokenizer)
    with MemoryStore.open(path, mode="read", create=False, tokenizer=words) as store:
        check_namespace(store, namespace)
        info = store.document(namespace, name)
        text = store.text(namespace, name) if with_text else None
    if as_json:
        print_json(as_plain(info) if text is None else {**as_plain(info), "text": text})
    elif text is not None:
        click.echo(text, nl=False)
    else:
        for key, value in as_plain(info).items():
            shown = date(value) if key in ("added", "expires") else value
            click.echo(f"{key:<9}  {f'{shown:,}' if isinstance(shown, int) else shown}")
