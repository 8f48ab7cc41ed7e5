"""``SessionBank``: a conversation over a bank on a store, to be committed or dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longmem.errors import MemoryBankError, StoreError
from longmem.memory.bank import MemoryBank
from longmem.memory.index import rows_of
from longmem.memory.session import SessionMemory
from longmem.store.encode import Tokens
from longmem.store.passages import Passage, SearchHit, search_text
from longmem.store.records import Receipt
from longmem.types import AttentionKV, ChunkOrigin


@dataclass
class _Said:
    """An unbroken line of a row's tokens."""

    document: str | None
    offset: int  # in its document
    tokens: int
    ids: list[Tensor] | None  # one after the other; None where they were not given

    @property
    def end(self) -> int:
        return self.offset + self.tokens


class SessionBank(SessionMemory):
    """What a running conversation adds, over documents of a store.

    Searches find the best of both; ``add`` writes to a bank of the session alone, in memory. Nothing reaches the store
    until ``commit``.

    Args:
        base: the documents underneath, a ``StoreBank``.
        capacity_tokens: what each row of the session holds at most; the newest stay. ``commit`` writes all of it.
        rows: conversations; by default one for each row of the base, which must have one or as many.

    Raises:
        MemoryBankError: rows that do not fit.
        ConfigError: a capacity that is no multiple of the chunk size.
    """

    def __init__(self, base: Any, *, capacity_tokens: int = 65536, rows: int | None = None) -> None:
        bank = MemoryBank(
            base.rows if rows is None else rows,
            capacity_tokens,
            base.heads_kv,
            base.head_dim,
            base.chunk_size,
            device=base.device,
            fingerprint=base.fingerprint,
            memory_layers=base.memory_layers,
        )
        super().__init__(base, bank)
        self.documents = base
        self._said: list[list[_Said]] = [[] for _ in range(self.rows)]
        self._open = [False] * self.rows

    @property
    def store(self) -> Any:
        """That of the documents underneath."""
        return self.documents.store

    @property
    def version(self) -> int:
        """Another one whenever the session or the documents underneath hold something else."""
        found: int = self.bank.version + self.documents.version
        return found

    # writing

    def add(
        self,
        kv: AttentionKV,
        *,
        rows: Tensor | None = None,
        documents: Sequence[str | None] | None = None,
        offsets: Sequence[int] | None = None,
        time: float | None = None,
        ids: Sequence[Tensor] | Tensor | None = None,
    ) -> None:
        """Remember keys and values (B, H, T, D) in the session, see ``MemoryBank.add``.

        Args:
            ids: the token ids of them: (B, T) as the model was given them, or one tensor of real tokens for each row
                written. Without them the session cannot be committed.
        """
        lanes = rows_of(rows, kv.keys.shape[0], self.rows, "keys")
        counts = [kv.keys.shape[2]] * len(lanes) if kv.mask is None else kv.mask.sum(1).tolist()
        given = None if ids is None else _real_ids(ids, kv.mask, counts)
        super().add(kv, rows=rows, documents=documents, offsets=offsets, time=time)
        for place, row in enumerate(lanes):
            last = self._said[row][-1] if self._open[row] else None
            name = documents[place] if documents is not None else last.document if last is not None else None
            offset = last.end if last is not None and name == last.document else 0
            if offsets is not None:
                offset = offsets[place]
            follows = last is not None and (last.document, last.end) == (name, offset)
            if last is None or not follows or (last.ids is None) != (given is None):
                last = _Said(name, offset, 0, None if given is None else [])
                self._said[row].append(last)
            last.tokens += counts[place]
            if last.ids is not None and given is not None:
                last.ids.append(given[place])
            self._open[row] = True

    def end_document(self, rows: Tensor | None = None) -> None:
        """What comes next in these rows (default: all) is another document."""
        super().end_document(rows)
        for row in rows_of(rows, None, self.rows, "rows"):
            self._open[row] = False

    def commit(
        self,
        name: str,
        *,
        row: int = 0,
        append: bool = False,
        **about: Any,
    ) -> Receipt:
        """Write all that was added to a row as a document of its namespace, and empty the row.

        The tokens are encoded again in the store's own segments, so that the document is what it would be had it been
        added as a whole. The documents underneath are refreshed: what was committed goes on being found, unless their
        filters leave it out.

        Args:
            name: of the document.
            append: to the document of this name, instead of as a new one.
            about: ``source``, ``metadata``, ``time``, ``expires``, ``replace``, see ``MemoryStore.add_document``.

        Raises:
            StoreError: there is nothing to commit, token ids are missing, or the store cannot take it; the session is
                then what it was.
        """
        said = [each for each in self._said[row] if each.tokens]
        unknown = sum(each.tokens for each in said if each.ids is None)
        if not said or unknown:
            what = f"{unknown} tokens were added without their ids" if unknown else "nothing was added"
            raise StoreError(f"row {row} of the session cannot be committed: {what}; pass ids= to add")
        ids = torch.cat([part for each in said for part in each.ids or []])
        namespace: str = self.documents.namespaces[int(self.base_rows[row])]
        receipt: Receipt
        if append:
            receipt = self.store.append(namespace, name=name, ids=ids)
        else:
            receipt = self.store.add_document(namespace, name=name, ids=ids, **about)
        self.drop(torch.tensor([row]))
        self.documents.refresh()
        return receipt

    def drop(self, rows: Tensor | None = None) -> None:
        """Forget what was added to these rows (default: all); the documents underneath are as they were."""
        chosen = rows_of(rows, None, self.rows, "rows")
        self.bank.reset(torch.tensor(chosen))
        for row in chosen:
            self._followed[row], self._said[row], self._open[row] = [], [], False

    # back to text

    def passage(self, origin: ChunkOrigin, around: int = 12, *, row: int = 0) -> Passage:
        """The text of a chunk, of the documents underneath or of a row of the session.

        Raises:
            StoreError: it is not there any more, or the session was not given its token ids.
        """
        if origin.document_id is not None:
            found: Passage = self.documents.passage(origin, around)
            return found
        end = origin.start_token + origin.length
        for line in reversed(self._said[row]):
            if line.ids and line.document == origin.document and line.offset <= origin.start_token and end <= line.end:
                first, ids = origin.start_token - line.offset, torch.cat(line.ids)
                break
        else:
            raise StoreError(f"token {origin.start_token} of row {row} has no text in this session; pass ids= to add")
        last = first + origin.length
        parts = (ids[max(0, first - around) : first], ids[first:last], ids[last : last + around])
        return Passage(*(Tokens(part.numpy().astype(np.uint32)).spelled(self.store.tokenizer) for part in parts))

    def search_text(self, query: str, *, top: int = 10, row: int = 0, around: int = 12) -> list[SearchHit]:
        """Which chunks the model's heads find for a text, see ``StoreBank.search_text``."""
        return search_text(self, query, self.store.room, top=top, row=row, around=around)


def _real_ids(ids: Sequence[Tensor] | Tensor, mask: Tensor | None, counts: list[int]) -> list[Tensor]:
    """One (t,) of real tokens for every row written, on the CPU."""
    rows = [each.detach().flatten().to("cpu", torch.long) for each in ids]
    if isinstance(ids, Tensor) and mask is not None:
        rows = [row[keep.cpu()] for row, keep in zip(rows, mask.bool(), strict=True)]
    lengths = [len(row) for row in rows]
    if lengths != counts:
        raise MemoryBankError(f"ids of {lengths} tokens must be those of the keys, {counts} real tokens in each row")
    return rows
