"""What in-context learning says besides its accuracies: averages over sets, spread over seeds, shots that fit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from longmem.evaluation.asking import Asker
from longmem.evaluation.bootstrap import Bootstrap, Floats
from longmem.evaluation.runner import ExampleScores, GroupScores, MetricDifference, MetricScore, TaskResult
from longmem.evaluation.systems import compared
from longmem.evaluation.tasks.icl import IclExample, IclTask

AVERAGE = "average"


def summarise(result: TaskResult, task: IclTask, askers: Sequence[Asker], bootstrap: Bootstrap) -> TaskResult:
    """The result with ``average, 20 + 2000`` groups and ``extra``; its examples averaged over seeds.

    ``extra`` has ``per_seed`` (group -> system -> metric -> values by seed, their mean and population standard
    deviation), ``shots`` (group -> system -> mean number of demonstrations in the ``window``, and held in ``memory``
    or, for the full-context backbone, standing in front of the others) and ``sets`` (chance and majority class in %).
    """
    examples = task.examples()
    averages = _averages(result, examples, bootstrap) if len(task.prompts) > 1 else []
    return replace(
        result,
        groups=[*result.groups, *averages],
        examples=_without_seeds(result, examples),
        extra=result.extra
        | {
            "per_seed": _per_seed(result, examples, task.seeds),
            "shots": shots_seen(task, [asker for asker in askers if asker.name in result.systems]),
            "sets": {
                name: {"chance": prompts.data.chance, "majority": round(prompts.data.majority, 2)}
                for name, prompts in task.prompts.items()
            },
        },
    )


def shots_seen(task: IclTask, askers: Sequence[Asker]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean numbers of demonstrations that each system really has before it: group -> system -> window, memory."""
    counts: dict[str, dict[str, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    for example in task.examples():
        shots = task.shots(example.dataset, example.seed, example.local, example.memory)
        for asker in askers:
            laid = task.prompts[example.dataset].lay_out(asker, shots, example.text)
            counts[example.group][asker.name].append((laid.local, laid.memory + shots.held(asker)))
    return {
        group: {
            name: dict(zip(("window", "memory"), np.mean(seen, axis=0).round(2).tolist(), strict=True))
            for name, seen in of_group.items()
        }
        for group, of_group in counts.items()
    }


def _averages(result: TaskResult, examples: Sequence[IclExample], bootstrap: Bootstrap) -> list[GroupScores]:
    """For each number of demonstrations the mean over sets, each set with the same weight; texts are resampled."""
    settings = dict.fromkeys((example.local, example.memory) for example in examples)
    return [_average(result, examples, local, memory, bootstrap) for local, memory in settings]


def _average(
    result: TaskResult, examples: Sequence[IclExample], local: int, memory: int, bootstrap: Bootstrap
) -> GroupScores:
    chosen = [number for number, e in enumerate(examples) if (e.local, e.memory) == (local, memory)]
    of_set: dict[str, int] = defaultdict(int)
    for number in chosen:
        of_set[examples[number].dataset] += 1
    weights = np.array([1 / of_set[examples[number].dataset] for number in chosen])
    units = {unit: at for at, unit in enumerate(dict.fromkeys(examples[number].unit for number in chosen))}
    where = np.array([units[examples[number].unit] for number in chosen])

    def summed(values: Floats) -> Floats:
        return np.bincount(where, weights=values * weights, minlength=len(units)).astype(np.float64)

    counts = summed(np.ones(len(chosen)))
    totals = {
        (system, metric.name): summed(
            np.array([result.examples[number].values[system][metric.name] for number in chosen])
        )
        for system in result.systems
        for metric in result.metrics
    }
    gaps = {
        (system, against, metric.name): totals[system, metric.name] - totals[against, metric.name]
        for metric in result.metrics
        for system, against in compared(list(result.systems))
    }
    share = counts.sum()
    return GroupScores(
        group=f"{AVERAGE}, {local} + {memory}",
        examples=len(chosen),
        units=len(units),
        scores=[
            MetricScore(*key, float(total.sum() / share), bootstrap.mean(total, counts, "texts"))
            for key, total in totals.items()
        ],
        differences=[
            MetricDifference(*key, float(gap.sum() / share), bootstrap.mean(gap, counts, "texts"))
            for key, gap in gaps.items()
        ],
    )


def _per_seed(
    result: TaskResult, examples: Sequence[IclExample], seeds: Sequence[int]
) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    found: dict[tuple[str, str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for example, scores in zip(examples, result.examples, strict=True):
        for system, values in scores.values.items():
            for metric, value in values.items():
                found[example.group, system, metric][example.seed].append(value)
    means = {key: [float(np.mean(by_seed[seed])) for seed in seeds] for key, by_seed in found.items()}
    over_sets: dict[tuple[str, str, str], list[list[float]]] = defaultdict(list)
    for (group, system, metric), of_seeds in means.items():
        over_sets[f"{AVERAGE}, {group.partition(', ')[2]}", system, metric].append(of_seeds)
    if len({example.dataset for example in examples}) > 1:
        means |= {key: np.mean(rows, axis=0).tolist() for key, rows in over_sets.items()}
    nested: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for (group, system, metric), of_seeds in means.items():
        nested.setdefault(group, {}).setdefault(system, {})[metric] = {
            "values": [round(value, 3) for value in of_seeds],
            "mean": round(float(np.mean(of_seeds)), 3),
            "std": round(float(np.std(of_seeds)), 3),
        }
    return nested


def _without_seeds(result: TaskResult, examples: Sequence[IclExample]) -> list[ExampleScores]:
    """One record for each text and number of demonstrations, averaged over seeds: a sixth of the file."""
    gathered: dict[tuple[str, str], list[Mapping[str, Mapping[str, float]]]] = defaultdict(list)
    for example, scores in zip(examples, result.examples, strict=True):
        gathered[example.unit, example.group].append(scores.values)
    return [
        ExampleScores(
            f"{unit}, {group.partition(', ')[2]}",
            group,
            unit,
            {
                system: {
                    metric.name: round(float(np.mean([values[system][metric.name] for values in rows])), 2)
                    for metric in result.metrics
                }
                for system in result.systems
            },
        )
        for (unit, group), rows in gathered.items()
    ]
