"""A task: examples, what each system is asked about them, the metrics of its answers; and its run over all systems."""

from __future__ import annotations

import hashlib
import json
import random
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from longmem.errors import DataError
from longmem.evaluation.asking import Answer, Asker, Prompt
from longmem.evaluation.results import Bootstrap, Floats, Json, Ledger, header
from longmem.evaluation.systems import CONTROL, MEMORY_OFF, compared
from longmem.progress import Progress

RECORDS_VERSION = 2  # part of every record's key; raised when a record's meaning changes
TOGETHER = 64  # prompts without memory that are laid out and asked at one time
Case = tuple[int, str]  # the number of an example, and the name of the system that is asked


@dataclass(frozen=True)
class Example:
    """One thing asked of every system.

    ``group`` is what is reported apart (a split, a length, a category), ``unit`` what is drawn for intervals (a book, a
    conversation), ``item`` what the task knows about it, ``seed`` that of its demonstrations. ``gold`` is what
    ``measure`` compares answers with, where the prompt does not say it; for people, what was asked.
    """

    id: str
    group: str
    unit: str
    item: Any
    gold: Json = field(default_factory=dict)
    seed: int = 0


class Metric(NamedTuple):
    """A number of every example, averaged over them; ``chance`` is what guessing gives, where that is known."""

    name: str
    label: str
    unit: str  # "%" (an example is 0 to 100) or "nats"
    better: Literal["higher", "lower"] = "higher"
    chance: float | None = None


@dataclass(eq=False, kw_only=True)
class Task(ABC):
    """An evaluation: ``run_task`` asks every system every example and averages ``measure``.

    A task is a dataclass. Its fields are the options of its command; ``longmem.cli.eval`` says what they mean, and
    what they are unless told otherwise. It reads its files when it is made, and begins when the systems are there.

    Attributes:
        recall: passages for the systems ``+recall``; 0 leaves them out.
        seed: of all that is drawn.
        tokenizer, window: of all systems.
    """

    name: ClassVar[str]
    recall = seed = 0
    tokenizer: Any = field(init=False, repr=False)
    window: int = field(init=False)

    @property
    @abstractmethod
    def metrics(self) -> Sequence[Metric]:
        """The first is the one whose differences are shown."""

    @property
    def remembered(self) -> int:
        """Tokens that memory should hold where no size is given; 0 is the model's own."""
        return 0

    @property
    def seeds(self) -> Sequence[int]:
        """For the result file."""
        return [self.seed]

    def settings(self) -> Json:
        return {each.name: getattr(self, each.name) for each in fields(self) if each.init}

    def begin(self, askers: Sequence[Asker]) -> Sequence[Asker]:
        """Take the systems; returns those that are asked, with ``recall`` each of them once more with passages."""
        self.tokenizer, self.window = askers[0].tokenizer, askers[0].window
        more = [
            replace(
                asker, name=f"{asker.name}+recall", label=f"{asker.label}, {self.recall} passages", recall=self.recall
            )
            for asker in askers
            if self.recall and not asker.whole and asker.name not in (MEMORY_OFF, CONTROL)
        ]
        return [*askers, *more]

    @abstractmethod
    def source(self) -> Json:
        """What the examples are made from, beside the settings: for the result file."""

    @abstractmethod
    def examples(self) -> Sequence[Example]:
        """In the order of the result; those that share a long memory follow one another."""

    @abstractmethod
    def prompt(self, example: Example, asker: Asker) -> Prompt:
        """What this system is asked; called once for each example and system."""

    @abstractmethod
    def measure(self, example: Example, prompt: Prompt, answer: Answer) -> dict[str, float]:
        """Every metric of an answer. It may depend on the example's ``gold``, the prompt and the answer alone."""

    def said(self, answer: Answer) -> str:
        """The text that was generated."""
        return str(self.tokenizer.decode(answer.said, skip_special_tokens=True))

    def finish(self, result: Json, examples: Sequence[Example], bootstrap: Bootstrap) -> None:
        """Add to the result what else the task has to say, under ``extra``."""
        result["extra"] = {}

    def notes(self, result: Json) -> Iterable[str]:
        """Lines for people, below the table."""
        return ()


def drawn(seed: str, count: int, limit: int | None) -> list[int]:
    """All numbers below ``count``, or ``limit`` of them drawn with a seed, in their order."""
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), limit))


def digest_of(*parts: Any) -> str:
    """Hash of what JSON can say."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Source(NamedTuple):
    """A file of questions: its name, its hash, and what is in it."""

    name: str
    sha256: str
    items: list[Any]

    def about(self) -> Json:
        """For the result file."""
        return {"file": self.name, "sha256": self.sha256, "items": len(self.items)}


def read_source(
    path: str | Path, form: str, way_out: str, parse: Callable[[bytes, list[str]], Iterable[Any]]
) -> Source:
    """A file as ``parse`` reads its bytes; that adds to a list where it is reading.

    Raises:
        DataError: no such file, something in it is not of this form, or nothing is in it; says where.
    """
    path, where = Path(path), ["the file"]
    try:
        raw = path.read_bytes()
        items = list(parse(raw, where))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); {way_out}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, EOFError, zlib.error) as error:
        said = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: {where[-1]} is not of {form} ({said}); {way_out}") from error
    if not items:
        raise DataError(f"{path}: nothing in it; {way_out}")
    return Source(path.name, hashlib.sha256(raw).hexdigest(), items)


def lines_of(raw: bytes) -> list[str]:
    """The lines of a file."""
    # only \n ends one: some texts hold other signs that str.splitlines would take for an end
    return raw.decode("utf-8-sig").replace("\r\n", "\n").split("\n")


def run_task(
    task: Task,
    askers: Sequence[Asker],
    *,
    records: Path | None = None,
    bootstrap: Bootstrap | None = None,
    config: Json | None = None,
) -> Json:
    """Ask every system every example.

    Args:
        records: JSONL file of measured answers; what it already holds is not asked again. What systems say in their
            own words is added to ``answers.jsonl`` next to it, for people to read.
        config: what else the result should say about its making.

    Returns:
        the JSON of the result file: ``header``, ``systems`` (name -> label), ``metrics``, ``groups`` (see
        ``group_scores``; ``all`` first), ``examples`` with their ``values`` (system -> metric), ``extra``.

    Raises:
        DataError: the task has no examples.
    """
    bootstrap, askers = bootstrap or Bootstrap(), task.begin(askers)
    examples = task.examples()
    if not examples:
        raise DataError(f"{task.name} has no examples under these settings; give it more text, or wider limits")
    ledger = Ledger(records)
    values: list[Json] = [{asker.name: {} for asker in askers} for _ in examples]
    seconds: dict[tuple[str, str], float] = {}
    for alike in _alike(askers):
        label = " and ".join(asker.label for asker in alike)
        with Progress(f"{task.name}, {label}", len(examples) * len(alike), "examples") as progress:
            for batch in _batches(task, alike, examples):
                for (number, system), names in _answer(task, alike, examples, batch, ledger, progress).items():
                    values[number][system] = ledger.records[names]["values"]
                    seconds[names] = ledger.records[names]["seconds"]
    groups = {"all": list(range(len(examples)))}
    for number, example in enumerate(examples):
        groups.setdefault(example.group, []).append(number)
    if len(groups) == 2:
        del groups["all"]  # there is one group only
    result: Json = {
        "header": header(
            task.name,
            config=task.settings() | task.source() | {"bootstrap": asdict(bootstrap)} | (config or {}),
            models={asker.name: asker.identity | {"window": asker.window} for asker in askers},
            samples={"examples": len(examples), "units": len({example.unit for example in examples})},
            seeds=task.seeds,
            seconds=sum(seconds.values()),
        ),
        "systems": {asker.name: asker.label for asker in askers},
        "metrics": [metric._asdict() for metric in task.metrics],
        "groups": [
            group_scores(name, [examples[n] for n in some], [values[n] for n in some], task.metrics, bootstrap)
            for name, some in groups.items()
        ],
        "examples": [
            {"id": example.id, "group": example.group, "unit": example.unit, "values": found}
            for example, found in zip(examples, values, strict=True)
        ],
    }
    task.finish(result, examples, bootstrap)
    return result


def group_scores(
    name: str,
    examples: Sequence[Example],
    values: Sequence[Json],
    metrics: Sequence[Metric],
    bootstrap: Bootstrap,
    *,
    weights: Sequence[float] | None = None,
) -> Json:
    """Means, differences and intervals over examples, of which units are drawn.

    Args:
        values: of each example, system -> metric -> value.
        weights: of each example in the mean; None weights all alike.

    Returns:
        ``group``, ``examples``, ``units``, ``scores`` (system, metric, value, interval) and ``differences`` (the same
        with ``against``), paired by example.
    """
    units = {unit: at for at, unit in enumerate(dict.fromkeys(example.unit for example in examples))}
    where, systems = np.array([units[example.unit] for example in examples]), list(values[0])
    weight = np.ones(len(examples)) if weights is None else np.asarray(weights, dtype=float)
    said = "examples" if all(example.unit == example.id for example in examples) else "units"

    def summed(column: Sequence[float]) -> Floats:
        return np.bincount(where, weights=weight * np.asarray(column), minlength=len(units)).astype(np.float64)

    def mean(sums: Floats) -> Json:
        return {"value": float(sums.sum() / weighed.sum()), "interval": bootstrap.interval(sums, weighed, said)}

    weighed = summed([1.0] * len(examples))
    total = {(s, m.name): summed([value[s][m.name] for value in values]) for m in metrics for s in systems}
    return {
        "group": name,
        "examples": len(examples),
        "units": len(units),
        "scores": [{"system": s, "metric": m} | mean(sums) for (s, m), sums in total.items()],
        "differences": [
            {"system": s, "against": a, "metric": m.name} | mean(total[s, m.name] - total[a, m.name])
            for m in metrics
            for s, a in compared(systems)
        ],
    }


def _alike(askers: Sequence[Asker]) -> list[list[Asker]]:
    """Askers that differ only in what a task puts into their window: their memories are read once for all of them."""
    found: dict[str, list[Asker]] = {}
    for asker in askers:
        found.setdefault(digest_of(asker.identity, asker.memory_size, asker.window, asker.whole), []).append(asker)
    return list(found.values())


def _batches(task: Task, alike: Sequence[Asker], examples: Sequence[Example]) -> Iterator[dict[Case, Prompt]]:
    """Neighbours of equal memory, which is read once for all of them; without memory so many as fit."""
    prompts = (
        ((number, asker.name), task.prompt(example, asker))
        for number, example in enumerate(examples)
        for asker in alike
    )
    for memory, some in groupby(prompts, key=lambda prompt: prompt[1].memory):
        while batch := dict(islice(some, TOGETHER if memory == () else None)):
            yield batch


def _answer(
    task: Task,
    alike: Sequence[Asker],
    examples: Sequence[Example],
    batch: dict[Case, Prompt],
    ledger: Ledger,
    progress: Progress,
) -> dict[Case, tuple[str, str]]:
    """What a batch asks -> names of its record; what has none yet is asked, what is equal once."""
    asker = alike[0]
    names, new = dict[Case, tuple[str, str]](), dict[tuple[str, str], Case]()
    for one, prompt in batch.items():
        seen, remembers = asker.seen(prompt)
        # a system whose memory stays empty answers as the same model without memory
        system = asker.identity if remembers else asker.identity | {"memory": None}
        key = digest_of(RECORDS_VERSION, task.name, asker.window, system)
        names[one] = key, digest_of(seen, examples[one[0]].gold)
        if names[one] not in ledger.records:
            new.setdefault(names[one], one)
    asked, began = list(new.values()), time.monotonic()
    progress.done += len(batch) - len(asked)  # those took no time of this run
    for at, answer in asker.ask([batch[one] for one in asked]):
        now, one = time.monotonic(), asked[at]
        example, prompt = examples[one[0]], batch[one]
        about: Json = {"example": example.id, "system": one[1], "seconds": round(now - began, 4)}
        ledger.append(*names[one], **about, values=task.measure(example, prompt, answer))
        if prompt.new_tokens and ledger.path is not None:
            line = {"system": one[1], "example": example.id} | example.gold | {"said": task.said(answer)}
            with ledger.path.with_name("answers.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        progress.advance()
        began = now
    return names
