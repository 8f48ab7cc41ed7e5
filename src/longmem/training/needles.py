"""Adaptation to facts that are hidden in memory and asked for: what ``longmem eval needle`` measures.

A row of ordinary text seldom depends on one place far back. Here every row is a question whose answer stands in its
memory and nowhere else, among real text that holds nothing of the kind. Not in the paper.

B questions · T tokens of a question with its answer · S tokens per chunk
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from longmem.data.facts import draw_facts
from longmem.data.stream import IGNORE
from longmem.memory import MemoryBank
from longmem.memory.encoded import EncodedText, TextMemory
from longmem.memory.session import SessionMemory
from longmem.progress import Progress
from longmem.training.adapt import LongMemTrainer
from longmem.training.recipe import NeedlesSection
from longmem.training.trainer import token_losses
from longmem.types import AttentionKV

RUN = 16  # segments of text that are taken from one place of the corpus
_TEXT, _STEP, _FACTS = 11, 12, 13  # what random numbers are drawn for


class _Asked(NamedTuple):
    """A question with its answer, (t,); tokens of the answer; keys and values of its facts, (Hkv, tokens, D) each."""

    ids: Tensor
    answer: int
    kv: tuple[Tensor, Tensor]


class Questions(NamedTuple):
    """A batch of them, and what they are asked of."""

    ids: Tensor
    targets: Tensor
    memory: SessionMemory


class NeedleTrainer(LongMemTrainer):
    """A ``LongMemTrainer`` that asks questions, ``[needles]`` of a recipe, at a share of its batches.

    What memory holds does not depend on who reads it, so real text is encoded once, before training. For each question
    memory is a run of that text, the same for all questions of a step, and its own facts, each in two short segments of
    other text, at a random place and so now and then cut in two. Memory grows in the course of the run. Everything is
    a function of the seed and of how many batches have been taken.
    """

    def __init__(self, *args: Any, needles: NeedlesSection, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.needles, self.corpus, self.seed = needles, self.stream.corpus, self.args.seed
        self._taken = 0
        self._asked: deque[tuple[int, _Asked]] = deque()
        random = np.random.default_rng([self.seed, _TEXT])
        ids = _places(self.corpus.ids, needles.text_tokens, self.window, random)
        with Progress("encoding what facts are hidden in", len(ids), "segments", quiet=self.quiet) as progress:
            self._text = EncodedText(self.longmem, ids, lambda done: progress.advance())

    def next_batch(self) -> Any:
        """Questions, or segments of text as ever."""
        number, self._taken = self._taken, self._taken + 1
        random = np.random.default_rng([self.seed, _STEP, number, self.args.process_index])
        if random.random() >= self.needles.share:
            return super().next_batch()
        asked = self._questions(number)
        memory = SessionMemory(self._background(number, random), self._facts(asked))
        return Questions(*_rows(asked, self.pad_id), memory)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross entropy, in nats, over the tokens of the answers."""
        if not isinstance(inputs, Questions):
            return super().compute_loss(model, inputs, return_outputs)
        targets = inputs.targets.to(self.args.device)
        out = model(input_ids=inputs.ids.to(self.args.device), memory=inputs.memory, use_cache=False)
        losses, counted = token_losses(out.logits, targets), targets != IGNORE
        self.practice.add(losses, counted)
        self._share = None if out.share is None else out.share.detach()
        loss = losses.sum() / counted.sum()
        return (loss, out) if return_outputs else loss

    def own_state(self) -> dict[str, Any]:
        return super().own_state() | {"taken": self._taken}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        super().load_own_state(state)
        self._taken = int(state["taken"])
        self._asked.clear()

    def _background(self, number: int, random: np.random.Generator) -> TextMemory:
        """A run of the text: its length grows from the least to the most, and now and then is shorter."""
        needles, segments, window = self.needles, len(self._text.ids), self.window
        done = min(1.0, number / needles.grows) if needles.grows else 1.0
        least, most = needles.least_tokens, needles.most_tokens
        tokens = least * (most / least) ** (done * (1.0 if random.random() < 0.7 else random.random()))
        count = min(max(1, round(tokens / window)), segments)
        return self._text.run(int(random.integers(segments - count + 1)), count)

    def _questions(self, number: int) -> list[_Asked]:
        """Each question is asked in ``repeats`` steps, one after the other, so that its facts are encoded once."""
        needles = self.needles
        fresh = max(1, needles.rows // needles.repeats)
        first = number * fresh
        while self._asked and self._asked[0][0] < first:
            self._asked.popleft()
        begin = self._asked[-1][0] + 1 if self._asked else first
        for at in range(begin, first + needles.rows):
            segments, ids, answer = self._draw(at)
            self._asked.append((at, _Asked(ids, answer, self._encode(segments))))
        return [asked for _, asked in self._asked]

    def _draw(self, number: int) -> tuple[Tensor, Tensor, int]:
        """Segments (n, context) with the facts in them, the question with its answer, and the answer's length."""
        needles = self.needles
        random = np.random.default_rng([self.seed, _FACTS, number, self.args.process_index])
        facts = draw_facts(needles.kinds[int(random.integers(len(needles.kinds)))], random)
        parts = []
        for sentence in (*facts.asked, *facts.others):
            tokens = self._tokens(sentence)
            size = max(2, -(-len(tokens) // needles.context)) * needles.context
            start = int(random.integers(self.corpus.num_tokens - size))
            text = self.corpus.ids[start : start + size].astype(np.int64)
            place = int(random.integers(size - len(tokens) + 1))
            text[place : place + len(tokens)] = tokens
            parts.append(text.reshape(-1, needles.context))
        question, answer = self._tokens(facts.question), self._tokens(facts.answer)
        return torch.from_numpy(np.concatenate(parts)), torch.tensor(question + answer), len(answer)

    @torch.no_grad()
    def _encode(self, segments: Tensor) -> tuple[Tensor, Tensor]:
        """What segments (n, context) leave in memory, (Hkv, n * context, D) each.

        One question at a time: other batch sizes round differently, and a resumed run encodes more at once.
        """
        kv = self.longmem.encode(segments.to(self.args.device))
        return kv.keys.transpose(0, 1).flatten(1, 2), kv.values.transpose(0, 1).flatten(1, 2)

    def _facts(self, asked: Sequence[_Asked]) -> MemoryBank:
        """A row for each question."""
        parts = [pad_sequence([one.kv[i].transpose(0, 1) for one in asked], batch_first=True) for i in (0, 1)]
        keys, values = (part.transpose(1, 2) for part in parts)
        lengths = torch.tensor([[one.kv[0].shape[1]] for one in asked], device=keys.device)
        longest = keys.shape[2]
        bank = self.new_bank(len(asked), capacity_tokens=longest, shared=False)
        bank.add(AttentionKV(keys, values, torch.arange(longest, device=keys.device) < lengths))
        return bank

    def _tokens(self, text: str) -> list[int]:
        tokenizer: Any = self.tokenizer
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def _rows(asked: Sequence[_Asked], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and targets (B, T); targets are the answers' tokens."""
    width = max(len(one.ids) for one in asked) - 1
    ids = torch.full((len(asked), width), pad_id)
    targets = torch.full((len(asked), width), IGNORE)
    for row, one in enumerate(asked):
        last = len(one.ids) - 1
        ids[row, :last] = one.ids[:-1]
        targets[row, last - one.answer : last] = one.ids[-one.answer :]
    return ids, targets


def _places(corpus: Any, tokens: int, window: int, random: np.random.Generator) -> Tensor:
    """About so many tokens of a corpus as segments (n, T), from runs that begin at random places."""
    segments = max(1, min(tokens, len(corpus)) // window)
    found = []
    for first in range(0, segments, RUN):
        size = min(RUN, segments - first) * window
        start = int(random.integers(len(corpus) - size + 1))
        found.append(corpus[start : start + size].astype(np.int64).reshape(-1, window))
    return torch.from_numpy(np.concatenate(found))
