"""From text files to rows of token ids: readers, tokenizers, token cache, streams."""

from longmem.data.stream import SegmentStream
from longmem.data.text import Document, TextSource, read_documents
from longmem.data.tokens import TokenCorpus, check_tokenizer, load_tokenizer, tokenize

__all__ = [
    "Document",
    "SegmentStream",
    "TextSource",
    "TokenCorpus",
    "check_tokenizer",
    "load_tokenizer",
    "read_documents",
    "tokenize",
]
