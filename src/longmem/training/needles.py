"""Adaptation to facts that are hidden in memory and asked for: what ``longmem eval needle`` measures.

A row of ordinary text seldom depends on one place far back. Here every row is a question whose answer stands in its
memory and nowhere else, among real text that holds nothing of the kind. Not in the paper.

B questions · T tokens of a question with its answer · S tokens per chunk
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from longmem.data.facts import draw_facts
from longmem.data.stream import IGNORE
from longmem.memory.encoded import EncodedText, TextMemory
from longmem.memory.session import SessionMemory
from longmem.progress import Progress
from longmem.training.adapt import LongMemTrainer
from longmem.training.recipe import NeedlesSection
from longmem.training.trainer import token_losses
from longmem.types import AttentionKV

RUN = 16  # segments of text that are taken from one place of the corpus
_TEXT, _STEP, _FACTS = 11, 12, 13  # what random numbers are drawn for


class Asked(NamedTuple):
    """A question with its answer: ids and targets (t,), of which only the answer counts; and what its facts left in
    memory, keys and values (tokens, Hkv, D)."""

    ids: Tensor
    targets: Tensor
    keys: Tensor
    values: Tensor


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
        self._asked: dict[int, Asked] = {}
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
        # each question is asked in `repeats` steps, one after the other, so that its facts are encoded once
        rows, fresh = self.needles.rows, max(1, self.needles.rows // self.needles.repeats)
        numbers = range(number * fresh, number * fresh + rows)
        self._asked = {at: self._asked.get(at) or self._question(at) for at in numbers}
        ids, targets, keys, values = (
            pad_sequence(list(parts), batch_first=True, padding_value=fill)
            for parts, fill in zip(zip(*self._asked.values(), strict=True), (self.pad_id, IGNORE, 0, 0), strict=True)
        )
        lengths = torch.tensor([[len(one.keys)] for one in self._asked.values()], device=keys.device)
        kept = torch.arange(keys.shape[1], device=keys.device) < lengths
        facts = self.new_bank(rows, capacity_tokens=keys.shape[1], shared=False)
        facts.add(AttentionKV(keys.transpose(1, 2), values.transpose(1, 2), kept))
        return Questions(ids, targets, SessionMemory(self._background(number, random), facts))

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

    def _background(self, number: int, random: np.random.Generator) -> TextMemory:
        """A run of the text: its length grows from the least to the most, and now and then is shorter."""
        needles, segments, window = self.needles, len(self._text.ids), self.window
        done = min(1.0, number / needles.grows) if needles.grows else 1.0
        least, most = needles.least_tokens, needles.most_tokens
        tokens = least * (most / least) ** (done * (1.0 if random.random() < 0.7 else random.random()))
        count = min(max(1, round(tokens / window)), segments)
        return self._text.run(int(random.integers(segments - count + 1)), count)

    @torch.no_grad()
    def _question(self, number: int) -> Asked:
        """Drawn by its number. Its facts are hidden in segments (n, context) of their own."""
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
        # one question at a time: other batch sizes round differently, and a resumed run encodes more at once
        kv = self.longmem.encode(torch.from_numpy(np.concatenate(parts)).to(self.args.device))
        keys, values = (part.transpose(1, 2).flatten(0, 1) for part in (kv.keys, kv.values))
        question, answer = self._tokens(facts.question), self._tokens(facts.answer)
        ids = torch.tensor(question + answer)
        targets = ids[1:].clone()
        targets[: len(question) - 1] = IGNORE
        return Asked(ids[:-1], targets, keys, values)

    def _tokens(self, text: str) -> list[int]:
        tokenizer: Any = self.tokenizer
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def _places(corpus: Any, tokens: int, window: int, random: np.random.Generator) -> Tensor:
    """About so many tokens of a corpus as segments (n, T), from runs that begin at random places."""
    segments = max(1, min(tokens, len(corpus)) // window)
    found = []
    for first in range(0, segments, RUN):
        size = min(RUN, segments - first) * window
        start = int(random.integers(len(corpus) - size + 1))
        found.append(corpus[start : start + size].astype(np.int64).reshape(-1, window))
    return torch.from_numpy(np.concatenate(found))
