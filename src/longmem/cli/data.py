"""``longmem data``: texts and tokenizers to train and to measure with."""

from __future__ import annotations

import json
from pathlib import Path

import click

from longmem.cli.data_chapterbreak import chapterbreak
from longmem.cli.data_conversations import conversations
from longmem.cli.outputs import folder_option


@click.group()
def command() -> None:
    """Make texts and tokenizers to train and to measure with."""


command.add_command(chapterbreak)
command.add_command(conversations)


@command.command(epilog="Example: longmem data python --out data/python")
@folder_option("--out", required=True, help="Folder for the three files.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def python(out: Path, as_json: bool) -> None:
    """Python source that this machine has, as train.jsonl, valid.jsonl and test.jsonl.

    Of the standard library and of the packages that longmem depends on; a document is a package, long ones are cut
    between files. Whole packages are held out: nothing of those in test.jsonl is in the others.
    """
    from longmem.data.python_source import write_source

    written = write_source(out)
    if as_json:
        rows = {
            split: {"path": str(found.path), "documents": found.documents, "characters": found.characters}
            for split, found in written.items()
        }
        click.echo(json.dumps(rows, indent=1))
        return
    for found in written.values():
        click.echo(f"{found.path}: {found.documents} documents, {found.characters / 1e6:.1f} million characters")


@command.command(
    epilog="Example: longmem data tokenizer --data books/train.tar.xz --data data/python/train.jsonl "
    "--vocab-size 6144 --out tokenizers/mixed"
)
@click.option("--data", "paths", required=True, multiple=True, help="File, folder, .jsonl or archive; repeat it.")
@click.option(
    "--vocab-size",
    type=click.IntRange(min=259),
    default=8192,
    show_default=True,
    help="256 bytes and 3 special tokens included.",
)
@click.option(
    "--bytes-each", type=click.IntRange(min=1), default=12_000_000, show_default=True, help="Read of each source."
)
@folder_option("--out", required=True, help="Folder for tokenizer.json.")
def tokenizer(paths: tuple[str, ...], vocab_size: int, bytes_each: int, out: Path) -> None:
    """Learn a byte-level BPE tokenizer from equal parts of several sources.

    A recipe uses it by data.tokenizer; a model that went by another tokenizer (model.init) is given this one, its
    embeddings made from the old ones.
    """
    from longmem.data.text import read_documents
    from longmem.data.tokenizer import first_bytes, train_tokenizer

    texts = (text for path in paths for text in first_bytes((d.text for d in read_documents([path])), bytes_each))
    made = train_tokenizer(texts, vocab_size, bytes_each * len(paths))
    made.save_pretrained(str(out))
    click.echo(f"{out}: {len(made):,} tokens")
