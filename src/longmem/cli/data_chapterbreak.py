"""``longmem data chapterbreak``: the chapter boundaries of books as a benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import click

from longmem.cli.counts import token_counts
from longmem.cli.outputs import folder_option


@click.command(
    epilog="Example: longmem data chapterbreak data/books/test.tar.xz --out data/chapterbreak",
)
@click.argument("books", nargs=-1, required=True)
@folder_option("--out", required=True, help="Folder for the two files.")
@click.option("--split", default="books", show_default=True, help="Key of the books in the file.")
@click.option(
    "--prefix", callback=token_counts, default="8k", show_default=True, help="Tokens that prefixes are long enough for."
)
@click.option("--words", type=int, default=150, show_default=True, help="Of every suffix.")
@click.option(
    "--min-chapter", type=int, default=2000, show_default=True, help="Characters that a chapter has at least."
)
@click.option("--per-book", type=int, default=8, show_default=True, help="Examples of one book, at most.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of boundaries and negatives.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def chapterbreak(
    books: tuple[str, ...],
    out: Path,
    split: str,
    prefix: list[int],
    words: int,
    min_chapter: int,
    per_book: int,
    seed: int,
    as_json: bool,
) -> None:
    """Make chapterbreak_ctx_<N>.json from BOOKS: files, folders, archives or JSON lines.

    An example is the text before a chapter boundary, the beginning of the next chapter, and five beginnings of other
    chapters of the same book, none of which the prefix contains. Headings come from an index.jsonl beside the books if
    there is one, else they are found in the text. A book without six chapters, or too short for a prefix, is left out
    and named; sources.json says what became of each.
    """
    from dataclasses import asdict

    from longmem.data.chapterbreak import ChapterBreakSettings, build_chapterbreak, write_chapterbreak

    if len(prefix) != 1:
        raise click.BadParameter(
            "one length for all prefixes, which serves shorter ones too; try 8k", param_hint="--prefix"
        )
    made = build_chapterbreak(books, ChapterBreakSettings(split, prefix[0], words, min_chapter, per_book, seed))
    data, sources = write_chapterbreak(made, out)
    if as_json:
        said = {"data": str(data), "sources": str(sources), "books": [asdict(book) for book in made.books]}
        click.echo(json.dumps(said, indent=1, ensure_ascii=False))
        return
    for book in made.books:
        if book.skipped:
            click.echo(f"left out: {book.id}: {book.skipped}", err=True)
    examples, taken = sum(book.examples for book in made.books), len(made.works)
    click.echo(f"{data}: {examples} examples of {taken} books ({len(made.books) - taken} left out)")
