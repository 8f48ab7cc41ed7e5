"""Documents as they are measured: token ids, and how much text the scored tokens stand for."""

from __future__ import annotations

import hashlib
import logging
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longmem.data.text import STDLIB, TEST, packages
from longmem.data.tokens import first_text
from longmem.errors import ConfigError, DataError

log = logging.getLogger(__name__)

PROJECT_SEPARATOR = "__"


@dataclass(frozen=True)
class TokenizedDocument:
    """A document's ids (n,), of which all but the first are scored, and the words and UTF-8 bytes of the scored text.

    Attributes:
        digest: hash of the ids; the same text, tokenizer and cut have the same digest.
        group: what is reported apart; None is nothing.
        project: documents of one project are not independent, so intervals draw projects first; empty is the
            document's own.
    """

    id: str
    ids: Tensor
    words: int
    bytes: int
    digest: str
    group: str | None = None
    project: str = ""

    @property
    def scored(self) -> int:
        return len(self.ids) - 1


def tokenize_documents(
    documents: Iterable[Any],
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
        ConfigError: an empty ``group_separator``.
        DataError: no document has two tokens.
    """
    if group_separator == "":
        raise ConfigError("the sign that ends a group's name must not be empty; try --group-by-prefix __")
    kept, seen = [], 0
    prefix = start_tokens(tokenizer)
    first = 0 if prefix else 1
    for document in documents:
        seen += 1
        ids, starts, ends = _encode(tokenizer, document.text, max_tokens)
        if len(ids) <= first:
            log.warning("%s: skipped, %d tokens leave nothing to predict", document.id, len(ids))
            continue
        text, ids = document.text[starts[first] : ends[-1]], [*prefix, *ids]
        group = None if group_separator is None else group_of(document.id, group_separator)
        project = group_of(document.id, PROJECT_SEPARATOR) if PROJECT_SEPARATOR in document.id else document.id
        kept.append(
            TokenizedDocument(
                id=document.id,
                ids=torch.tensor(ids, dtype=torch.long),
                words=len(text.split()),
                bytes=len(text.encode("utf-8", errors="surrogatepass")),
                digest=hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).hexdigest()[:32],
                group=group,
                project=project if group is None else group,
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


def start_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The start token, where the tokenizer itself puts one before a text (Llama's does, GPT-2's does not)."""
    ids = tokenizer("")["input_ids"]
    return (int(ids[0]),) if ids and ids[0] == tokenizer.bos_token_id else ()


def standard_library() -> Iterator[str]:
    """Packages of this Python's own standard library, as text; first those that are held out from training."""
    named = dict(packages(Path(sysconfig.get_paths()["stdlib"])))
    yield from (named[name] for name in sorted(named, key=lambda name: name not in TEST[STDLIB]))


def _encode(tokenizer: Any, text: str, most: int | None) -> tuple[list[int], list[int], list[int]]:
    """The first ``most`` ids, and the span of characters of each; those of a slow tokenizer are spread evenly."""
    part = text if most is None else first_text(text, tokenizer, most)
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = list(encoded["input_ids"])
        starts, ends = ([span[side] for span in encoded["offset_mapping"]] for side in (0, 1))
    else:
        ids = list(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])
        edges = [round(i * len(part) / max(len(ids), 1)) for i in range(len(ids) + 1)]
        starts, ends = edges[:-1], edges[1:]
    return ids[:most], starts[:most], ends[:most]
