"""The local window of a running ``generate``: what has left it is in memory, what is left is read from its beginning.

B rows of the batch · T tokens generated or given so far · W window
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StoppingCriteriaList

from longmem.errors import ConfigError, MemoryBankError
from longmem.generation.memories import is_session
from longmem.generation.policy import WindowPolicy
from longmem.generation.reading import THIS_TEXT, cut, write
from longmem.memory.rows import BankRows
from longmem.memory.session import SessionMemory
from longmem.types import Memory


@dataclass(frozen=True)
class LocalInputs:
    """What the model is to see next.

    Attributes:
        input_ids: (B, t).
        attention_mask: (B, t or cached + t), 0 at pads; None where there are none.
        position_ids: (B, t).
        next_sequence_length: how many of the ids are new to the cache; None is all of them.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    next_sequence_length: int | None


class LocalWindow:
    """Cuts every input of the model to the window and moves what is older to the session.

    How much of a row has moved depends on how long its text is and on nothing else; rows of different lengths are
    left-padded. So a row of a batch is that row alone, and going on later is going on now.

    Args:
        model: whose ``encode`` makes keys and values.
        session: is written.
        rows: the session's row of every batch row.
        policy: how long the window is, and how much moves.
        input_ids: (B, T), the prompts, left-padded.
        attention_mask: (B, T), or None.
        room: tokens that must fit behind the prompts because text cannot move once it has begun to differ; 0 where
            it can.
    """

    def __init__(
        self,
        model: Any,
        session: SessionMemory | BankRows,
        rows: Sequence[int],
        policy: WindowPolicy,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        room: int,
    ) -> None:
        self.model, self.session, self.rows, self.policy = model, session, list(rows), policy
        self._width = input_ids.shape[1]
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self._prompts = [line[keep.bool()] for line, keep in zip(input_ids, real, strict=True)]
        self._starts = [self._already_written(row, ids) for row, ids in zip(self.rows, self._prompts, strict=True)]
        self._done: Tensor | None = None
        self._begun = False
        self._moves = room == 0
        for ids, start in zip(self._prompts, self._starts, strict=True):
            pieces = policy.pieces_over(len(ids) - start + room)
            if len(ids) - start - pieces * policy.move < 1:
                raise ConfigError(
                    f"{room} more tokens do not fit a window of {policy.window} behind a prompt of {len(ids)}: beams "
                    "and assistants cannot move text to memory on the way; use a larger window, fewer new tokens, or "
                    "num_beams=1 without an assistant"
                )
        self._move(input_ids, 0, room)

    def inputs(self, input_ids: Tensor, cache: Cache | None, next_sequence_length: int | None) -> LocalInputs:
        """What to feed for texts (B, T) that begin with the prompts; moves what no longer fits."""
        grown = input_ids.shape[1] - self._width
        if self._moves and self._move(input_ids, grown, 0):
            self._begun = False
        lengths = [len(ids) + grown - start for ids, start in zip(self._prompts, self._starts, strict=True)]
        width = max(lengths)
        afresh = not self._begun or cache is None or next_sequence_length is None
        if afresh and cache is not None:
            cache.reset()
        self._begun = True
        pads = torch.tensor([[width - length] for length in lengths], device=input_ids.device)
        place = torch.arange(width, device=input_ids.device)
        mask = (place >= pads).long() if min(lengths) < width else None
        if not afresh:
            assert next_sequence_length is not None
            positions = (place[-next_sequence_length:] - pads).clamp(min=0)
            return LocalInputs(input_ids, mask, positions, next_sequence_length)
        local = torch.zeros(len(lengths), width, dtype=input_ids.dtype, device=input_ids.device)
        for line, length in enumerate(lengths):
            local[line, width - length :] = self._text(input_ids, line)[-length:]
        return LocalInputs(local, mask, (place - pads).clamp(min=0), None)

    def hidden(self, line: int = 0) -> int:
        """How many tokens of the prompt of a batch row the model does not see directly."""
        return self._starts[line] + self._width - len(self._prompts[line])

    def watched(self, criteria: StoppingCriteriaList) -> StoppingCriteriaList:
        """The same criteria, which also tell the window what has ended: pads behind an end are nobody's text."""
        return _Watched(criteria, self._note_done)

    def _note_done(self, done: Tensor) -> None:
        self._done = done if self._done is None else self._done | done

    def _text(self, input_ids: Tensor, line: int) -> Tensor:
        """All real tokens of a row."""
        return torch.cat((self._prompts[line], input_ids[line, self._width :]))

    def _move(self, input_ids: Tensor, grown: int, room: int) -> bool:
        """Move what no longer fits, piece after piece of all rows in turn; whether anything moved."""
        counts = [
            self.policy.pieces_over(len(ids) + grown - start + room)
            for ids, start in zip(self._prompts, self._starts, strict=True)
        ]
        if not any(counts):
            return False
        ended = [False] * len(counts) if self._done is None else self._done.tolist()
        turns, written = [], set[int]()
        for line, count in enumerate(counts):
            row, begin = self.rows[line], self._starts[line]
            self._starts[line] += count * self.policy.move
            if count and not ended[line] and row not in written:
                written.add(row)  # beams share the row of their prompt, which is written once
                text = self._text(input_ids, line)
                turns.append(cut(text, begin, self._starts[line], self.policy.move, self.policy.overlap, row))
                self.session.follow(row, text[begin : self._starts[line]])
        longest = max(map(len, turns), default=0)
        pieces = [some[turn] for turn in range(longest) for some in turns if turn < len(some)]
        for _ in write(self.model, self.session, pieces, THIS_TEXT):
            pass
        return True

    def _already_written(self, row: int, ids: Tensor) -> int:
        """How much of a text an earlier call has moved; anything else that the session followed is at an end."""
        known = self.session.followed(row)
        if len(known) < len(ids) and torch.equal(known, ids[: len(known)].cpu()):
            return len(known)
        self.session.end_document(torch.tensor([row]))
        return 0


class _Watched(StoppingCriteriaList):
    def __init__(self, criteria: StoppingCriteriaList, note: Callable[[Tensor], None]) -> None:
        super().__init__(criteria)
        self._note = note

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        done = super().__call__(input_ids, scores, **kwargs)
        self._note(done)
        return done


def open_window(
    model: Any,
    memory: Memory | None,
    memory_rows: Tensor | None,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    settings: Any,
    *,
    copies: int,
    moves: bool,
) -> LocalWindow | None:
    """The window of a ``generate`` about to start; None where all of it fits and no session follows it.

    Args:
        model: the LongMem that generates.
        memory: what it reads.
        memory_rows: (B,) the memory's row of every batch row.
        input_ids: (B, T) prompts, each ``copies`` times.
        attention_mask: (B, T) or None.
        settings: the generation config, lengths filled in.
        copies: how often each prompt is there, for beams or several sequences.
        moves: whether text may move to memory while it is generated. Beams and assisted decoding cannot: what they try
            is taken back.

    Raises:
        ConfigError: if the settings of the window contradict each other, or too little room is left.
        MemoryBankError: if two sequences would be written to one row of the caller's session.
    """
    session = memory if is_session(memory) else None
    chunk_size = model.config.chunk_size if memory is None else memory.chunk_size
    policy = WindowPolicy.of(settings, model, chunk_size)
    longest = settings.max_length - 1  # the last token is not read
    if policy is None or (session is None and longest <= policy.window):
        return None
    room = 0 if moves else longest - input_ids.shape[1]
    if session is not None:
        assert memory_rows is not None
        rows = memory_rows.tolist()
        if moves and len(set(rows)) < len(rows) and longest > policy.window:
            raise MemoryBankError(
                f"the session's rows ({rows}) must each follow one text; give every sequence a row of its own, or pass "
                "the memory without a session"
            )
    else:
        each = 1 if moves else copies  # sequences that differ need rows that differ, beams read their prompt's
        rows = [line // each for line in range(input_ids.shape[0])]
        capacity = min(policy.session_tokens, -(-longest // chunk_size) * chunk_size)
        base_rows = None if memory_rows is None else memory_rows[::each]
        session = SessionMemory.for_model(model, memory, rows[-1] + 1, capacity, base_rows)
    return LocalWindow(model, session, rows, policy, input_ids, attention_mask, room)
