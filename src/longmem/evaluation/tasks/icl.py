"""Memory-augmented in-context learning: label short texts after demonstrations in the window and in memory.

Paper, section "in-context learning"; scored as the released script does, and by likelihood of the labels with and
without contextual calibration (Zhao et al. 2021, "Calibrate Before Use").
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from longmem.evaluation.asking import Answer, Asker, Prompt, Tokens
from longmem.evaluation.bootstrap import Bootstrap
from longmem.evaluation.task import (
    Example,
    ExampleScores,
    Metric,
    Task,
    TaskResult,
    different,
    drawn,
    group_scores,
    means_by,
)
from longmem.evaluation.tasks.icl_data import IclSet
from longmem.evaluation.tasks.shots import LaidOut, Shots, draw, encode_after, start_tokens

CONTENT_FREE = ("N/A", "[MASK]", "")  # of Zhao et al.; their label probabilities are averaged
AVERAGE = "average"


class Prompts:
    """One set as tokens: `` Review: {text} Sentiment: {label}.``, each with the space that parts it from the last.

    Args:
        data: the set.
        tokenizer: of all systems.
    """

    def __init__(self, data: IclSet, tokenizer: Any) -> None:
        self.data, self.tokenizer = data, tokenizer
        self.start = start_tokens(tokenizer)
        self.options = tuple(encode_after(tokenizer, data.tail, [f" {label}" for label in data.labels]))
        self.content_free = self._queries(CONTENT_FREE)
        self.after = max(map(len, self.options)) - 1  # the last token of a label is no input
        self._shots: dict[tuple[int, int, int], Shots] = {}

    @cached_property
    def demonstrations(self) -> list[Tokens]:
        """Every training text with its label."""
        texts = [f"{self._query(e.text)} {self.data.labels[e.label]}." for e in self.data.train]
        return encode_after(self.tokenizer, ".", texts)

    @cached_property
    def queries(self) -> list[Tokens]:
        """Every test text."""
        return self._queries([example.text for example in self.data.test])

    def shots(self, seed: int, local: int, memory: int) -> Shots:
        """The demonstrations of a seed.

        Raises:
            DataError: there are not so many training texts.
        """
        if (seed, local, memory) not in self._shots:
            near, far = draw(self.data.name, seed, len(self.data.train), local, memory)
            known = self.demonstrations
            shots = Shots(self.start, tuple(known[n] for n in near), tuple(known[n] for n in far))
            self._shots[seed, local, memory] = shots
        return self._shots[seed, local, memory]

    def lay_out(self, asker: Asker, shots: Shots, text: int) -> LaidOut:
        """A test text with the demonstrations that fit; each content-free text fits in its place."""
        return shots.lay_out(asker, self.queries[text], self.after, max(map(len, self.content_free)))

    def _query(self, text: str) -> str:
        return f" {self.data.head} {text} {self.data.tail}"

    def _queries(self, texts: Sequence[str]) -> list[Tokens]:
        return encode_after(self.tokenizer, ".", [self._query(text) for text in texts])


@dataclass(frozen=True)
class Shown:
    """A test text by its number, and the numbers of demonstrations for window and memory."""

    dataset: str
    text: int
    local: int
    memory: int

    @property
    def shots(self) -> str:
        return f"{self.local} + {self.memory}"


class IclTask(Task[Shown]):
    """In-context learning over some sets. Groups are a set and its demonstrations, units are texts.

    Every system gets the same demonstrations. Those of memory are never among those of the window, and none is a test
    text. A system without memory sees those of the window only; the full-context backbone has as many of memory in
    front of them as fit.

    Args:
        sets: from ``read_icl``.
        tokenizer: of all systems.
        local_shots: numbers of demonstrations in the window.
        memory_shots: numbers of demonstrations in memory.
        seeds: draws of demonstrations, numbered from 1.
        limit: test texts of each set, drawn once and not stratified; None is all.
    """

    name = "icl"
    metrics = (
        Metric("first_token", "accuracy, first token is a prefix of the label", "%"),
        Metric("likelihood", "accuracy by label likelihood", "%"),
        Metric("calibrated", "accuracy by calibrated label likelihood", "%"),
    )

    def __init__(
        self,
        sets: Sequence[IclSet],
        tokenizer: Any,
        local_shots: Sequence[int] = (4, 20),
        memory_shots: Sequence[int] = (0, 200, 2000),
        seeds: int = 6,
        limit: int | None = 30,
    ) -> None:
        different(local_shots=local_shots, memory_shots=memory_shots)
        self.tokenizer = tokenizer
        self.prompts = {data.name: Prompts(data, tokenizer) for data in sets}
        self.local_shots, self.memory_shots = list(local_shots), list(memory_shots)
        self.seeds, self.limit = range(1, seeds + 1), limit

    def settings(self) -> dict[str, Any]:
        sets = {name: prompts.data for name, prompts in self.prompts.items()}
        return {
            "datasets": {name: data.source for name, data in sets.items()},
            "local_shots": self.local_shots,
            "memory_shots": self.memory_shots,
            "demonstration_seeds": list(self.seeds),
            "limit": self.limit,
            "test_texts": "drawn without replacement, not stratified, the same for all seeds and systems",
            "templates": {name: f"{data.head} {{text}} {data.tail} {{label}}. " for name, data in sets.items()},
            "content_free": list(CONTENT_FREE),
        }

    def examples(self) -> list[Example[Shown]]:
        """Every chosen test text, for every seed and every number of demonstrations.

        Raises:
            DataError: a set has too few training texts.
        """
        found = []
        for name, prompts in self.prompts.items():
            texts = drawn(f"{name} test", len(prompts.data.test), self.limit)
            prompts.shots(1, max(self.local_shots), max(self.memory_shots))
            for seed in self.seeds:
                for memory in self.memory_shots:
                    for local in self.local_shots:
                        for text in texts:
                            item, unit = Shown(name, text, local, memory), f"{name}/{text}"
                            label = f"{unit}, {item.shots}, seed {seed}"
                            found.append(Example(label, f"{name}, {item.shots}", unit, item, seed))
        return found

    def prompt(self, example: Example[Shown], asker: Asker) -> Prompt:
        """The question, and every content-free text in its place."""
        prompts, shots = self._shots(example)
        laid = prompts.lay_out(asker, shots, example.item.text)
        contexts = tuple(laid.before + query for query in (laid.query, *prompts.content_free))
        return Prompt(contexts, prompts.options, memory=shots.remembered(asker))

    def gold(self, example: Example[Shown]) -> dict[str, Any]:
        data = self.prompts[example.item.dataset].data
        return {"expected": data.labels[data.test[example.item.text].label]}

    def measure(self, example: Example[Shown], prompt: Prompt, answer: Answer) -> dict[str, float]:
        """Each 0 or 100; of equal scores the first label is taken."""
        data = self.prompts[example.item.dataset].data
        label, (scored, *free) = data.test[example.item.text].label, answer.scored
        corrected = calibrated(scored.logprobs, [each.logprobs for each in free])
        first = self.tokenizer.decode([scored.next_token])
        return {
            "first_token": 100.0 * starts_label(first, data.labels[label]),
            "likelihood": 100.0 * (scored.best == label),
            "calibrated": 100.0 * (int(np.argmax(corrected)) == label),
        }

    def summarise(
        self, result: TaskResult, examples: Sequence[Example[Shown]], askers: Sequence[Asker], bootstrap: Bootstrap
    ) -> TaskResult:
        """With ``average, 20 + 2000`` groups, in which every set has the same weight; examples averaged over seeds.

        ``extra`` has ``per_seed`` (group -> system -> metric -> values by seed, their mean and population standard
        deviation), ``shots`` (group -> system -> mean number of demonstrations in the ``window``, and held in
        ``memory`` or, for the full-context backbone, in front of the others) and ``sets`` (chance and largest class
        in %).
        """
        values = [one.values for one in result.examples]
        per_seed = means_by(examples, values, lambda example: str(example.seed))
        averages = []
        for shots in dict.fromkeys(example.item.shots for example in examples) if len(self.prompts) > 1 else ():
            some = [n for n, example in enumerate(examples) if example.item.shots == shots]
            sizes = {name: sum(examples[n].item.dataset == name for n in some) for name in self.prompts}
            weights = [1 / sizes[examples[n].item.dataset] for n in some]
            name, chosen = f"{AVERAGE}, {shots}", [examples[n] for n in some]
            averages.append(
                group_scores(
                    name, chosen, [values[n] for n in some], self.metrics, bootstrap, weights=weights, drawn="texts"
                )
            )
            per_seed[name] = _mean_over_sets([per_seed[f"{data}, {shots}"] for data in self.prompts])
        return replace(
            result,
            groups=[*result.groups, *averages],
            examples=_without_seeds(result, examples),
            extra=result.extra
            | {
                "per_seed": {
                    group: {s: {m: _spread(list(v.values())) for m, v in ms.items()} for s, ms in systems.items()}
                    for group, systems in per_seed.items()
                },
                "shots": self.shots_seen(examples, askers),
                "sets": {
                    name: {"chance": prompts.data.chance, "majority": round(prompts.data.majority, 2)}
                    for name, prompts in self.prompts.items()
                },
            },
        )

    def shots_seen(
        self, examples: Sequence[Example[Shown]], askers: Sequence[Asker]
    ) -> dict[str, dict[str, dict[str, float]]]:
        """Mean numbers of demonstrations that each system really has: group -> system -> window, memory."""
        counts: dict[str, dict[str, list[tuple[int, int]]]] = {}
        for example in examples:
            prompts, shots = self._shots(example)
            for asker in askers:
                seen = shots.seen(asker, prompts.lay_out(asker, shots, example.item.text))
                counts.setdefault(example.group, {}).setdefault(asker.name, []).append(seen)
        return {
            group: {
                name: dict(zip(("window", "memory"), np.mean(seen, axis=0).round(2).tolist(), strict=True))
                for name, seen in of_group.items()
            }
            for group, of_group in counts.items()
        }

    def notes(self, result: TaskResult) -> Iterator[str]:
        """How many demonstrations each system had before it, where not all of them fit."""
        who: dict[str, dict[str, None]] = {}
        for group, systems in result.extra["shots"].items():
            dataset, _, shots = group.rpartition(", ")
            local, memory = (int(number) for number in shots.split(" + "))
            for name, seen in systems.items():
                if seen["window"] < local:
                    line = f"{dataset}: {seen['window']:g} of {local} demonstrations fit the window"
                    who.setdefault(line, {})[name] = None
                if 0 < seen["memory"] < memory:
                    line = f"{dataset}: {seen['memory']:g} of {memory:,} demonstrations for memory are held"
                    who.setdefault(line, {})[name] = None
        return (f"{line}, on average ({', '.join(names)})" for line, names in who.items())

    def _shots(self, example: Example[Shown]) -> tuple[Prompts, Shots]:
        prompts, item = self.prompts[example.item.dataset], example.item
        return prompts, prompts.shots(example.seed, item.local, item.memory)


def starts_label(first: str, label: str) -> bool:
    """The released script's rule: the first token, stripped, is not empty and the label begins with it."""
    return bool(first.strip()) and label.startswith(first.strip())


def calibrated(logprobs: Sequence[float], content_free: Sequence[Sequence[float]]) -> list[float]:
    """Log-probabilities of the labels, each divided by what the label gets where there is nothing to judge.

    Zhao et al. 2021, equation 1 with W = diag(p)^-1 and b = 0, where p is the mean, over content-free texts, of the
    label probabilities, which sum to 1 for each text. The result is not normalised.

    Args:
        logprobs: of each label, nats.
        content_free: the same for each content-free text.
    """
    rows = np.array(content_free)
    weights = np.exp(rows - rows.max(axis=1, keepdims=True))
    prior = (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0)
    # a label that nothing makes likely has no prior to divide by: the smallest number stands for it
    return [value - math.log(max(share, 1e-300)) for value, share in zip(logprobs, prior.tolist(), strict=True)]


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "values": [round(value, 3) for value in values],
        "mean": round(float(np.mean(values)), 3),
        "std": round(float(np.std(values)), 3),
    }


def _mean_over_sets(sets: Sequence[Any]) -> dict[str, Any]:
    """Of ``means_by`` for each set: system -> metric -> seed -> mean of the sets' means."""
    return {
        system: {
            metric: {seed: float(np.mean([each[system][metric][seed] for each in sets])) for seed in seeds}
            for metric, seeds in metrics.items()
        }
        for system, metrics in sets[0].items()
    }


def _without_seeds(result: TaskResult, examples: Sequence[Example[Shown]]) -> list[ExampleScores]:
    """One record for each text and number of demonstrations, averaged over seeds: a sixth of the file."""
    means = means_by(examples, [one.values for one in result.examples], lambda example: example.unit)
    return [
        ExampleScores(
            f"{example.unit}, {example.item.shots}",
            example.group,
            example.unit,
            {s: {m: round(v[example.unit], 2) for m, v in ms.items()} for s, ms in means[example.group].items()},
        )
        for example in examples
        if example.seed == examples[0].seed
    ]
