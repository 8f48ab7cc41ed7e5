"""Time and memory against the length of the context: LongMem, full attention of its backbone, and the window alone.

All systems read the same tokens, in one process and in turn, the order reversed from round to round, so that a busy
machine slows all alike. The paper's efficiency table compares with attention that is not fused; this compares with
SDPA, whose memory is linear already: what is left is what memory really saves.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from longmem.errors import ConfigError
from longmem.evaluation.efficiency_names import FULL, LABELS, LONGMEM, WINDOWED
from longmem.evaluation.efficiency_peak import Peak, peak_in_child, peak_on_device
from longmem.evaluation.efficiency_run import (
    Setting,
    Source,
    Timeline,
    context_ids,
    run,
    weights_bytes,
    why_not,
)
from longmem.evaluation.results import RunHeader
from longmem.generation.reading import positions
from longmem.modeling.longmem import LongMem

CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
LONGEST_DEFAULT_WINDOW = 1024  # the paper's

Progress = Callable[[str, int, int], Any]
"""``(what, points done, points in all)``."""


@dataclass(frozen=True)
class EfficiencySettings:
    """What is measured.

    Args:
        contexts: lengths in tokens; those beyond the window are rounded to whole moves of it.
        window: tokens LongMem attends to directly; None is the backbone's positions, at most 1,024.
        memory_size: most tokens in memory; None is the model's own.
        new_tokens: generated behind each context.
        repeats: rounds, fewer where the budget ends.
        piece: tokens that full attention reads at once; None is all.
        budget: seconds for the rounds of one point; a system that is expected to need more for one of them is left out.
        systems: which of ``longmem``, ``full`` and ``windowed``.
        memory: measure peak memory too, each in a process of its own on the CPU.

    Raises:
        ConfigError: lists every setting that breaks a rule.
    """

    contexts: tuple[int, ...] = CONTEXTS
    window: int | None = None
    memory_size: int | None = None
    new_tokens: int = 32
    repeats: int = 3
    piece: int | None = None
    budget: float = 600.0
    systems: tuple[str, ...] = (LONGMEM, FULL, WINDOWED)
    memory: bool = True

    def __post_init__(self) -> None:
        problems = [f"context ({one}) must be at least 2 tokens" for one in self.contexts if one < 2]
        if not self.contexts:
            problems.append("contexts (none) must name at least one length; try 1k,4k,16k")
        if not self.systems:
            problems.append(f"systems (none) must name at least one of {', '.join(LABELS)}")
        problems += [
            f"{name} ({', '.join(map(str, chosen))}) must all be different"
            for name, chosen in (("contexts", self.contexts), ("systems", self.systems))
            if len(set(chosen)) < len(chosen)
        ]
        if self.repeats < 1:
            problems.append(f"repeats ({self.repeats}) must be at least 1")
        problems += [
            f"system ({name}) must be one of {', '.join(LABELS)}" for name in self.systems if name not in LABELS
        ]
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True)
class Spread:
    """Of the rounds: median, least and most."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class Point:
    """One system at one context.

    Attributes:
        first_token: seconds from the call to the first new token: reading, and allocating what that takes.
        read: tokens of context read in a second of it.
        per_token: seconds of every further token, with its share of what moving text to memory takes.
        plain: seconds of a token while nothing moves.
        moving: seconds that a move adds; None where there are none.
        generated: tokens in a second, of ``per_token``.
        peak: bytes at most, in all and beyond the loaded weights; None where not measured.
        note: why something is missing.
    """

    system: str
    context: int
    first_token: Spread
    read: Spread
    per_token: Spread
    plain: Spread
    moving: Spread | None
    generated: Spread
    peak: Peak | None
    note: str | None = None


@dataclass(frozen=True)
class Ratio:
    """How many times what LongMem takes another system takes; times paired by round."""

    system: str
    context: int
    first_token: Spread
    per_token: Spread
    peak: float | None


@dataclass(frozen=True)
class LeftOut:
    """A point that is not there, and why."""

    system: str
    context: int
    reason: str


@dataclass(frozen=True)
class EfficiencyResult:
    """What ``longmem eval efficiency`` writes as JSON."""

    header: RunHeader
    systems: dict[str, str]
    window: int
    move: int
    memory_size: int
    attention: str
    weights_bytes: int
    points: list[Point]
    ratios: list[Ratio]
    left_out: list[LeftOut] = field(default_factory=list)


def efficiency(
    source: Source,
    settings: EfficiencySettings,
    *,
    command: str = "",
    config: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> EfficiencyResult:
    """Measure every system at every context.

    Args:
        source: the model; on the CPU it is loaded again in a child process for each peak.
        settings: contexts, window, rounds, budget.
        command: as typed, kept in the result.
        config: what else the result should say about its making.
        progress: told about every context.
    """
    began = time.monotonic()
    model = source.load()
    limit = positions(model)
    window = settings.window or min(limit or LONGEST_DEFAULT_WINDOW, LONGEST_DEFAULT_WINDOW)
    setting = Setting.of(model, window, settings.memory_size, settings.new_tokens, settings.piece)
    contexts = sorted({setting.whole(context) for context in settings.contexts})
    points, ratios, left_out = list[Point](), list[Ratio](), list[LeftOut]()
    before: dict[str, tuple[int, float]] = {}  # the longest context so far, and seconds of a round of it
    for number, context in enumerate(contexts):
        if progress is not None:
            progress(f"{context:,} tokens", number, len(contexts))
        asked = list[str]()
        for system in settings.systems:
            reason = why_not(model, system, context, setting) or _too_long(system, context, before, settings.budget)
            if reason is None:
                asked.append(system)
            else:
                left_out.append(LeftOut(system, context, reason))
        rounds = _rounds(model, asked, context, setting, settings, source.seed, warm=number == 0)
        for system, lines in rounds.items():
            before[system] = (context, statistics.median(line.first + sum(line.gaps) for line in lines))
            peak = _peak(source, model, system, context, setting) if settings.memory else None
            points.append(_point(system, context, lines, setting.move, peak))
        ratios += _ratios(context, rounds, points, setting.move)
    if progress is not None:
        progress("done", len(contexts), len(contexts))
    return EfficiencyResult(
        header=RunHeader(
            task="efficiency",
            command=command,
            config=asdict(settings) | asdict(source) | (config or {}),
            models=_models(model),
            samples={"contexts": len(contexts), "rounds": settings.repeats, "new_tokens": settings.new_tokens},
            seeds=[source.seed],
            seconds=round(time.monotonic() - began, 1),
        ),
        systems={name: LABELS[name] for name in settings.systems},
        window=setting.window,
        move=setting.move,
        memory_size=setting.memory_size,
        attention=str(model.backbone.model.config._attn_implementation),
        weights_bytes=weights_bytes(model),
        points=points,
        ratios=ratios,
        left_out=left_out,
    )


def _rounds(
    model: LongMem,
    systems: Sequence[str],
    context: int,
    setting: Setting,
    settings: EfficiencySettings,
    seed: int,
    *,
    warm: bool,
) -> dict[str, list[Timeline]]:
    """All systems in turn, then in reverse, until there are enough rounds or the time is over."""
    ids = context_ids(model, context, seed)
    if warm:
        for system in systems:
            run(model, system, ids, setting)
    found: dict[str, list[Timeline]] = {system: [] for system in systems}
    began = time.monotonic()
    for turn in range(settings.repeats if systems else 0):
        for system in systems if turn % 2 == 0 else systems[::-1]:
            found[system].append(run(model, system, ids, setting))
        spent = time.monotonic() - began
        if spent + spent / (turn + 1) > settings.budget:
            break
    return found


def _too_long(system: str, context: int, before: dict[str, tuple[int, float]], budget: float) -> str | None:
    """Guessed from the context before: attention over all grows with the square of it, the others with it."""
    if system not in before:
        return None
    shorter, seconds = before[system]
    expected = seconds * (context / shorter) ** (2 if system == FULL else 1)
    if expected <= budget:
        return None
    return f"one run would take about {expected:,.0f} s, more than --budget allows ({budget:,.0f} s)"


def _peak(source: Source, model: LongMem, system: str, context: int, setting: Setting) -> Peak | str:
    if model.device.type == "cuda":
        return peak_on_device(model, system, context, setting, source.seed)
    return peak_in_child(source, setting, system, context, torch.get_num_threads())


def _point(system: str, context: int, lines: Sequence[Timeline], move: int, peak: Peak | str | None) -> Point:
    moving = [line.moving for line in lines if line.moving is not None]
    return Point(
        system=system,
        context=context,
        first_token=Spread.of([line.first for line in lines]),
        read=Spread.of([context / line.first for line in lines]),
        per_token=Spread.of([line.each(move) for line in lines]),
        plain=Spread.of([line.plain for line in lines]),
        moving=Spread.of(moving) if moving else None,
        generated=Spread.of([1 / line.each(move) for line in lines]),
        peak=peak if isinstance(peak, Peak) else None,
        note=f"no peak memory: {peak}" if isinstance(peak, str) else None,
    )


def _ratios(context: int, rounds: dict[str, list[Timeline]], points: Sequence[Point], move: int) -> list[Ratio]:
    ours = rounds.get(LONGMEM)
    if not ours:
        return []
    peaks = {point.system: point.peak for point in points if point.context == context}
    mine, found = peaks.get(LONGMEM), []
    for system, theirs in rounds.items():
        if system == LONGMEM:
            continue
        other = peaks.get(system)
        pairs = list(zip(theirs, ours, strict=True))
        found.append(
            Ratio(
                system=system,
                context=context,
                first_token=Spread.of([one.first / mine.first for one, mine in pairs]),
                per_token=Spread.of([one.each(move) / mine.each(move) for one, mine in pairs]),
                peak=None if mine is None or other is None or mine.beyond <= 0 else other.beyond / mine.beyond,
            )
        )
    return found


def _models(model: LongMem) -> dict[str, Any]:
    backbone = model.backbone.model
    text = backbone.config.get_text_config()
    return {
        "backbone": {
            "class": type(backbone).__name__,
            "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
            "hidden_size": text.hidden_size,
            "layers": text.num_hidden_layers,
            "dtype": str(model.dtype).removeprefix("torch."),
            "positions": positions(model),
        },
        "longmem": {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "memory_layer": model.memory_layer,
            "chunk_size": model.config.chunk_size,
            "num_retrieved": model.config.num_retrieved,
        },
    }
