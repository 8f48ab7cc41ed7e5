"""``SegmentSteps``: consecutive segments as a dataset with an index, for loaders that want one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from longmem.data.stream import SegmentStream
from longmem.data.tokens import TokenCorpus
from longmem.errors import DataError


class SegmentSteps(Dataset[dict[str, Tensor]]):
    """What ``SegmentStream`` gives, one row at a time: item ``step * rows + row`` is that row's segment of that step.

    In this order every loader that takes items one after the other keeps texts in order; and where batch number
    ``step * W + rank`` goes to process ``rank``, as accelerate deals them, a row stays with its process. Items depend
    on nothing but their number and the epoch, so a loader may skip, read ahead, and have workers.

    Args:
        corpus: the documents.
        window: T.
        rows: of all processes together.
        seed: order of the documents; None keeps theirs.
        piece_tokens: see ``SegmentStream``.
        pad_id: fills segments behind the end of a document.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        window: int,
        rows: int,
        seed: int | None = 1,
        *,
        piece_tokens: int = 0,
        pad_id: int = 0,
    ) -> None:
        self.stream = SegmentStream(corpus, window, rows, seed, piece_tokens=piece_tokens, pad_id=pad_id)
        self.rows = rows
        self.steps = max(1, round(corpus.num_tokens / (rows * window)))
        self._epoch = 0

    def __len__(self) -> int:
        """Items of an epoch: as many tokens as the corpus has."""
        return self.steps * self.rows

    def set_epoch(self, epoch: int) -> None:
        """Rows go on in the next epoch where they stood."""
        self._epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One row's segment.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels`` (T,): the targets, already shifted; and of its text the
            ``text`` number, the token ``offset`` and whether it ``starts`` there, () each.
        """
        step, lane = divmod(index, self.rows)
        self.stream.seek(self._epoch * self.steps + step)
        batch, text = self.stream.row(lane)
        real = torch.ones_like(batch.ids) if batch.mask is None else batch.mask.long()
        return {
            "input_ids": batch.ids[0],
            "attention_mask": real[0],
            "labels": batch.targets[0],
            "text": torch.tensor(text),
            "offset": torch.tensor(batch.offsets[0]),
            "starts": batch.starts[0],
        }

    def name(self, text: int) -> str:
        """Name of a text by its number."""
        return self.stream.pieces[text].name


def as_corpus(documents: TokenCorpus | Iterable[Mapping[str, Any]]) -> TokenCorpus:
    """Tokenised documents as one corpus.

    Args:
        documents: a corpus as it is; or records (of a ``datasets.Dataset``, a list) with ``input_ids``, each a whole
            document, and perhaps a ``name`` or ``id``.

    Raises:
        DataError: a record has no ``input_ids``, or none has any.
    """
    if isinstance(documents, TokenCorpus):
        return documents
    parts, names = [], []
    for number, record in enumerate(documents):
        if "input_ids" not in record:
            raise DataError(
                f"record {number} has no input_ids (it has {', '.join(map(str, record)) or 'nothing'}); tokenise each "
                "document as a whole, without cutting it to the window"
            )
        parts.append(np.asarray(record["input_ids"], dtype=np.uint32))
        names.append(str(record.get("name", record.get("id", number))))
    if not sum(map(len, parts)):
        raise DataError("no record has any token in input_ids; give documents to train on")
    ids = np.concatenate(parts)
    bounds = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
    unknown = np.zeros(len(parts), dtype=np.int64)
    fingerprint = hashlib.sha256(ids.tobytes() + bounds.tobytes()).hexdigest()[:16]
    return TokenCorpus(ids, bounds, tuple(names), unknown, unknown, fingerprint)
