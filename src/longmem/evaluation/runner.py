"""Run a task over all systems: resume, progress, averages, intervals, paired differences."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longmem.errors import DataError
from longmem.evaluation.asking import Asker, Prompt
from longmem.evaluation.bootstrap import Bootstrap
from longmem.evaluation.records import Ledger
from longmem.evaluation.results import RunHeader
from longmem.evaluation.task import Example, ExampleScores, Task, TaskResult, Values, digest_of, group_scores
from longmem.progress import Progress

ALL = "all"
RECORDS_VERSION = 2  # part of every record's key; raised when a record's meaning changes
TOGETHER = 64  # prompts that are laid out and asked at one time, at least where their memory is the same


def run_task(
    task: Task[Any],
    askers: Sequence[Asker],
    *,
    records: Path | None = None,
    bootstrap: Bootstrap | None = None,
    command: str = "",
    config: dict[str, Any] | None = None,
    quiet: bool = False,
) -> TaskResult:
    """Ask every system every example.

    Args:
        task: see ``Task``.
        askers: the systems, see ``asking.askers``.
        records: JSONL file of measured answers; what it already holds is not asked again. What systems say in their
            own words is added to ``answers.jsonl`` next to it, for people to read.
        bootstrap: resamples, level and seed of intervals.
        command: as typed, kept in the result.
        config: what else the result should say about its making.
        quiet: show no progress.

    Raises:
        DataError: the task has no examples.
    """
    bootstrap = bootstrap or Bootstrap()
    examples = task.examples()
    if not examples:
        raise DataError(f"{task.name} has no examples under these settings; give it more text, or wider limits")
    ledger = Ledger(records)
    values: list[Values] = [{} for _ in examples]
    seconds: dict[tuple[str, str], float] = {}
    for asker in askers:
        with Progress(f"{task.name}, {asker.label}", len(examples), "examples", quiet=quiet) as progress:
            for number, names in _answers(task, asker, examples, ledger):
                record = ledger.get(*names)
                assert record is not None
                values[number][asker.name], seconds[names] = record["values"], record["seconds"]
                progress.advance()
    groups = {ALL: list(range(len(examples)))}
    for number, example in enumerate(examples):
        groups.setdefault(example.group, []).append(number)
    if len(groups) == 2:
        del groups[ALL]  # there is one group only
    result = TaskResult(
        header=RunHeader(
            task=task.name,
            command=command,
            config=task.settings() | {"bootstrap": asdict(bootstrap)} | (config or {}),
            models={asker.name: asker.identity | {"window": asker.window} for asker in askers},
            samples={"examples": len(examples), "units": len({example.unit for example in examples})},
            seeds=list(task.seeds),
            seconds=round(sum(seconds.values()), 1),
        ),
        systems={asker.name: asker.label for asker in askers},
        skipped={},
        metrics=list(task.metrics),
        groups=[
            group_scores(name, [examples[n] for n in some], [values[n] for n in some], task.metrics, bootstrap)
            for name, some in groups.items()
        ],
        examples=[ExampleScores(e.id, e.group, e.unit, found) for e, found in zip(examples, values, strict=True)],
        extra={},
    )
    return task.summarise(result, examples, askers, bootstrap)


def _answers(
    task: Task[Any], asker: Asker, examples: Sequence[Example[Any]], ledger: Ledger
) -> Iterator[tuple[int, tuple[str, str]]]:
    """(number of an example, names of its record), in the order in which they are done; what is equal is asked once."""
    for batch in _batches(task, asker, examples):
        named: dict[tuple[str, str], list[int]] = {}
        for number, prompt in batch.items():
            # a system whose memory stays empty answers as the same model without memory
            seen = asker.identity if asker.remembers(prompt) else asker.identity | {"memory": None}
            key = digest_of(RECORDS_VERSION, task.name, asker.window, seen)
            named.setdefault((key, digest_of(asker.key(prompt), task.gold(examples[number]))), []).append(number)
        waiting = [names for names in named if ledger.get(*names) is None]
        yield from ((number, names) for names in named if names not in waiting for number in named[names])
        began = time.monotonic()
        for at, answer in asker.ask([batch[named[names][0]] for names in waiting]):
            names, now = waiting[at], time.monotonic()
            example, prompt = examples[named[names][0]], batch[named[names][0]]
            about: dict[str, Any] = {"example": example.id, "system": asker.name, "seconds": round(now - began, 4)}
            ledger.append(*names, **about, values=task.measure(example, prompt, answer))
            began = now
            if prompt.new_tokens and ledger.path is not None:
                said = asker.tokenizer.decode(answer.said, skip_special_tokens=True)
                line = {"system": asker.name, "example": example.id} | task.gold(example) | {"said": said}
                with ledger.path.with_name("answers.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
            yield from ((number, names) for number in named[names])


def _batches(task: Task[Any], asker: Asker, examples: Sequence[Example[Any]]) -> Iterator[dict[int, Prompt]]:
    batch: dict[int, Prompt] = {}
    last: Any = ()
    for number, example in enumerate(examples):
        prompt = task.prompt(example, asker)
        if len(batch) >= TOGETHER and (prompt.memory == () or prompt.memory != last):
            yield batch
            batch = {}
        batch[number], last = prompt, prompt.memory
    yield batch
