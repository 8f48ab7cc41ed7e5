"""``longmem memory search``: what the model's heads find for a text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longmem.cli.counts import TokenCount
from longmem.cli.memory.opening import check_namespace, layout_of, load_model, load_tokenizer
from longmem.cli.memory.options import (
    MOMENT,
    json_option,
    model_options,
    namespace_option,
    store_option,
    tokenizer_option,
    where_option,
)
from longmem.cli.memory.printing import as_plain, date, one_line, print_json
from longmem.errors import DataError

if TYPE_CHECKING:
    from longmem.store.passages import SearchHit

SHOWN_HEADS = 4


@click.command(
    short_help="Show what the model's heads find for a text.",
    epilog='Example: longmem memory search "where is the key" --model models/small/sidenet --top 5',
)
@click.argument("text")
@store_option
@namespace_option
@model_options
@tokenizer_option
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, help="Chunks to show.")
@click.option(
    "--around", type=click.IntRange(min=0), default=12, show_default=True, help="Tokens shown on either side."
)
@click.option("--document", "documents", multiple=True, help="Only in this document; repeatable.")
@where_option
@click.option("--after", type=MOMENT, help="Only documents of this date or later.")
@click.option("--before", type=MOMENT, help="Only documents from before this date.")
@click.option("--max-tokens", type=TokenCount(), help="Only the newest so many tokens.")
@click.option("--index", default="exact", show_default=True, help="How the keys are searched.")
@json_option
def search(
    text: str,
    path: Path,
    namespace: str,
    model: str | None,
    tokenizer: str | None,
    device: str,
    top: int,
    around: int,
    documents: tuple[str, ...],
    where: dict[str, Any] | None,
    after: float | None,
    before: float | None,
    max_tokens: int | None,
    index: str,
    as_json: bool,
) -> None:
    """Show which chunks of memory the model's heads find for TEXT (- reads it from standard input).

    Largest share first: the part of the heads' output that came from the chunk, the mean over TEXT's tokens and all
    heads. The score is the largest inner product of a query with the chunk's mean key. The chunk stands in [[ ]].
    """
    from longmem.store.store import MemoryStore

    query = _query(text)
    layout = layout_of(path, writing=False)
    with MemoryStore.open(path, mode="read", create=False) as store:  # before the model: wrong names show at once
        check_namespace(store, namespace)
        for document in documents:
            store.document(namespace, document)
    loaded = load_model(model, layout, device)
    words = load_tokenizer(tokenizer, loaded.tokenizer)
    with MemoryStore.open(path, model=loaded.model, tokenizer=words, mode="read", create=False) as store:
        bank = store.bank(
            namespace,
            documents=list(documents) or None,
            where=where,
            after=after,
            before=before,
            max_tokens=max_tokens,
            index=index,
            device=loaded.model.device,
        )
        hits = bank.search_text(query, top=top, around=around)
    if as_json:
        print_json({"query": query, "namespace": namespace, "hits": [_plain(hit) for hit in hits]})
        return
    for number, hit in enumerate(hits, 1):
        _print(number, hit)
    if not hits:
        click.echo("nothing was found", err=True)


def _query(text: str) -> str:
    if text == "-":
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"standard input is not UTF-8 text (byte {error.start}); convert it") from error
    if not text.strip():
        raise DataError("the text to search for is empty; say something")
    return text


def _plain(hit: SearchHit) -> dict[str, Any]:
    origin, passage = hit.origin, hit.passage
    return {
        "document": origin.document,
        "document_id": origin.document_id,
        "start_token": origin.start_token,
        "length": origin.length,
        "time": origin.time,
        "share": hit.share,
        "score": hit.score,
        "heads": as_plain(hit.heads),
        "before": passage.before,
        "text": passage.text,
        "after": passage.after,
    }


def _print(number: int, hit: SearchHit) -> None:
    origin, passage = hit.origin, hit.passage
    heads = [f"{head} ({part:.1%})" for head, part in hit.heads.items()]
    more = f" and {len(heads) - SHOWN_HEADS} more" if len(heads) > SHOWN_HEADS else ""
    click.echo(
        f"{number:>3}  share {hit.share:.2%}  score {hit.score:.2f}  {origin.document}, token {origin.start_token:,}, "
        f"{date(origin.time)}; heads {', '.join(heads[:SHOWN_HEADS])}{more}"
    )
    # the brackets are the only thing that is not the document's own
    click.echo(f"     {one_line(f'{passage.before}[[{passage.text}]]{passage.after}')}")
