"""Documents as they are measured: token ids, and how much text the scored tokens stand for."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from longmem.errors import ConfigError, DataError

log = logging.getLogger(__name__)


class Text(Protocol):
    """What is needed of a ``longmem.data`` document."""

    @property
    def id(self) -> str: ...
    @property
    def text(self) -> str: ...


@dataclass(frozen=True)
class TokenizedDocument:
    """A document's ids (n,), of which all but the first are scored, and the words and UTF-8 bytes of the scored text.

    ``digest`` is a hash of the ids: the same text, tokenizer and cut have the same digest.
    """

    id: str
    ids: Tensor
    words: int
    bytes: int
    digest: str
    group: str | None = None

    @property
    def scored(self) -> int:
        return len(self.ids) - 1


def tokenize_documents(
    documents: Iterable[Text],
    tokenizer: Any,
    *,
    max_tokens: int | None = None,
    group_separator: str | None = None,
) -> list[TokenizedDocument]:
    """Tokenize each document from its beginning.

    Special tokens are as in training: where the tokenizer itself puts a ``<s>`` in front (Llama's does, GPT-2's does
    not), it stands there and the first token of the text is scored too. No end token is added or scored.

    Args:
        documents: records with ``id`` and ``text``.
        tokenizer: a transformers tokenizer.
        max_tokens: keep this many tokens of each document; words and bytes are those of the kept part.
        group_separator: a document's group is its file name up to this string (all of it where it does not occur).

    Raises:
        ConfigError: an empty ``group_separator``.
        DataError: no document has two tokens.
    """
    if group_separator == "":
        raise ConfigError("the sign that ends a group's name must not be empty; try --group-by-prefix __")
    kept, seen = [], 0
    prefix = _prefix(tokenizer)
    for document in documents:
        seen += 1
        ids, starts, ends = _encode(tokenizer, document.text)
        ids, ends = ids[:max_tokens], ends[:max_tokens]
        first = 0 if prefix else 1
        if len(ids) <= first:
            log.warning("%s: skipped, %d tokens leave nothing to predict", document.id, len(ids))
            continue
        text = document.text[starts[first] : ends[-1]]
        ids = [*prefix, *ids]
        kept.append(
            TokenizedDocument(
                id=document.id,
                ids=torch.tensor(ids, dtype=torch.long),
                words=len(text.split()),
                bytes=len(text.encode("utf-8", errors="surrogatepass")),
                digest=hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).hexdigest()[:32],
                group=None if group_separator is None else group_of(document.id, group_separator),
            )
        )
    if not kept:
        raise DataError(
            f"no text to measure: {seen} documents read, none has two tokens; check --data, --include and --max-tokens"
        )
    return kept


def group_of(name: str, separator: str) -> str:
    """Separator ``__``: ``test/clowder__02-sets.tex`` belongs to ``clowder``; folders count only if it has a ``/``."""
    return (name if "/" in separator else name.rsplit("/", 1)[-1]).split(separator)[0]


def _prefix(tokenizer: Any) -> list[int]:
    """The start token, where the tokenizer puts one before a text by itself."""
    ids = tokenizer("")["input_ids"]
    return list(ids[:1]) if ids and ids[0] == tokenizer.bos_token_id else []


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[int], list[int]]:
    """Ids, and the span of characters of each; a slow tokenizer, which knows no spans, spreads them evenly."""
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = encoded["offset_mapping"]
        return list(encoded["input_ids"]), [start for start, _ in spans], [end for _, end in spans]
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    edges = [round(i * len(text) / max(len(ids), 1)) for i in range(len(ids) + 1)]
    return ids, edges[:-1], edges[1:]
