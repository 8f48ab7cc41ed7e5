"""Memory-augmented in-context learning: label short texts after demonstrations in the window and in memory.

Paper, section "in-context learning"; scored as the released script does, and by likelihood of the labels with and
without contextual calibration (Zhao et al. 2021, "Calibrate Before Use").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from longmem.evaluation.asking import Answer, Asker, Prompt, Tokens
from longmem.evaluation.documents import start_tokens
from longmem.evaluation.results import Bootstrap, Json
from longmem.evaluation.task import Example, Metric, different, drawn, group_scores, leaves, means_by
from longmem.evaluation.tasks.icl_data import IclSet
from longmem.evaluation.tasks.shots import LaidOut, Shots, ShotsTask, draw, encode_after

CONTENT_FREE = ("N/A", "[MASK]", "")  # of Zhao et al.; their label probabilities are averaged
MOST_CALIBRATED = 20  # classes; with more of them each content-free text would cost as much as the question


class Prompts:
    """One set as tokens: `` Review: {text} Sentiment: {label}.``, each with the space that parts it from the last."""

    def __init__(self, data: IclSet, tokenizer: Any) -> None:
        self.data, self.tokenizer = data, tokenizer
        self.options = tuple(encode_after(tokenizer, data.tail, [f" {label}" for label in data.labels]))
        self.content_free = self._queries(CONTENT_FREE if len(data.labels) <= MOST_CALIBRATED else ())
        self.shots = lru_cache(maxsize=None)(self._draw)

    @cached_property
    def demonstrations(self) -> list[Tokens]:
        """Every training text with its label."""
        texts = [f"{self._query(text)} {self.data.labels[label]}." for text, label in self.data.train]
        return encode_after(self.tokenizer, ".", texts)

    @cached_property
    def queries(self) -> list[Tokens]:
        """Every test text."""
        return self._queries([text for text, _ in self.data.test])

    def lay_out(self, asker: Asker, shots: Shots, text: int) -> LaidOut:
        """A test text with the demonstrations that fit; each content-free text fits in its place."""
        after = max(map(len, self.options)) - 1  # the last token of a label is no input
        return shots.lay_out(asker, self.queries[text], after, max(map(len, self.content_free), default=0))

    def _draw(self, seed: int, local: int, memory: int) -> Shots:
        near, far = draw(self.data.name, seed, len(self.data.train), local, memory)
        known = self.demonstrations
        return Shots(start_tokens(self.tokenizer), tuple(known[n] for n in near), tuple(known[n] for n in far))

    def _query(self, text: str) -> str:
        return f" {self.data.head} {text} {self.data.tail}"

    def _queries(self, texts: Sequence[str]) -> list[Tokens]:
        return encode_after(self.tokenizer, ".", [self._query(text) for text in texts])


class Shown(NamedTuple):
    """A test text by its number, and the numbers of demonstrations for window and memory."""

    dataset: str
    text: int
    local: int
    memory: int

    @property
    def shots(self) -> str:
        return f"{self.local} + {self.memory}"


class IclTask(ShotsTask):
    """In-context learning over some sets. Groups are a set and its demonstrations, units are texts.

    Every system gets the same demonstrations. Those of memory are never among those of the window, and none is a test
    text. A system without memory sees those of the window only; the full-context backbone has as many of memory in
    front of them as fit.

    Args:
        sets: from ``read_icl``.
        local_shots: numbers of demonstrations in the window.
        memory_shots: numbers of demonstrations in memory.
        seeds: draws of demonstrations, numbered from 1.
        limit: test texts of each set, drawn once and not stratified; None is all.
    """

    name = "icl"
    metrics = (
        Metric("first_token", "accuracy, first token is a prefix of the label", "%"),
        Metric("likelihood", "accuracy by label likelihood", "%"),
        Metric("calibrated", "accuracy by calibrated label likelihood", "%"),  # uncalibrated where classes are many
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
        self.tokenizer, self.prompts = tokenizer, {data.name: Prompts(data, tokenizer) for data in sets}
        self.local_shots, self.memory_shots = list(local_shots), list(memory_shots)
        self.seeds, self.limit = range(1, seeds + 1), limit

    def settings(self) -> Json:
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

    def examples(self) -> list[Example]:
        """Every chosen test text, for every seed and every number of demonstrations.

        Raises:
            DataError: a set has too few training texts.
        """
        found = []
        for name, prompts in self.prompts.items():
            prompts.shots(1, max(self.local_shots), max(self.memory_shots))
            texts = drawn(f"{name} test", len(prompts.data.test), self.limit)
            settings = [(s, m, loc) for s in self.seeds for m in self.memory_shots for loc in self.local_shots]
            for seed, memory, local in settings:
                for text in texts:
                    item, unit = Shown(name, text, local, memory), f"{name}/{text}"
                    label = f"{unit}, {item.shots}, seed {seed}"
                    found.append(Example(label, f"{name}, {item.shots}", unit, item, seed))
        return found

    def prompt(self, example: Example, asker: Asker) -> Prompt:
        """The question, and every content-free text in its place."""
        prompts = self.prompts[example.item.dataset]
        shots, laid = self.laid_out(example, asker)
        contexts = tuple(laid.before + query for query in (laid.query, *prompts.content_free))
        return Prompt(contexts, prompts.options, memory=shots.remembered(asker))

    def gold(self, example: Example) -> Json:
        data = self.prompts[example.item.dataset].data
        return {"expected": data.labels[data.test[example.item.text].label]}

    def measure(self, example: Example, prompt: Prompt, answer: Answer) -> dict[str, float]:
        """Each 0 or 100; of equal scores the first label is taken."""
        expected, (scored, *free) = self.gold(example)["expected"], answer.scored
        label = self.prompts[example.item.dataset].data.labels.index(expected)
        corrected = calibrated(scored.logprobs, [each.logprobs for each in free])
        return {
            "first_token": 100.0 * starts_label(self.tokenizer.decode([scored.next_token]), expected),
            "likelihood": 100.0 * (scored.best == label),
            "calibrated": 100.0 * (int(np.argmax(corrected)) == label),
        }

    def summarise(
        self, result: Json, examples: Sequence[Example], askers: Sequence[Asker], bootstrap: Bootstrap
    ) -> None:
        """With ``average, 20 + 2000`` groups, in which every set has the same weight; examples averaged over seeds.

        ``extra`` has ``per_seed`` (group -> system -> metric -> values by seed, their mean and population standard
        deviation), ``shots`` (see ``ShotsTask.shots_seen``) and ``sets`` (chance and largest class in %).
        """
        values = [one["values"] for one in result["examples"]]
        per_seed = means_by(examples, values, lambda example: example.seed, digits=9)
        spread = {group: _spread([of_group]) for group, of_group in per_seed.items()}
        for shots in dict.fromkeys(example.item.shots for example in examples) if len(self.prompts) > 1 else ():
            some = [n for n, example in enumerate(examples) if example.item.shots == shots]
            sizes = {name: sum(examples[n].item.dataset == name for n in some) for name in self.prompts}
            weights, name = [1 / sizes[examples[n].item.dataset] for n in some], f"average, {shots}"
            chosen = [examples[n] for n in some], [values[n] for n in some]
            result["groups"].append(
                group_scores(name, *chosen, self.metrics, bootstrap, weights=weights, drawn="texts")
            )
            spread[name] = _spread([per_seed[f"{data}, {shots}"] for data in self.prompts])
        means = means_by(examples, values, lambda example: example.unit, digits=2)
        result["examples"] = [
            {"id": f"{one.unit}, {one.item.shots}", "group": one.group, "unit": one.unit, "values": {
                system: {metric: parts[one.unit] for metric, parts in metrics.items()}
                for system, metrics in means[one.group].items()}}
            for one in examples if one.seed == examples[0].seed
        ]  # fmt: skip
        sets = {name: prompts.data for name, prompts in self.prompts.items()}
        result["extra"] = {
            "per_seed": spread,
            "shots": self.shots_seen(examples, askers),
            "sets": {name: {"chance": one.chance, "majority": round(one.majority, 2)} for name, one in sets.items()},
        }

    def laid_out(self, example: Example, asker: Asker) -> tuple[Shots, LaidOut]:
        prompts, item = self.prompts[example.item.dataset], example.item
        shots = prompts.shots(example.seed, item.local, item.memory)
        return shots, prompts.lay_out(asker, shots, item.text)


def starts_label(first: str, label: str) -> bool:
    """The released script's rule: the first token, stripped, is not empty and the label begins with it."""
    return bool(first.strip()) and label.startswith(first.strip())


def calibrated(logprobs: Sequence[float], content_free: Sequence[Sequence[float]]) -> list[float]:
    """Log-probabilities of the labels, each divided by what the label gets where there is nothing to judge.

    Zhao et al. 2021, equation 1 with W = diag(p)^-1 and b = 0, where p is the mean, over content-free texts, of the
    label probabilities, which sum to 1 for each text. The result is not normalised.

    Args:
        logprobs: of each label, nats.
        content_free: the same for each content-free text; without any nothing is corrected.
    """
    if not content_free:
        return list(logprobs)
    rows = np.array(content_free)
    weights = np.exp(rows - rows.max(axis=1, keepdims=True))
    prior = (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0)
    # a label that nothing makes likely has no prior to divide by: the smallest number stands for it
    return [value - math.log(max(share, 1e-300)) for value, share in zip(logprobs, prior.tolist(), strict=True)]


def _spread(sets: Sequence[Json]) -> Json:
    """Of each set system -> metric -> seed -> mean: over the sets, the value of each seed, their mean and deviation."""
    found: Json = {}
    for system, metrics in sets[0].items():
        for metric in metrics:
            values = np.mean([list(each[system][metric].values()) for each in sets], axis=0)
            numbers = {"values": values, "mean": values.mean(), "std": values.std()}
            found.setdefault(system, {})[metric] = leaves(numbers, lambda number: np.round(number, 3).tolist())
    return found
