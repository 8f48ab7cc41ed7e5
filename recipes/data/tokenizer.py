"""Learn a byte-level BPE tokenizer from equal parts of several sources.

Usage: python recipes/data/tokenizer.py books/train.tar.xz data/python/train.jsonl --out data/tokenizer

A recipe uses it by data.tokenizer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from longmem.data.text import read_documents
from longmem.data.tokens import train_tokenizer
from longmem.errors import LongMemError


def equal_parts(paths: list[str], characters: int) -> Iterator[str]:
    """The texts of every source until so many characters are read, the last one cut."""
    for path in paths:
        left = characters
        for document in read_documents([path]):
            yield document.text[:left]
            left -= len(document.text)
            if left <= 0:
                break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", help="Files, folders, .jsonl or archives; each is a source.")
    parser.add_argument("--vocab-size", type=int, default=8192, help="256 bytes and 3 special tokens included.")
    parser.add_argument("--bytes-each", type=int, default=12_000_000, help="Read of each source.")
    parser.add_argument("--out", type=Path, required=True, help="Folder for tokenizer.json.")
    given = parser.parse_args()
    try:
        texts = equal_parts(given.paths, given.bytes_each)
        made = train_tokenizer(texts, given.vocab_size, given.bytes_each * len(given.paths))
    except LongMemError as error:
        sys.exit(f"error: {error}")
    made.save_pretrained(str(given.out))
    print(f"{given.out}: {len(made):,} tokens")


if __name__ == "__main__":
    main()
