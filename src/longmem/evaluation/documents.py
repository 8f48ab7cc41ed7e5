"""Documents as token ids, of which perplexity is measured."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longmem.data.tokens import first_text, start_tokens
from longmem.errors import DataError

log = logging.getLogger(__name__)

PROJECT_SEPARATOR = "__"


@dataclass(frozen=True)
class TokenizedDocument:
    """A document's ids (n,), of which all but the first are scored, and the words and UTF-8 bytes of the scored text.

    ``digest`` is the hash of the ids; ``group`` what is reported apart, if anything; documents of one ``project`` are
    not independent, so intervals draw projects first.
    """

    id: str
    ids: Tensor
    words: int
    bytes: int
    digest: str
    group: str | None
    project: str

    @property
    def scored(self) -> int:
        return len(self.ids) - 1


def tokenize_documents(
    documents: Sequence[Any],
    tokenizer: Any,
    *,
    max_tokens: int | None = None,
    group_separator: str | None = None,
) -> list[TokenizedDocument]:
    """Tokenize each document from its beginning.

    Special tokens are as in training: where the tokenizer itself puts a ``<s>`` in front (Llama's does, GPT-2's does
    not), it stays there and the first token of the text is scored too. No end token is added or scored.

    Args:
        documents: records with ``id`` and ``text``.
        max_tokens: keep this many tokens of each document; words and bytes are those of the kept part.
        group_separator: a document's group is its file name up to this string (all of it where it does not occur).
            The group is its project too. None: no groups; the project is the name up to ``__``.

    Raises:
        DataError: no document has two tokens.
    """
    kept, prefix = [], start_tokens(tokenizer)
    first = 0 if prefix else 1
    for document in documents:
        part = document.text if max_tokens is None else first_text(document.text, tokenizer, max_tokens)
        ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
        if len(ids) <= first:
            log.warning("%s: skipped, %d tokens leave nothing to predict", document.id, len(ids))
            continue
        text = tokenizer.decode(ids[first:], clean_up_tokenization_spaces=False)
        ids = [*prefix, *ids]
        group = _group(document.id, group_separator) if group_separator else None
        project = _group(document.id, PROJECT_SEPARATOR) if PROJECT_SEPARATOR in document.id else document.id
        kept.append(
            TokenizedDocument(
                document.id,
                torch.tensor(ids, dtype=torch.long),
                words=len(text.split()),
                bytes=len(text.encode("utf-8", errors="surrogatepass")),
                digest=hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).hexdigest()[:32],
                group=group,
                project=group or project,
            )
        )
    if not kept:
        raise DataError(
            f"no text to measure: {len(documents)} documents read, none has two tokens; check --data, --include and "
            "--max-tokens"
        )
    return kept


def _group(name: str, separator: str) -> str:
    """Separator ``__``: ``test/clowder__02-sets.tex`` belongs to ``clowder``; folders count only if it has a ``/``."""
    return (name if "/" in separator else name.rsplit("/", 1)[-1]).split(separator)[0]
