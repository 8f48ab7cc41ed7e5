"""What each setting is worth: perplexity with one of them changed at a time, against the default, paired by document.

Settings that only say how memory is made and searched are changed on one trained SideNet. Those that need training
(memory layer, initialisation, fusion) are compared between SideNets that were trained with them.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from longmem.errors import CheckpointError, ConfigError
from longmem.evaluation.bootstrap import Interval
from longmem.evaluation.documents import TokenizedDocument
from longmem.evaluation.perplexity import PerplexitySettings, known, measure, record_key
from longmem.evaluation.records import Ledger
from longmem.evaluation.results import RunHeader
from longmem.evaluation.scores import Record, scores
from longmem.evaluation.systems import BACKBONE, MEMORY_OFF, Comparison, System
from longmem.evaluation.variants import MEMORY_DTYPES, memory_maker, varied
from longmem.modeling.longmem import LongMem

DEFAULT = "default"
AXES = {
    "chunk_size": "chunk size (tokens)",
    "num_retrieved": "retrieved tokens per query (K)",
    "memory_size": "memory size (tokens)",
    "rows": "memory of the rows of a batch",
    "memory_dtype": "number format of keys and values",
    "gate_share": "share given to memory, forced",
}
"""What changes without training, and its name for people."""

TRAINED = ("memory_layer", "init", "fusion", "final_state", "stride", "chunk_size", "num_retrieved", "memory_size")
"""Fields of a checkpoint's config by which trained SideNets are told apart."""


@dataclass(frozen=True)
class Choices:
    """The values of every axis; an axis without any is not measured. None: values around the model's own."""

    chunk_size: tuple[int, ...] | None = None
    num_retrieved: tuple[int, ...] | None = None
    memory_size: tuple[int, ...] | None = None
    rows: tuple[str, ...] | None = None
    memory_dtype: tuple[str, ...] | None = None
    gate_share: tuple[float, ...] | None = None

    def filled(self, model: LongMem, memory_size: int) -> Choices:
        """Nothing left open, the model's own value always among them.

        Raises:
            ConfigError: lists every value that breaks a rule.
        """
        config = model.config
        chunk, found = config.chunk_size, config.num_retrieved
        sizes = self.chunk_size if self.chunk_size is not None else _fitting((1, 2, 4, 8, 16), found, memory_size)
        reads = self.num_retrieved if self.num_retrieved is not None else [n * chunk for n in (1, 4, 8, 16, 32, 64)]
        holds = self.memory_size
        if holds is None:
            holds = tuple(max(chunk, memory_size // part // chunk * chunk) for part in (64, 16, 8, 4, 2, 1))
        shares = self.gate_share if self.gate_share is not None else (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
        if config.fusion == "softmax" and self.gate_share is None:
            shares = ()
        problems = [
            f"chunk size ({size}) must divide K ({found}) and the memory size ({memory_size})"
            for size in sizes
            if size < 1 or found % size or memory_size % size
        ]
        problems += [f"K ({k}) must be a multiple of the chunk size ({chunk})" for k in reads if k < 1 or k % chunk]
        problems += [
            f"memory size ({size}) must be a multiple of the chunk size ({chunk})"
            for size in holds
            if size < 1 or size % chunk
        ]
        problems += [f"gate share ({share:g}) must be between 0 and 1" for share in shares if not 0 <= share <= 1]
        if shares and config.fusion == "softmax":
            problems.append("gate share cannot be forced with fusion = 'softmax', where every token chooses its own")
        dtypes = self.memory_dtype if self.memory_dtype is not None else MEMORY_DTYPES
        problems += [
            f"memory dtype ({d}) must be one of {', '.join(MEMORY_DTYPES)}" for d in dtypes if d not in MEMORY_DTYPES
        ]
        rows = self.rows if self.rows is not None else ("separate", "shared")
        problems += [f"rows ({r}) must be separate or shared" for r in rows if r not in ("separate", "shared")]
        if problems:
            raise ConfigError(problems)
        return Choices(
            chunk_size=_with(sizes, chunk),
            num_retrieved=_with(reads, found),
            memory_size=_with(holds, memory_size),
            rows=tuple(rows),
            memory_dtype=tuple(dtypes),
            gate_share=tuple(sorted(set(shares))),
        )


@dataclass(frozen=True)
class Trained:
    """A SideNet that was trained with another setting.

    Attributes:
        axis: what was changed.
        label: its value.
        model: over the same backbone.
        baseline: whether it is the default that the others of its axis are compared with.
    """

    axis: str
    label: str
    model: LongMem
    baseline: bool = False


@dataclass(frozen=True)
class ValueScore:
    """Perplexity, and how far it is from the default's in %, with intervals over documents and over blocks."""

    perplexity: float
    percent: float
    documents: Interval | None
    blocks: Interval | None


@dataclass(frozen=True)
class Value:
    """One value of an axis: its score by protocol; ``default`` marks what the others are compared with."""

    value: str
    default: bool
    scores: dict[str, ValueScore]
    differs: str = ""


@dataclass(frozen=True)
class Axis:
    """One setting and its values; ``trained`` says that each value was trained."""

    name: str
    label: str
    trained: bool
    values: list[Value]


@dataclass(frozen=True)
class AblationResult:
    """What ``longmem eval ablate`` writes as JSON.

    Attributes:
        default: the settings that stay while one changes.
        protocols: window and stride of each.
        without: backbone alone and memory off, against the default.
        left_out: axis -> why it is not there.
    """

    header: RunHeader
    default: dict[str, Any]
    protocols: dict[str, dict[str, int]]
    without: dict[str, dict[str, ValueScore]]
    axes: list[Axis]
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Planned:
    """A system, where its value belongs, and what it is compared with."""

    system: System
    axis: str
    value: str
    against: str = DEFAULT
    differs: str = ""


def ablate(
    model: LongMem,
    documents: Sequence[TokenizedDocument],
    settings: PerplexitySettings,
    choices: Choices,
    *,
    axes: Sequence[str] = tuple(AXES),
    memory_size: int | None = None,
    trained: Sequence[Trained] = (),
    device: str = "cpu",
    records: Path | None = None,
    command: str = "",
    config: dict[str, Any] | None = None,
    progress: Any = None,
) -> AblationResult:
    """Measure every value of every axis on every document.

    Args:
        model: the default.
        documents: from ``tokenize_documents``.
        settings: window, stride, protocols, rows, bootstrap.
        choices: the values.
        axes: of ``AXES``.
        memory_size: of the default, in tokens; None is the model's own.
        trained: SideNets over the same backbone, trained with other settings.
        device: where the models are.
        records: JSONL file of finished documents; what it already holds is not measured again.
        command: as typed, kept in the result.
        config: what else the result should say about its making.

    Raises:
        ConfigError: lists every value that breaks a rule.
        CheckpointError: a trained SideNet stands on another backbone.
    """
    began = time.monotonic()
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown:
        raise ConfigError(f"axis ({', '.join(unknown)}) must be among {', '.join(AXES)}")
    foreign = [one for one in trained if one.model.fingerprint != model.fingerprint]
    if foreign:
        raise CheckpointError(
            f"{foreign[0].label}: its backbone is {foreign[0].model.fingerprint}, the default's {model.fingerprint}; "
            "compare SideNets of one backbone"
        )
    size = model.config.memory_size if memory_size is None else memory_size
    values = choices.filled(model, size)
    plan = _Plan(model, size, settings.rows, documents)
    for axis in axes:
        for value in getattr(values, axis) or ():
            plan.add(axis, value)
    names = Counter(one.system.name for one in [*plan.planned, *_planned(trained, size)] if one.system.name != DEFAULT)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ConfigError(f"{', '.join(twice)} comes twice; name each value once, and each --also by another label")
    ledger, of_protocol = Ledger(records), dict[str, dict[str, list[Record]]]()
    for protocol in settings.protocols:
        table: dict[str, list[Record]] = {}
        for comparison, together in [*plan.comparisons(), *_apart(trained, size)]:
            run = _together if together else measure
            table |= run(comparison, documents, settings, protocol, ledger, device=device)
        of_protocol[protocol] = table
    planned = [*plan.planned, *_planned(trained, size, model)]
    scored = {protocol: _scored(documents, table, planned, settings) for protocol, table in of_protocol.items()}
    left_out = {axis: _why_not(axis) for axis in axes if not getattr(values, axis)}
    identities = {one.system.name: one.system.identity for one in planned}
    return AblationResult(
        header=RunHeader(
            task="ablate",
            command=command,
            config=asdict(settings) | {"memory_size": size, "axes": list(axes)} | (config or {}),
            models=identities,
            samples={
                "documents": len(documents),
                "tokens": sum(document.scored for document in documents),
                "words": sum(document.words for document in documents),
                "bytes": sum(document.bytes for document in documents),
            },
            seeds=[settings.bootstrap.seed],
            seconds=round(time.monotonic() - began, 1),
        ),
        default={name: getattr(model.config, name) for name in TRAINED}
        | {"memory_layer": model.memory_layer, "memory_size": size, "gate_share": model.memory_share.tolist()},
        protocols={
            name: {"window": settings.window, "stride": settings.stride_of(name)} for name in settings.protocols
        },
        without={
            name: {protocol: of_systems[name] for protocol, of_systems in scored.items()}
            for name in (BACKBONE, MEMORY_OFF)
        },
        axes=_axes(planned, scored),
        left_out=left_out,
    )


class _Plan:
    """Systems that differ from the default in one setting, all over one pass of the backbone."""

    def __init__(self, model: LongMem, memory_size: int, rows: int, documents: Sequence[TokenizedDocument]) -> None:
        self._model, self._size = model, memory_size
        longest = -(-sum(len(document.ids) for document in documents) // model.config.chunk_size)
        # as many tokens in all as separate rows have, and never more than there are
        self._shared_tokens = min(memory_size * min(rows, len(documents)), longest * model.config.chunk_size)
        beside = "".join(sorted(document.digest for document in documents)) + str(rows)
        self._beside = hashlib.sha256(beside.encode()).hexdigest()[:16]
        self._dtypes, self._shared = dict[int, str](), dict[int, int]()
        base = Comparison.of_longmem(model, [memory_size])
        (backbone, off, on) = base.systems
        self._base = base
        self._first = [backbone, off, replace(on, name=DEFAULT)]
        self.planned: list[_Planned] = [_Planned(replace(on, name=DEFAULT), "", "")]

    def add(self, axis: str, value: Any) -> None:
        """One value of one axis; the default's own needs no system of its own."""
        said = f"{value:g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        config = self._model.config
        if axis in ("chunk_size", "num_retrieved", "memory_size"):
            own = self._size if axis == "memory_size" else getattr(config, axis)
            if value == own:
                self.planned.append(replace(self.planned[0], axis=axis, value=said))
                return
        if (axis, value) in (("rows", "separate"), ("memory_dtype", str(self._model.dtype).removeprefix("torch."))):
            self.planned.append(replace(self.planned[0], axis=axis, value=said))
            return
        self.planned.append(_Planned(self._system(axis, value, said), axis, said))

    def _system(self, axis: str, value: Any, said: str) -> System:
        size, extra = self._size, dict[str, Any]()
        if axis in ("chunk_size", "num_retrieved"):
            model = varied(self._model, **{axis: value})
            extra = {axis: value}
        elif axis == "gate_share":
            model = varied(self._model, gate_share=value)
            extra = {"gate_share": value}
        else:
            model = varied(self._model)
        if axis == "memory_size":
            size = value
        elif axis == "rows":
            self._shared[id(model)] = self._shared_tokens
            extra = {"shared": self._shared_tokens, "beside": self._beside}
        elif axis == "memory_dtype":
            self._dtypes[id(model)] = value
            extra = {"memory_dtype": value}
        identity = self._first[2].identity | {"memory": size} | extra
        return System(f"{axis}={value}", f"{AXES[axis]}: {said}", identity, model, memory_size=size)

    def comparisons(self) -> list[tuple[Comparison, bool]]:
        """Those that run document by document, and those whose documents must run together."""
        unlike = [one.system for one in self.planned if one.system.name != DEFAULT]
        alone = [system for system in unlike if system.name != "rows=shared"]
        make = memory_maker(self._dtypes, self._shared)
        found = [(replace(self._base, systems=(*self._first, *alone), make_memory=make), False)]
        return found + [
            (replace(self._base, systems=(system,), make_memory=make), True) for system in unlike if system not in alone
        ]


def _together(
    comparison: Comparison,
    documents: Sequence[TokenizedDocument],
    settings: PerplexitySettings,
    protocol: str,
    ledger: Ledger,
    *,
    device: str = "cpu",
) -> dict[str, list[Record]]:
    """As ``measure``, all documents or none: what a row finds depends on the rows beside it."""
    (system,) = comparison.systems
    key = record_key(system, settings, protocol)
    kept = [known(ledger, key, document) for document in documents]
    if None not in kept:
        return {system.name: [record for record in kept if record is not None]}
    found = measure(comparison, documents, settings, protocol, Ledger(None), device=device)
    for document, record in zip(documents, found[system.name], strict=True):
        ledger.append(
            key, document.digest, document=document.id, protocol=protocol, system=system.name, **asdict(record)
        )
    return found


def _apart(trained: Sequence[Trained], memory_size: int) -> list[tuple[Comparison, bool]]:
    """Each by itself: another memory layer has keys and values of its own."""
    found = []
    for one, planned in zip(trained, _planned(trained, memory_size), strict=True):
        base = Comparison.of_longmem(one.model, [memory_size])
        found.append((replace(base, systems=(planned.system,)), False))
    return found


def _planned(trained: Sequence[Trained], memory_size: int, default: LongMem | None = None) -> list[_Planned]:
    """Where trained SideNets belong, each against the baseline of its axis."""
    baselines = {one.axis: f"{one.axis}={one.label}" for one in trained if one.baseline}
    found = []
    for one in trained:
        name = f"{one.axis}={one.label}"
        system = replace(Comparison.of_longmem(one.model, [memory_size]).systems[-1], name=name)
        differs = "" if default is None else _differs(one.model, default)
        found.append(_Planned(system, one.axis, one.label, baselines.get(one.axis, DEFAULT), differs))
    return found


def _differs(model: LongMem, default: LongMem) -> str:
    """Fields in which a checkpoint's config is not the default's."""
    pairs = [(name, getattr(model.config, name), getattr(default.config, name)) for name in TRAINED]
    return ", ".join(f"{name} {mine} (default {theirs})" for name, mine, theirs in pairs if mine != theirs)


def _scored(
    documents: Sequence[TokenizedDocument],
    table: dict[str, list[Record]],
    planned: Sequence[_Planned],
    settings: PerplexitySettings,
) -> dict[str, ValueScore]:
    """Every system against what it is compared with."""
    pairs = {one.system.name: one.against for one in planned} | {BACKBONE: DEFAULT, MEMORY_OFF: DEFAULT}
    found = scores("all", documents, table, list(pairs.items()), settings.bootstrap, settings.block)
    made = {}
    for name, against in pairs.items():
        difference = found.difference(name, against)
        assert difference is not None
        made[name] = ValueScore(
            found.system(name).perplexity, difference.percent, difference.documents, difference.blocks
        )
    return made


def _axes(planned: Sequence[_Planned], scored: dict[str, dict[str, ValueScore]]) -> list[Axis]:
    made = []
    for name in dict.fromkeys(one.axis for one in planned if one.axis):
        mine = [one for one in planned if one.axis == name]
        values = [
            Value(
                one.value,
                one.system.name == one.against,
                {protocol: of_systems[one.system.name] for protocol, of_systems in scored.items()},
                one.differs,
            )
            for one in mine
        ]
        if not any(value.default for value in values):
            own = {protocol: of_systems[DEFAULT] for protocol, of_systems in scored.items()}
            values.insert(0, Value("as trained" if name == "gate_share" else DEFAULT, True, own))
        made.append(Axis(name, AXES.get(name, name.replace("_", " ")), name not in AXES or _is_trained(mine), values))
    return made


def _is_trained(planned: Sequence[_Planned]) -> bool:
    return any(one.differs for one in planned)


def _why_not(axis: str) -> str:
    if axis == "gate_share":
        return "with fusion = 'softmax' every token chooses its own share"
    return "no value of it fits the others"


def _fitting(sizes: Sequence[int], *multiples: int) -> tuple[int, ...]:
    return tuple(size for size in sizes if not any(multiple % size for multiple in multiples))


def _with(values: Sequence[int], own: int) -> tuple[int, ...]:
    """Sorted, the default among them; none stays none."""
    return tuple(sorted({*values, own})) if values else ()
