"""Documents as token ids, read segment by segment, and the loss of a segment: what benches of perplexity share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from longmem.data import read_documents


def token_ids(tokenizer: Any, paths: Sequence[str], documents: int, tokens: int) -> list[Tensor]:
    """Ids (n,) of the first ``documents`` documents, at most ``tokens`` of each."""
    texts = [document.text for _, document in zip(range(documents), read_documents(paths), strict=False)]
    return [torch.tensor(tokenizer(text[: tokens * 12]).input_ids[:tokens]) for text in texts]


def whole_segments(ids: Tensor, segment: int) -> Iterator[Tensor]:
    """Of ids (n,) each (segment,); what is left at the end is dropped."""
    yield from (part for part in ids.split(segment) if len(part) == segment)


def segment_loss(logits: Tensor, ids: Tensor) -> float:
    """Summed loss in nats of ids (T,) after the first, of logits (1, T, V): T - 1 tokens."""
    return -float(logits[0, :-1].float().log_softmax(-1).gather(1, ids[1:, None]).sum())
