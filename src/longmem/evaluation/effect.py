"""What reading memory at a layer is worth: measured by its effect on the backbone's own predictions.

A key that is found is not yet a memory that helps. So facts are told in one conversation and asked for in another, and
text is read with its earlier part in memory, while one layer, or a set of layers, reads memory without any training
(one softmax over local and retrieved tokens). What the whole context in the window is worth stands beside it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from longmem.config import TrainingFreeConfig
from longmem.data.told import asked_ids, told_ids, told_session
from longmem.errors import ConfigError
from longmem.memory import MemoryBank
from longmem.modeling.families import Family
from longmem.modeling.training_free import TrainingFree
from longmem.progress import Progress
from longmem.types import AttentionKV

MOST_LAYERS = 4


@dataclass(frozen=True)
class Effect:
    """One way of reading.

    ``layers`` that read memory (none is the backbone alone); ``facts``: mean log probability of the tokens of the
    values asked for, nats, None without a tokenizer; ``text``: mean nats per token of the windows of text, None without
    text.
    """

    layers: tuple[int, ...]
    facts: float | None
    text: float | None


@dataclass
class EffectReport:
    """What ``measure_effect`` found.

    Attributes:
        alone: the backbone without memory.
        context: with everything that was told in its window.
        single: every layer by itself.
        sets: the best set of each size, each one layer larger than the one before.
        best: the set of these that is worth most.
    """

    alone: Effect
    context: Effect
    single: list[Effect] = field(default_factory=list)
    sets: list[Effect] = field(default_factory=list)
    best: tuple[int, ...] = ()

    def worth(self, effect: Effect) -> float:
        """Nats gained against the backbone alone: of the facts where there are any, else of text."""
        if effect.facts is not None and self.alone.facts is not None:
            return effect.facts - self.alone.facts
        assert effect.text is not None and self.alone.text is not None
        return self.alone.text - effect.text

    def recovered(self, effect: Effect) -> float:
        """The share of what the context in the window is worth."""
        whole = self.worth(self.context)
        return self.worth(effect) / whole if whole > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the worth of every effect."""
        return asdict(self) | {"recovered": {str(e.layers): self.recovered(e) for e in [*self.single, *self.sets]}}


class _Case(NamedTuple):
    """Ids with scored places (the next token counts), behind what was read before."""

    ids: Tensor
    scored: Tensor
    before: Tensor
    kv: AttentionKV  # of every candidate layer, (1, n*Hkv, T, D)
    fact: bool


def measure_effect(
    model: PreTrainedModel,
    texts: Sequence[Tensor] = (),
    tokenizer: Any = None,
    *,
    layers: Sequence[int] | None = None,
    most: int = MOST_LAYERS,
    sessions: int = 4,
    window: int = 512,
    num_retrieved: int = 64,
    chunk_size: int = 4,
    seed: int = 0,
    quiet: bool = False,
) -> EffectReport:
    """Measure layers one by one, then sets: the best layer, and the one that adds most to it, and so on.

    Args:
        texts: token ids (n,) of documents; the last ``window`` tokens are predicted, the rest is in memory.
        tokenizer: for the facts; None measures text alone.
        layers: candidates; None is every layer that can be remembered.
        most: layers in a set.
        sessions: conversations that tell eight facts each.

    Raises:
        ConfigError: there is neither text nor a tokenizer.
        BackboneError: a layer cannot be remembered, or the family does not give its local scores.
    """
    if not texts and tokenizer is None:
        raise ConfigError("there is nothing to measure with; give texts, or a tokenizer for facts")
    candidates = tuple(Family.of(model).memory_layers() if layers is None else sorted(layers))
    work = _Work(model, candidates, {"num_retrieved": num_retrieved, "chunk_size": chunk_size})
    cases = [work.case(ids[-window - 1 :], range(window // 2, window), ids[: -window - 1]) for ids in texts]
    if tokenizer is not None:
        cases += _fact_cases(work, tokenizer, sessions, seed)
    report = EffectReport(work.effect(cases, ()), work.effect(cases, (), in_context=True))
    total = len(candidates) * most - most * (most - 1) // 2
    with Progress("measuring layers", total, "sets", quiet=quiet) as progress:
        best: tuple[int, ...] = ()
        for size in range(1, min(most, len(candidates)) + 1):
            tried = []
            for layer in candidates:
                if layer not in best:
                    tried.append(work.effect(cases, tuple(sorted((*best, layer)))))
                    progress.advance(note=f"layers {', '.join(map(str, tried[-1].layers))}")
            if size == 1:
                report.single = tried
            report.sets.append(max(tried, key=report.worth))
            best = report.sets[-1].layers
    report.best = max(report.sets, key=report.worth).layers
    return report


def _fact_cases(work: _Work, tokenizer: Any, sessions: int, seed: int) -> list[_Case]:
    draw, cases = random.Random(seed), []
    for _ in range(sessions):
        session = told_session(draw, 8)
        before = torch.tensor(told_ids(session, tokenizer))
        for fact in session.facts:
            asked = asked_ids([fact], tokenizer)
            first, end = asked.values[0]
            cases.append(work.case(torch.tensor(asked.ids), range(first - 1, end - 1), before, fact=True))
    return cases


class _Work:
    """The backbone, read at any set of the candidate layers."""

    def __init__(self, model: PreTrainedModel, candidates: tuple[int, ...], settings: dict[str, Any]) -> None:
        self.model, self.candidates, self.settings = model, candidates, settings
        self.all = self._reader(candidates)
        self.heads = self.all.memory_heads
        self._encoded: tuple[Tensor, AttentionKV] | None = None

    def case(self, ids: Tensor, scored: range, before: Tensor, *, fact: bool = False) -> _Case:
        if self._encoded is None or self._encoded[0] is not before:  # facts of one conversation follow each other
            self._encoded = (before, self.all.encode(before[None].to(self.all.device)))
        return _Case(ids, torch.tensor(list(scored)), before, self._encoded[1], fact)

    @torch.no_grad()
    def effect(self, cases: Sequence[_Case], layers: tuple[int, ...], in_context: bool = False) -> Effect:
        """Of reading at these layers; ``in_context``: of everything in the window, what memory could be worth at
        most."""
        reader = self._reader(layers) if layers else None
        losses: dict[bool, list[float]] = {True: [], False: []}
        for case in cases:
            ids = (torch.cat([case.before, case.ids]) if in_context else case.ids).to(self.all.device)
            scored = case.scored.to(ids.device) + (len(case.before) if in_context else 0)
            logits = self._logits(ids[None, :-1], scored, reader, case, layers)
            losses[case.fact].append(float(functional.cross_entropy(logits.float(), ids[scored + 1])))
        facts, text = (sum(some) / len(some) if some else None for some in (losses[True], losses[False]))
        return Effect(layers, None if facts is None else -facts, text)

    def _logits(self, ids: Tensor, scored: Tensor, reader: TrainingFree | None, case: _Case, layers: Any) -> Tensor:
        bank = None
        if reader is not None:
            size = reader.config.chunk_size
            bank = MemoryBank.for_model(reader, rows=1, capacity_tokens=-(-case.kv.keys.shape[2] // size) * size)
            places = [self.candidates.index(layer) for layer in layers]
            heads = [head for place in places for head in range(place * self.heads, (place + 1) * self.heads)]
            bank.add(AttentionKV(case.kv.keys[:, heads], case.kv.values[:, heads]))
        logits: Tensor = (reader or self.all)(ids, memory=bank, logits_to_keep=scored, use_cache=False).logits[0]
        return logits

    def _reader(self, layers: tuple[int, ...]) -> TrainingFree:
        config = TrainingFreeConfig(memory_layers=layers, fusion="softmax", gate=0.5, **self.settings)
        known = None if layers == self.candidates else self.all.fingerprint  # hashing all weights takes seconds
        return TrainingFree(config, self.model, fingerprint=known)
