"""Calibrate a reader: train the gates of a ``TrainingFree`` model, a few thousand numbers, with all else frozen.

A passage of text is encoded into memory as a user would encode it, and a later window of it is predicted with that
memory; beside it, facts told in one conversation are asked for in another. The backbone's own layers run as they are,
so keys and values of a passage are computed once and used for every window behind it.

T window tokens · n remembered layers · Hkv key/value heads · D head_dim
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from longmem.data.told import asked_ids, told_ids, told_session
from longmem.errors import ConfigError, DataError
from longmem.memory import MemoryBank
from longmem.modeling.baselines import TrainingFree
from longmem.progress import Progress
from longmem.types import AttentionKV

CLOSED = -30.0
"""Bias at which no token reads memory: what is left where calibration found nothing better than the backbone."""
FACTS = "facts"


@dataclass(frozen=True)
class CalibrationSettings:
    """How a reader is calibrated.

    Args:
        window: tokens that are predicted at once.
        memory: tokens of a text that memory holds before its last window.
        passages: of each kind of text, encoded once and used again with other windows and distractors.
        updates: steps of Adam, at most.
        scored: tokens of a window that count, drawn at random among its last three quarters.
        facts: weight of the loss on asked facts, beside 1 for text; 0 leaves them out.
        sessions: conversations that tell facts.
        learning_rate: of vectors; that of single numbers is five times as large.
        every: updates between two validations.
        patience: validations without a better one after which it ends.
        seed: of everything drawn.

    Raises:
        ConfigError: lists every setting that breaks a rule.
    """

    window: int = 1024
    memory: int = 4096
    passages: int = 24
    updates: int = 400
    scored: int = 384
    facts: float = 0.2
    sessions: int = 100
    learning_rate: float = 0.004
    every: int = 50
    patience: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"window": 8, "memory": 1, "passages": 1, "updates": 1, "scored": 1, "sessions": 4, "every": 1}
        problems = [f"{n} ({getattr(self, n)}) must be at least {m}" for n, m in least.items() if getattr(self, n) < m]
        if self.memory % self.window:
            problems.append(f"memory ({self.memory}) must be a multiple of window ({self.window})")
        if self.facts < 0 or self.learning_rate <= 0:
            problems.append("facts must be at least 0, learning_rate above 0")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True)
class Validation:
    """One look at held-out passages: nats per token by kind, and the change against the backbone alone."""

    update: int
    seconds: float
    loss: dict[str, float]
    change: dict[str, float]
    objective: float


@dataclass
class Calibration:
    """What ``calibrate`` did.

    Attributes:
        alone: nats per token of the backbone without memory, by kind.
        validations: in order; the first is before training.
        best: the one whose gates were kept; None where the backbone alone was better, and the gates were closed.
    """

    alone: dict[str, float]
    validations: list[Validation] = field(default_factory=list)
    best: Validation | None = None


@dataclass(frozen=True)
class _Passage:
    """Text, its last window at ``[len - window, len)``, and what all before that leaves in memory."""

    ids: Tensor  # (tokens + 1,)
    kv: AttentionKV  # (1, n*Hkv, tokens, D)


@dataclass(frozen=True)
class _Example:
    """Predict ``ids[p + 1]`` for every p of ``scored`` with parts of memory, each ``(kv, tokens)``."""

    kind: str
    ids: Tensor
    scored: Tensor
    memory: list[tuple[AttentionKV, int]]


def passages_of(texts: Iterable[str], tokenizer: Any, settings: CalibrationSettings, count: int) -> list[Tensor]:
    """Random passages of random texts, tokenised: (n,) ids each, enough for the memory and its window.

    Args:
        texts: of one kind.
        tokenizer: of the model.
        settings: say how long a passage is, and the seed.
        count: passages, one of each text as long as there are that many.
    """
    draw = random.Random(f"passages {settings.seed}")
    wanted = settings.memory + settings.window + 1
    long = [text for text in texts if len(text) >= 2 * wanted]
    made: list[Tensor] = []
    for number, text in enumerate(draw.sample(long, len(long))):
        if len(made) == count:
            break
        for _ in range(-(-(count - number) // len(long))):
            at = draw.randrange(max(1, len(text) - 8 * wanted))
            ids = tokenizer(text[at : at + 8 * wanted], add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= wanted:
                made.append(torch.tensor(ids[:wanted]))
    return made[:count]


def calibrate(
    model: TrainingFree,
    texts: Mapping[str, Sequence[Tensor]],
    valid: Mapping[str, Sequence[Tensor]],
    tokenizer: Any = None,
    settings: CalibrationSettings | None = None,
    *,
    quiet: bool = False,
) -> Calibration:
    """Train ``model.gates`` in place and leave the best of all validations in them.

    Args:
        model: with ``fusion="token"``.
        texts: token ids (n,) of training documents, by kind (books, source code, ...); the kinds take turns.
        valid: documents to validate on, by the same kinds.
        tokenizer: for the facts; None calibrates on text alone.
        settings: see there.
        quiet: report no progress.

    Raises:
        ConfigError: the model has no gates to train.
        DataError: a kind has no document of ``memory + window`` tokens.
    """
    settings = settings or CalibrationSettings()
    if model.gates is None:
        raise ConfigError('only fusion "token" has gates to calibrate; make the model with fusion="token"')
    draw = random.Random(settings.seed)
    work = _Work(model, settings, draw, quiet)
    weight = settings.facts if tokenizer is not None else 0.0
    passages = {kind: work.passages(kind, documents, settings.passages) for kind, documents in texts.items()}
    held = {kind: work.passages(kind, documents, 4) for kind, documents in valid.items()}
    checks = [work.window(kind, passage, last=True) for kind, some in held.items() for passage in some]
    asked: list[_Example] = []
    if weight:
        asked = work.facts(tokenizer, settings.sessions, "training")
        checks += work.facts(tokenizer, max(4, settings.sessions // 8), "validation")
    done = Calibration(work.validate(checks, memory=False))
    optimizer = _optimizer(model, settings.learning_rate)
    kept, since, began = None, 0, time.monotonic()
    kinds = list(passages)
    with Progress("calibrating", settings.updates, "updates", quiet=quiet) as progress:
        for update in range(settings.updates + 1):
            if update % settings.every == 0 or update == settings.updates:
                found = work.looked(done.alone, checks, weight, update, time.monotonic() - began)
                done.validations.append(found)
                since += 1
                if _text_change(found) <= 0 and (done.best is None or found.objective < done.best.objective):
                    kept, since = {n: t.clone() for n, t in model.gates.state_dict().items()}, 0
                    done.best = found
                if update == settings.updates or since > settings.patience:
                    break
            _set_rate(optimizer, update / settings.updates, update)
            optimizer.zero_grad()
            kind = kinds[update % len(kinds)]
            other = draw.choice(passages[draw.choice(kinds)]) if draw.random() < 0.3 else None
            work.loss(work.among(work.window(kind, draw.choice(passages[kind])), other)).backward()
            if asked:
                filler = draw.choice(passages[draw.choice(kinds)]) if draw.random() < 0.7 else None
                (weight * work.loss(work.among(draw.choice(asked), filler))).backward()
            optimizer.step()
            progress.advance(note=f"objective {done.validations[-1].objective:+.3f}")
    if kept is None:
        with torch.no_grad():
            for gate in model.gates:
                gate.bias.fill_(CLOSED)  # type: ignore[operator]
    else:
        model.gates.load_state_dict(kept)
    return done


class _Work:
    """Examples of one model and their losses."""

    def __init__(self, model: TrainingFree, settings: CalibrationSettings, draw: random.Random, quiet: bool) -> None:
        self.model, self.settings, self.draw, self.quiet = model, settings, draw, quiet
        most = 2 * settings.memory + 4096
        self.bank = MemoryBank.for_model(model, rows=1, capacity_tokens=most)

    def passages(self, kind: str, documents: Sequence[Tensor], count: int) -> list[_Passage]:
        """Encode ``count`` passages of random documents."""
        window, length = self.settings.window, self.settings.memory + self.settings.window
        long = [ids for ids in documents if len(ids) > length]
        if not long:
            raise DataError(f"{kind}: no document has {length + 1} tokens; take longer ones, or a smaller memory")
        order = self.draw.sample(range(len(long)), len(long))
        made = []
        with Progress(f"encoding {kind}", count, "passages", quiet=self.quiet) as progress:
            for number in range(count):
                document = long[order[number % len(order)]]
                start = self.draw.randrange(len(document) - length)
                ids = document[start : start + length + 1]
                parts = [self._encode(ids[at : at + window]) for at in range(0, self.settings.memory, window)]
                keys, values = (torch.cat([getattr(p, name) for p in parts], dim=2) for name in ("keys", "values"))
                made.append(_Passage(ids, AttentionKV(keys, values)))
                progress.advance()
        return made

    def facts(self, tokenizer: Any, count: int, name: str) -> list[_Example]:
        """Sessions that told facts, each with a later conversation that asks for some of them."""
        draw, made = random.Random(f"{name} {self.settings.seed}"), []
        with Progress("encoding facts", count, "conversations", quiet=self.quiet) as progress:
            for _ in range(count):
                session = told_session(draw, draw.randrange(4, 13))
                ids = torch.tensor(told_ids(session, tokenizer))
                asked = asked_ids(draw.sample(session.facts, draw.choice((1, 2, 4))), tokenizer)
                scored = torch.tensor([at - 1 for first, end in asked.values for at in range(first, end)])
                told = (self._encode(ids), len(ids))
                made.append(_Example(FACTS, torch.tensor(asked.ids), scored, [told]))
                progress.advance()
        return made

    def window(self, kind: str, passage: _Passage, *, last: bool = False) -> _Example:
        """A window of a passage behind all of its text that comes before; the last one, or any."""
        window, tokens = self.settings.window, passage.kv.keys.shape[2]
        before = tokens if last else self.draw.randrange(1, tokens // window + 1) * window
        first = window // 4
        places = sorted(self.draw.sample(range(first, window), min(self.settings.scored, window - first)))
        ids = passage.ids[before : before + window + 1]
        return _Example(kind, ids, torch.tensor(places), [(passage.kv, before)])

    def among(self, example: _Example, other: _Passage | None) -> _Example:
        """The same, with something else in memory too."""
        if other is None:
            return example
        length = self.draw.randrange(1, other.kv.keys.shape[2] // 256 + 2) * 256
        more = (other.kv, min(length, other.kv.keys.shape[2]))
        return _Example(example.kind, example.ids, example.scored, [*example.memory, more])

    def loss(self, example: _Example, *, memory: bool = True) -> Tensor:
        """Mean nats per scored token."""
        device = self.model.device
        if memory:
            self.bank.reset()
            for number, (kv, tokens) in enumerate(example.memory):
                part = AttentionKV(kv.keys[:, :, :tokens], kv.values[:, :, :tokens])
                self.bank.add(part, documents=[str(number)])
        ids, scored = example.ids.to(device), example.scored.to(device)
        found = self.model(ids[None, :-1], memory=self.bank if memory else None, logits_to_keep=scored, use_cache=False)
        return functional.cross_entropy(found.logits[0].float(), ids[scored + 1])

    @torch.no_grad()
    def validate(self, checks: Sequence[_Example], *, memory: bool = True) -> dict[str, float]:
        """Mean loss by kind."""
        losses: dict[str, list[float]] = {}
        for example in checks:
            losses.setdefault(example.kind, []).append(float(self.loss(example, memory=memory)))
        return {kind: math.fsum(some) / len(some) for kind, some in losses.items()}

    def looked(
        self, alone: dict[str, float], checks: Sequence[_Example], weight: float, update: int, seconds: float
    ) -> Validation:
        loss = self.validate(checks)
        change = {kind: loss[kind] - alone[kind] for kind in loss}
        texts = [value for kind, value in change.items() if kind != FACTS]
        objective = sum(texts) / len(texts) + weight * change.get(FACTS, 0.0)
        return Validation(update, round(seconds, 1), loss, change, objective)

    @torch.no_grad()
    def _encode(self, ids: Tensor) -> AttentionKV:
        return self.model.encode(ids[None].to(self.model.device))


def _text_change(found: Validation) -> float:
    return sum(value for kind, value in found.change.items() if kind != FACTS)


def _optimizer(model: TrainingFree, rate: float) -> torch.optim.Optimizer:
    vectors = [p for p in model.trainable_parameters() if p.ndim > 1]
    numbers = [p for p in model.trainable_parameters() if p.ndim == 1]
    groups = [{"params": vectors, "lr": rate, "top": rate}, {"params": numbers, "lr": 5 * rate, "top": 5 * rate}]
    return torch.optim.Adam(groups, betas=(0.9, 0.99))


def _set_rate(optimizer: torch.optim.Optimizer, part: float, update: int) -> None:
    """Twenty updates of warm-up, then half a cosine down to a tenth."""
    factor = min(1.0, (update + 1) / 20) * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, part))))
    for group in optimizer.param_groups:
        group["lr"] = factor * group["top"]
