"""From text files to rows of token ids: readers, tokenizer, token cache, streams."""

from longmem.data.stream import SegmentBatch, SegmentStream
from longmem.data.text import Document, TextSource, read_documents
from longmem.data.tokenizer import check_ids, check_tokenizer, first_text, load_tokenizer, train_tokenizer
from longmem.data.tokens import TokenCorpus, tokenize

__all__ = [
    "Document",
    "SegmentBatch",
    "SegmentStream",
    "TextSource",
    "TokenCorpus",
    "check_ids",
    "check_tokenizer",
    "first_text",
    "load_tokenizer",
    "read_documents",
    "tokenize",
    "train_tokenizer",
]
