"""Score continuations whose contexts may be longer than the window: what does not fit is read into a memory of its own.

B rows · T window tokens · V vocabulary
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longmem.memory import MemoryBank
from longmem.types import AttentionKV


@dataclass(frozen=True)
class Question:
    """What a model sees, and what it is asked for.

    Attributes:
        number: given back with the answer.
        before: tokens that do not fit the window: all that lies before ``inputs``.
        inputs: tokens in the window, at least one.
        targets: tokens that follow the last ``len(targets)`` inputs.
    """

    number: int
    before: Sequence[int]
    inputs: Sequence[int]
    targets: Sequence[int]

    @classmethod
    def of(cls, number: int, tokens: Sequence[int], scored: int, window: int) -> Question:
        """About the last ``scored`` of ``tokens``, with as much before them in the window as fits."""
        start = max(0, len(tokens) - 1 - window)
        return cls(number, tokens[:start], tokens[start:-1], tokens[-scored:])


@dataclass(frozen=True)
class Answer:
    """Log-probability of the targets in nats, and whether each is the model's first choice."""

    number: int
    logprob: float
    greedy: bool


@dataclass(eq=False)
class _Lane:
    """Questions about one text, each beginning where the one before it did, or later."""

    questions: deque[Question]
    row: int
    written: int = 0


@dataclass
class Reader:
    """A model and the memory of one batch; every row is reset between two texts.

    Attributes:
        model: reads memory if it can; any other causal language model ignores what does not fit.
        window: T, also the segments in which text is read into memory.
        rows: B.
        memory_size: tokens that a row remembers; None is no memory.
        device: where the model is.
    """

    model: Any
    window: int
    rows: int
    memory_size: int | None
    device: torch.device | str = "cpu"
    bank: MemoryBank | None = field(default=None, init=False)

    def answer(self, texts: Sequence[Sequence[Question]]) -> Iterator[Answer]:
        """Answers, in no particular order.

        Args:
            texts: the questions about each text; what lies before a question begins with what lay before the last one.
        """
        self.open(max((len(text[-1].before) for text in texts), default=0))
        waiting = deque(sorted(texts, key=lambda text: -len(text[-1].before) - len(text[-1].inputs)))
        free, lanes = list(range(self.rows))[::-1], list[_Lane]()
        while waiting or lanes:
            while waiting and free:
                lanes.append(_Lane(deque(waiting.popleft()), free.pop()))
            self._fill(lanes)
            yield from self._score(lanes)
            for lane in [lane for lane in lanes if not lane.questions]:
                lanes.remove(lane)
                free.append(lane.row)
                if self.bank is not None:
                    self.bank.reset(torch.tensor([lane.row]))

    def open(self, longest: int) -> None:
        """Make a bank for texts that leave at most so many tokens in memory; none where nothing is to be remembered."""
        self.bank = None
        if self.memory_size is not None and longest > 0:
            chunk = self.model.config.chunk_size
            # a bank larger than the longest text is never filled: do not reserve it
            capacity = min(self.memory_size, -(-longest // chunk) * chunk)
            self.bank = MemoryBank.for_model(self.model, self.rows, capacity)

    @torch.no_grad()
    def read(self, texts: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Read tokens into rows of the bank, segment by segment, all rows side by side: (row, tokens)."""
        if self.bank is None:
            return
        for start in range(0, max((len(tokens) for _, tokens in texts), default=0), self.window):
            parts = [(row, tokens[start : start + self.window]) for row, tokens in texts if len(tokens) > start]
            ids, real = padded([tokens for _, tokens in parts], self.device)
            kv = self.model.encode(ids, real.long())
            self.bank.add(AttentionKV(kv.keys, kv.values, real), rows=torch.tensor([row for row, _ in parts]))

    def _fill(self, lanes: Sequence[_Lane]) -> None:
        """Bring every lane's memory up to what lies before its next question."""
        if self.bank is None:
            return
        texts, ended = [], []
        for lane in lanes:
            before = lane.questions[0].before
            texts.append((lane.row, before[lane.written :]))
            # the tail short of a chunk is closed where nothing is to follow it
            if len(before) > lane.written and len(lane.questions[-1].before) == len(before):
                ended.append(lane.row)
            lane.written = len(before)
        self.read(texts)
        if ended:
            self.bank.end_document(torch.tensor(ended))

    @torch.no_grad()
    def _score(self, lanes: Sequence[_Lane]) -> list[Answer]:
        asked = [lane.questions.popleft() for lane in lanes]
        ids, _ = padded([question.inputs for question in asked], self.device)
        first = min(len(question.inputs) - len(question.targets) for question in asked)
        reads: dict[str, Any] = {}
        if self.bank is not None:
            reads = {"memory": self.bank, "memory_rows": torch.tensor([lane.row for lane in lanes])}
        logits = self._logits(ids, ids.shape[1] - first, reads)
        return [_answer(question, row, first) for question, row in zip(asked, logits, strict=True)]

    def _logits(self, ids: Tensor, keep: int, reads: dict[str, Any]) -> Tensor:
        """(B, keep, V); a model that does not know ``logits_to_keep`` gives all."""
        known = "logits_to_keep" in inspect.signature(type(self.model).forward).parameters
        some = {"logits_to_keep": keep} if known else {}
        logits: Tensor = self.model(input_ids=ids, use_cache=False, **some, **reads).logits
        return logits[:, -keep:]


def _answer(question: Question, logits: Tensor, first: int) -> Answer:
    last = len(question.inputs) - first
    scored = logits[last - len(question.targets) : last].float()
    targets = torch.tensor(question.targets, device=logits.device)
    chosen = scored.log_softmax(-1).gather(1, targets[:, None])
    return Answer(question.number, chosen.sum().item(), bool((scored.argmax(-1) == targets).all()))


def padded(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Ids (B, T), padded at their ends where a causal model cannot look, and which are real (B, T) bool."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        real[number, : len(row)] = True
    return ids.to(device), real.to(device)
