"""``longmem memory stats``: how much there is, and what the indexes find in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from longmem.cli.memory.opening import (
    check_namespace,
    layout_of,
    load_model,
    load_tokenizer,
    open_to_read,
    read_text,
    say,
)
from longmem.cli.memory.options import any_namespace_option, json_option, model_options, store_option, tokenizer_option
from longmem.cli.memory.printing import as_plain, print_columns, print_json
from longmem.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from longmem.memory.recall import RecallReport
    from longmem.store.store import MemoryStore


@click.command(
    short_help="Show how much there is.",
    epilog="Example: longmem memory stats --namespace ada --recall --model models/small/sidenet",
)
@store_option
@any_namespace_option
@click.option("--recall", is_flag=True, help="Also measure what the indexes find, with the model's own queries.")
@click.option("--index", "indexes", multiple=True, help="Measure this one; repeatable. Default: all but exact.")
@click.option("--ask", type=click.Path(path_type=Path), help="Text whose tokens ask. Default: stored segments.")
@model_options
@tokenizer_option
@json_option
def stats(
    path: Path,
    namespace: str | None,
    recall: bool,
    indexes: tuple[str, ...],
    ask: Path | None,
    model: str | None,
    tokenizer: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Show how much there is and what it takes, in the whole store or in a namespace.

    --recall reads some text with the model and compares, for every query of every head, the chunks that an index finds
    with those that exact search finds: never on random vectors, which say nothing about real ones.
    """
    with open_to_read(path) as store:
        found = store.stats(namespace)
        if namespace is not None and not found.documents and not found.expired:
            check_namespace(store, namespace)
        if recall and namespace is None:
            namespace = _only_one(store)
        layout = store.layout
    reports = None
    if recall and namespace is not None:
        reports = _measured(path, namespace, indexes, ask, model, tokenizer, device)
    if as_json:
        print_json({**as_plain(found), "layout": layout, **({} if reports is None else {"recall": reports})})
        return
    for key, value in as_plain(found).items():
        if value is not None:
            click.echo(f"{key:<14}  {value:>16,}")
    shape = f"{layout.heads_kv} heads of {layout.head_dim}, {layout.dtype}"
    sizes = f"chunks of {layout.chunk_size}, segments of {layout.segment_tokens} tokens"
    click.echo(f"{'made for':<14}  {layout.backbone}, layer {layout.memory_layer}: {shape}, {sizes}")
    if reports is not None:
        _print(reports)


def _only_one(store: MemoryStore) -> str:
    names = store.namespaces()
    if len(names) != 1:
        raise StoreError(
            f"{store.path}: recall is measured in one namespace; name it with --namespace: {', '.join(names)}"
        )
    return names[0]


def _measured(
    path: Path,
    namespace: str,
    indexes: tuple[str, ...],
    ask: Path | None,
    model: str | None,
    tokenizer: str | None,
    device: str,
) -> list[RecallReport]:
    from longmem.memory.index import INDEXES, make_index
    from longmem.store.measuring import store_recall
    from longmem.store.store import MemoryStore

    text = None if ask is None else read_text(ask)
    chosen = list(indexes)
    for name in () if indexes else INDEXES:
        try:
            make_index(name)
        except ConfigError as error:
            say(f"{name} is left out: {error}")
        else:
            chosen += [] if name == "exact" else [name]
    loaded = load_model(model, layout_of(path, writing=False), device)
    words = load_tokenizer(tokenizer, loaded.tokenizer)
    with MemoryStore.open(path, model=loaded.model, tokenizer=words, mode="read", create=False) as store:
        return store_recall(store, namespace, chosen, text=text)


def _print(reports: list[RecallReport]) -> None:
    heads = (
        "index",
        "chunks",
        "recall",
        "worst head",
        "attention kept",
        "keys read",
        "ms a token",
        "exact ms",
        "build s",
    )
    click.echo("")
    print_columns(
        heads,
        [
            (
                each.index,
                each.chunks,
                f"{each.recall:.3f} @{each.num}",
                f"{min(each.recall_by_head):.3f}",
                f"{each.attention_kept:.3f}",
                f"{each.keys_read:.1%}",
                f"{each.milliseconds:.2f}",
                f"{each.exact_milliseconds:.2f}",
                f"{each.build_seconds:.1f}",
            )
            for each in reports
        ],
    )
