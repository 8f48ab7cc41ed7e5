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

from longmem.data.facts import told_ids, told_session
from longmem.data.tokens import token_ids
from longmem.errors import ConfigError, DataError, not_a_multiple
from longmem.evaluation.layers import FACTS, Case, encode_text, facts_case, scored_loss
from longmem.memory import MemoryBank
from longmem.modeling.baselines import TrainingFree
from longmem.progress import Progress, track
from longmem.types import AttentionKV

CLOSED = -30.0
"""Bias at which no token reads memory: what is left where calibration found nothing better than the backbone."""
OTHER_BESIDE_TEXT, OTHER_BESIDE_FACTS = 0.3, 0.7
"""In how many updates another passage is in memory too, when text is predicted and when facts are asked for: what is
there is then not always what helps."""


@dataclass(frozen=True)
class CalibrationSettings:
    """How a reader is calibrated.

    Args:
        window: tokens that are predicted at once.
        memory: tokens of a text that memory holds before its last window.
        updates: steps of Adam, at most.
        scored: tokens of a window that count, drawn at random among its last three quarters.
        facts: weight of the loss on asked facts, beside 1 for text; 0 leaves them out.
        sessions: conversations that tell facts.
        learning_rate: of vectors; that of single numbers is five times as large.
        every: updates between two validations.
        patience: validations without a better one after which it ends.
        seed: of everything drawn.

    Raises:
        ConfigError: memory is no multiple of the window.
    """

    window: int = 1024
    memory: int = 4096
    updates: int = 400
    scored: int = 384
    facts: float = 0.2
    sessions: int = 100
    learning_rate: float = 0.004
    every: int = 50
    patience: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        if problems := not_a_multiple("memory", self.memory, "window", self.window):
            raise ConfigError(problems)

    @property
    def passage(self) -> int:
        """Tokens of a passage: memory, a window, and the token after it."""
        return self.memory + self.window + 1


@dataclass(frozen=True)
class Validation:
    """One look at held-out passages: nats per token by kind, and the change against the backbone alone."""

    update: int
    seconds: float
    loss: dict[str, float]
    change: dict[str, float]
    objective: float

    @property
    def text_change(self) -> float:
        """Over all kinds of text; above 0 is worse than the backbone."""
        return sum(value for kind, value in self.change.items() if kind != FACTS)


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


def passages_of(texts: Iterable[str], tokenizer: Any, settings: CalibrationSettings, count: int) -> list[Tensor]:
    """Random passages of random texts, tokenised: (n,) ids each, enough for the memory and its window.

    Args:
        texts: of one kind.
        tokenizer: of the model.
        settings: say how long a passage is, and the seed.
        count: passages, one of each text as long as there are that many.

    Raises:
        DataError: no text has a passage of more than ``memory + window`` tokens.
    """
    draw, wanted = random.Random(f"passages {settings.seed}"), settings.passage
    long = [text for text in texts if len(text) >= 2 * wanted]
    made: list[Tensor] = []
    for number, text in enumerate(draw.sample(long, len(long))):
        for _ in range(-(-(count - number) // len(long))):
            at = draw.randrange(max(1, len(text) - 8 * wanted))
            ids = token_ids(tokenizer, text[at : at + 8 * wanted])
            if len(ids) >= wanted:
                made.append(torch.tensor(ids[:wanted]))
    if not made:
        raise DataError(f"no document has {wanted} tokens; take longer ones, or a smaller memory")
    return made[:count]


def calibrate(
    model: TrainingFree,
    texts: Mapping[str, Sequence[Tensor]],
    valid: Mapping[str, Sequence[Tensor]],
    tokenizer: Any,
    settings: CalibrationSettings,
    *,
    quiet: bool = False,
) -> Calibration:
    """Train ``model.gates`` in place and leave the best of all validations in them.

    Args:
        model: with ``fusion="token"``.
        texts: token ids (n,) of passages to train on, see ``passages_of``, by kind (books, source code, ...); the kinds
            take turns.
        valid: passages to validate on, one window of each, by the same kinds.
        tokenizer: for the facts.
        settings: see there.
        quiet: report no progress.
    """
    assert model.gates is not None
    work = _Work(model, settings, quiet)
    draw, weight = work.draw, settings.facts
    passages = {kind: work.passages(kind, some) for kind, some in texts.items()}
    checks = [work.window(each, last=True) for kind, some in valid.items() for each in work.passages(kind, some)]
    asked: list[Case] = []
    if weight:
        asked = work.facts(tokenizer, settings.sessions, "training")
        checks += work.facts(tokenizer, max(4, settings.sessions // 8), "validation")
    done = Calibration(work.validate(checks, memory=False))
    rates = {2: settings.learning_rate, 1: 5 * settings.learning_rate}  # of vectors for each head, of numbers
    groups = [{"params": [p for p in model.trainable_parameters() if p.ndim == n], "lr": r} for n, r in rates.items()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    # twenty updates of warm-up, then half a cosine down to a tenth
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1.0, (n + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * min(1.0, n / settings.updates)))
    )
    kept, since, began, kinds = None, 0, time.monotonic(), list(passages)
    with Progress("calibrating", settings.updates, "updates", quiet=quiet) as progress:
        for update in range(settings.updates + 1):
            if update % settings.every == 0 or update == settings.updates:
                loss = work.validate(checks)
                change = {kind: loss[kind] - done.alone[kind] for kind in loss}
                objective = sum(change[kind] for kind in valid) / len(valid) + weight * change.get(FACTS, 0.0)
                found = Validation(update, round(time.monotonic() - began, 1), loss, change, objective)
                done.validations.append(found)
                since += 1
                if found.text_change <= 0 and (done.best is None or objective < done.best.objective):
                    kept, since = {n: t.clone() for n, t in model.gates.state_dict().items()}, 0
                    done.best = found
                if update == settings.updates or since > settings.patience:
                    break
            optimizer.zero_grad()
            kind = kinds[update % len(kinds)]
            other = draw.choice(passages[draw.choice(kinds)]) if draw.random() < OTHER_BESIDE_TEXT else None
            work.loss(work.window(draw.choice(passages[kind])), other).backward()
            if asked:
                filler = draw.choice(passages[draw.choice(kinds)]) if draw.random() < OTHER_BESIDE_FACTS else None
                (weight * work.loss(draw.choice(asked), filler)).backward()
            optimizer.step()
            schedule.step()
            progress.advance(note=f"objective {done.validations[-1].objective:+.3f}")
    if kept is not None:
        model.gates.load_state_dict(kept)
        return done
    for gate in model.gates:
        torch.nn.init.constant_(gate.bias, CLOSED)  # type: ignore[arg-type]
    return done


class _Work:
    """Examples of one model and their losses."""

    def __init__(self, model: TrainingFree, settings: CalibrationSettings, quiet: bool) -> None:
        self.model, self.settings, self.quiet, self.draw = model, settings, quiet, random.Random(settings.seed)
        self.bank = MemoryBank.for_model(model, rows=1, capacity_tokens=2 * settings.memory + 4096)

    def passages(self, kind: str, some: Sequence[Tensor]) -> list[Case]:
        """Passages, encoded but for their last window."""
        found = track(some, f"encoding {kind}", len(some), "passages", quiet=self.quiet)
        memory, window = self.settings.memory, self.settings.window
        every = torch.arange(memory, memory + window)
        return [Case(kind, ids, every, ids[:memory], encode_text(self.model, ids[:memory], window)) for ids in found]

    def facts(self, tokenizer: Any, count: int, name: str) -> list[Case]:
        """Sessions that told facts, each with a later conversation that asks for some of them."""
        draw, made = random.Random(f"{name} {self.settings.seed}"), []
        for _ in track(range(count), "encoding facts", count, "conversations", quiet=self.quiet):
            session = told_session(draw, draw.randrange(4, 13))
            before = torch.tensor(told_ids(session, tokenizer))
            asked = draw.sample(session.facts, draw.choice((1, 2, 4)))
            made.append(facts_case(asked, tokenizer, before, encode_text(self.model, before, self.settings.window)))
        return made

    def window(self, passage: Case, *, last: bool = False) -> Case:
        """A window of a passage behind all of its text that comes before; the last one, or any."""
        window, tokens = self.settings.window, self.settings.memory
        before = tokens if last else self.draw.randrange(1, tokens // window + 1) * window
        first = window // 4
        places = sorted(self.draw.sample(range(first, window), min(self.settings.scored, window - first)))
        ids = passage.ids[before : before + window + 1]
        return Case(passage.kind, ids, torch.tensor(places), passage.ids[:before], passage.kv)

    def loss(self, example: Case, other: Case | None = None, *, memory: bool = True) -> Tensor:
        """Mean nats per scored token; with ``other``, some of it is in memory too."""
        parts = [(example.kv, len(example.before))] if memory else []
        if other is not None:
            length = self.draw.randrange(1, self.settings.memory // 256 + 2) * 256
            parts.append((other.kv, min(length, self.settings.memory)))
        self.bank.reset()
        for number, (kv, tokens) in enumerate(parts):
            self.bank.add(AttentionKV(kv.keys[:, :, :tokens], kv.values[:, :, :tokens]), documents=[str(number)])
        # an empty bank is no bank
        return scored_loss(self.model, example.ids, example.scored, self.bank)

    @torch.no_grad()
    def validate(self, checks: Sequence[Case], *, memory: bool = True) -> dict[str, float]:
        """Mean loss by kind."""
        losses: dict[str, list[float]] = {}
        for example in checks:
            losses.setdefault(example.kind, []).append(float(self.loss(example, memory=memory)))
        return {kind: math.fsum(some) / len(some) for kind, some in losses.items()}
