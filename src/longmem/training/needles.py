"""Facts that are hidden in memory and asked for: what ``longmem eval needle`` measures. Not in the paper.

A row of ordinary text seldom depends on one place far back. Here every row is a question whose answer is in its memory
and nowhere else, among real text that holds nothing of the kind.

B questions · T tokens of a segment of text · t of a question with its answer · n remembered layers · Hkv key/value
heads · D head_dim
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from longmem.data.facts import draw_facts
from longmem.data.stream import IGNORE
from longmem.data.tokens import TokenCorpus
from longmem.memory import MemoryBank
from longmem.memory.session import EncodedText, SessionMemory
from longmem.progress import Progress
from longmem.training.recipe import NeedlesSection
from longmem.types import AttentionKV

RUN = 16  # segments of text that are taken from one place of the corpus
_TEXT, _STEP, _FACTS = 11, 12, 13  # what random numbers are drawn for


class Asked(NamedTuple):
    """A question with its answer: ids and targets (t,), of which only the answer counts; and what its facts left in
    memory, keys and values (tokens, n*Hkv, D)."""

    ids: Tensor
    targets: Tensor
    keys: Tensor
    values: Tensor


class Questions(NamedTuple):
    """A batch of them, (B, t), and what they are asked of."""

    ids: Tensor
    targets: Tensor
    memory: SessionMemory


class NeedleStream:
    """Batches of questions for a ``LongMemTrainer``, in place of segments of text.

    Real text is encoded once, before the first question. For each question memory is a run of that text, the same for
    all questions of a step, and its own facts, each in two short segments of other text, at a random place and so now
    and then cut in two. Memory grows in the course of the run. Everything is a function of the seed and of how many
    batches have been taken.

    Args:
        model: whose backbone encodes text and facts.
        window: T.
        memory_dtype: of the facts' keys and values.
        rank: of this process, which asks questions of its own.
    """

    epoch = 0.0

    def __init__(
        self,
        model: Any,
        corpus: TokenCorpus,
        tokenizer: Any,
        settings: NeedlesSection,
        *,
        window: int,
        memory_dtype: torch.dtype,
        seed: int = 1,
        rank: int = 0,
        quiet: bool = False,
    ) -> None:
        self.model, self.corpus, self.tokenizer, self.settings = model, corpus, tokenizer, settings
        self.window, self.memory_dtype, self.seed, self.rank = window, memory_dtype, seed, rank
        self.quiet, self._taken = quiet, 0
        self._asked: dict[int, Asked] = {}

    def next(self) -> Questions:
        """The next questions."""
        settings, number, self._taken = self.settings, self._taken, self._taken + 1
        # each question is asked in `repeats` steps, one after the other, so that its facts are encoded once
        rows, fresh = settings.rows, max(1, settings.rows // settings.repeats)
        numbers = range(number * fresh, number * fresh + rows)
        self._asked = {at: self._asked.get(at) or self._question(at) for at in numbers}
        ids, targets, keys, values = (
            pad_sequence(list(parts), batch_first=True, padding_value=fill)
            for parts, fill in zip(zip(*self._asked.values(), strict=True), (0, IGNORE, 0, 0), strict=True)
        )
        lengths = torch.tensor([[len(one.keys)] for one in self._asked.values()], device=keys.device)
        kept = torch.arange(keys.shape[1], device=keys.device) < lengths
        facts = MemoryBank.for_model(self.model, rows, keys.shape[1], dtype=self.memory_dtype)
        facts.add(AttentionKV(keys.transpose(1, 2), values.transpose(1, 2), kept))
        return Questions(ids, targets, SessionMemory(self._background(number), facts))

    def state_dict(self) -> dict[str, Any]:
        """How many batches were taken."""
        return {"taken": self._taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._taken = int(state["taken"])

    @cached_property
    def _text(self) -> EncodedText:
        """About ``text_tokens`` of the corpus in segments (n, T), from runs that begin at random places."""
        random, corpus = np.random.default_rng([self.seed, _TEXT]), self.corpus.ids
        segments, found = max(1, min(self.settings.text_tokens, len(corpus)) // self.window), []
        for first in range(0, segments, RUN):
            size = min(RUN, segments - first) * self.window
            start = int(random.integers(len(corpus) - size + 1))
            found.append(corpus[start : start + size].astype(np.int64).reshape(-1, self.window))
        ids = torch.from_numpy(np.concatenate(found))
        with Progress("encoding what facts are hidden in", len(ids), "segments", quiet=self.quiet) as progress:
            return EncodedText(self.model, ids, lambda done: progress.advance())

    def _background(self, number: int) -> MemoryBank:
        """A run of the text: its length grows from the least to the most, and now and then is shorter."""
        random = np.random.default_rng([self.seed, _STEP, number, self.rank])
        random.random()  # runs that mixed in steps of text drew it: the same seed still gives the same run
        settings, segments = self.settings, len(self._text.ids)
        done = min(1.0, number / settings.grows) if settings.grows else 1.0
        least, most = settings.least_tokens, settings.most_tokens
        tokens = least * (most / least) ** (done * (1.0 if random.random() < 0.7 else random.random()))
        count = min(max(1, round(tokens / self.window)), segments)
        return self._text.run(int(random.integers(segments - count + 1)), count)

    @torch.no_grad()
    def _question(self, number: int) -> Asked:
        """Drawn by its number. Its facts are hidden in segments (n, context) of their own."""
        settings, random = self.settings, np.random.default_rng([self.seed, _FACTS, number, self.rank])
        facts = draw_facts(settings.kinds[int(random.integers(len(settings.kinds)))], random)
        parts = []
        for sentence in (*facts.asked, *facts.others):
            tokens = self._tokens(sentence)
            size = max(2, -(-len(tokens) // settings.context)) * settings.context
            start = int(random.integers(self.corpus.num_tokens - size))
            text = self.corpus.ids[start : start + size].astype(np.int64)
            place = int(random.integers(size - len(tokens) + 1))
            text[place : place + len(tokens)] = tokens
            parts.append(text.reshape(-1, settings.context))
        # one question at a time: other batch sizes round differently, and a resumed run encodes more at once
        kv = self.model.encode(torch.from_numpy(np.concatenate(parts)).to(self.model.device))
        keys, values = (part.transpose(1, 2).flatten(0, 1) for part in (kv.keys, kv.values))
        question, answer = self._tokens(facts.question), self._tokens(facts.answer)
        ids = torch.tensor(question + answer)
        targets = ids[1:].clone()
        targets[: len(question) - 1] = IGNORE
        return Asked(ids[:-1], targets, keys, values)

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids
