"""Memory-augmented in-context learning: label short texts after demonstrations in the window and in memory.

Paper, section "in-context learning"; scored as the released script does, and by likelihood of the labels with and
without contextual calibration (Zhao et al. 2021, "Calibrate Before Use").
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from longmem.errors import ConfigError
from longmem.evaluation.asking import Asker, Choice, Scored
from longmem.evaluation.task import Example, Metric, digest_of
from longmem.evaluation.tasks.icl_data import IclSet
from longmem.evaluation.tasks.shots import LaidOut, Shots, Tokens, draw, encode_after, start_tokens

CONTENT_FREE = ("N/A", "[MASK]", "")  # of Zhao et al.; their label probabilities are averaged
FIRST_TOKEN, LIKELIHOOD, CALIBRATED = "first_token", "likelihood", "calibrated"
METRICS = (
    Metric(FIRST_TOKEN, "accuracy, first token is a prefix of the label", "%"),
    Metric(LIKELIHOOD, "accuracy by label likelihood", "%"),
    Metric(CALIBRATED, "accuracy by calibrated label likelihood", "%"),
)
DEFAULT_LIMIT = 30  # five sets, six seeds and seven systems of the shipped pair in under an hour of one core


@dataclass(frozen=True)
class IclSettings:
    """How many demonstrations and questions.

    Attributes:
        local_shots: numbers of demonstrations in the window.
        memory_shots: numbers of demonstrations in memory.
        seeds: draws of demonstrations; they are 1 to ``seeds``.
        limit: test texts of each set, drawn once and not stratified; None is all of them.

    Raises:
        ConfigError: lists every setting that breaks a rule.
    """

    local_shots: tuple[int, ...] = (4, 20)
    memory_shots: tuple[int, ...] = (0, 200, 2000)
    seeds: int = 6
    limit: int | None = DEFAULT_LIMIT

    def __post_init__(self) -> None:
        problems = [
            f"{name} ({','.join(map(str, shots))}) must be different numbers from 0 up; try {good}"
            for name, shots, good in (
                ("local_shots", self.local_shots, "4,20"),
                ("memory_shots", self.memory_shots, "0,2000"),
            )
            if not shots or min(shots) < 0 or len(set(shots)) < len(shots)
        ]
        for name, value in (("seeds", self.seeds), ("limit", self.limit)):
            if value is not None and value < 1:
                problems.append(f"{name} ({value}) must be at least 1")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True)
class IclExample(Example):
    """A test text after the demonstrations of one seed.

    Attributes:
        dataset: its set.
        text: its number among the set's test texts.
        seed: of the demonstrations.
        local: how many are for the window.
        memory: how many are for memory.
    """

    dataset: str
    text: int
    seed: int
    local: int
    memory: int


class Prompts:
    """One set as tokens: `` Review: {text} Sentiment: {label}.``, each with the space that parts it from the last.

    Args:
        data: the set.
        tokenizer: of all systems.
    """

    def __init__(self, data: IclSet, tokenizer: Any) -> None:
        self.data, self.tokenizer = data, tokenizer
        self.start = start_tokens(tokenizer)
        self.options = encode_after(tokenizer, data.kind.tail, [f" {label}" for label in data.kind.labels])
        self.content_free = self._queries(CONTENT_FREE)
        self.after = max(map(len, self.options)) - 1  # the last token of a label is no input

    @cached_property
    def demonstrations(self) -> list[Tokens]:
        """Every training text with its label."""
        names = self.data.kind.labels
        return encode_after(self.tokenizer, ".", [f"{self._query(e.text)} {names[e.label]}." for e in self.data.train])

    @cached_property
    def queries(self) -> list[Tokens]:
        """Every test text."""
        return self._queries([example.text for example in self.data.test])

    def shots(self, seed: int, local: int, memory: int) -> Shots:
        """The demonstrations of a seed.

        Raises:
            DataError: there are not so many training texts.
        """
        near, far = draw(self.data.name, seed, len(self.data.train), local, memory)
        known = self.demonstrations
        return Shots(self.start, tuple(known[n] for n in near), tuple(known[n] for n in far))

    def lay_out(self, asker: Asker, shots: Shots, text: int) -> LaidOut:
        """A test text with the demonstrations that fit; each content-free text fits in its place."""
        return shots.lay_out(asker, self.queries[text], self.after, max(map(len, self.content_free)))

    def _query(self, text: str) -> str:
        return f" {self.data.kind.head} {text} {self.data.kind.tail}"

    def _queries(self, texts: Sequence[str]) -> list[Tokens]:
        return encode_after(self.tokenizer, ".", [self._query(text) for text in texts])


class IclTask:
    """In-context learning over some sets; see ``longmem.evaluation.task.Task``.

    Every system gets the same demonstrations. Those of memory are never among those of the window, and none is a test
    text. A system without memory sees those of the window only; it is asked once for all numbers of demonstrations in
    memory, since they change nothing. The full-context backbone has as many of memory in front of them as fit. Without
    demonstrations in memory a system with memory has an empty one, and the answers of the same model without memory.

    Args:
        sets: from ``read_icl``.
        tokenizer: of all systems.
        settings: how many of what.
    """

    name = "icl"
    metrics = METRICS

    def __init__(self, sets: Sequence[IclSet], tokenizer: Any, settings: IclSettings | None = None) -> None:
        self.chosen = settings or IclSettings()
        self.prompts = {data.name: Prompts(data, tokenizer) for data in sets}
        self._shots: dict[tuple[str, int, int, int], Shots] = {}
        self._examples: list[IclExample] | None = None
        self._known: dict[tuple[int, int, str], dict[Tokens, Scored]] = {}

    @property
    def seeds(self) -> range:
        """Of the demonstrations."""
        return range(1, self.chosen.seeds + 1)

    def settings(self) -> dict[str, Any]:
        return {
            "datasets": {name: prompts.data.source for name, prompts in self.prompts.items()},
            "local_shots": list(self.chosen.local_shots),
            "memory_shots": list(self.chosen.memory_shots),
            "demonstration_seeds": list(self.seeds),
            "limit": self.chosen.limit,
            "test_texts": "drawn without replacement, not stratified, the same for all seeds and systems",
            "templates": {
                name: f"{prompts.data.kind.head} {{text}} {prompts.data.kind.tail} {{label}}. "
                for name, prompts in self.prompts.items()
            },
            "content_free": list(CONTENT_FREE),
        }

    def examples(self) -> list[IclExample]:
        """Every chosen test text, for every seed and every number of demonstrations.

        Raises:
            DataError: a set has too few training texts.
        """
        if self._examples is None:
            self._examples = [
                example
                for name in self.prompts
                for seed in self.seeds
                for memory in self.chosen.memory_shots
                for local in self.chosen.local_shots
                for example in self._examples_of(name, seed, local, memory)
            ]
        return self._examples

    def answer(self, asker: Asker, examples: Sequence[IclExample]) -> Iterator[tuple[int, dict[str, float]]]:
        """Accuracies (0 or 100) by ``METRICS``; demonstrations in memory are read once for each set and seed.

        Raises:
            ConfigError: there are demonstrations for memory, but the system's memory holds nothing after reading them.
        """
        sittings: dict[tuple[str, int, int], list[int]] = {}
        for number, example in enumerate(examples):
            seen = example.memory if asker.reads_memory or asker.whole else 0
            sittings.setdefault((example.dataset, example.seed, seen), []).append(number)
        for (dataset, seed, seen), numbers in sittings.items():
            asked = [(number, examples[number]) for number in numbers]
            yield from self._sit(asker, self.prompts[dataset], seed, seen, asked)

    def shots(self, dataset: str, seed: int, local: int, memory: int) -> Shots:
        """Demonstrations of one seed, encoded."""
        key = (dataset, seed, local, memory)
        if key not in self._shots:
            self._shots[key] = self.prompts[dataset].shots(seed, local, memory)
        return self._shots[key]

    def _examples_of(self, name: str, seed: int, local: int, memory: int) -> Iterator[IclExample]:
        prompts = self.prompts[name]
        demonstrations = self.shots(name, seed, local, memory).digest()
        for text in chosen_texts(prompts.data, self.chosen.limit):
            unit, shots = f"{name}/{text}", f"{local} + {memory}"
            digest = digest_of(
                demonstrations,
                prompts.queries[text],
                prompts.options,
                prompts.content_free,
                prompts.data.test[text].label,
            )
            yield IclExample(
                f"{unit}, {shots}, seed {seed}", digest, f"{name}, {shots}", unit, name, text, seed, local, memory
            )

    def _sit(
        self, asker: Asker, prompts: Prompts, seed: int, memory: int, asked: Sequence[tuple[int, IclExample]]
    ) -> Iterator[tuple[int, dict[str, float]]]:
        """Questions that share their demonstrations in memory; equal ones are asked once."""
        name = prompts.data.name
        bank = None
        if asker.reads_memory and memory:
            bank = self.shots(name, seed, 0, memory).remembered(asker)
        contexts: dict[Tokens, None] = {}
        laid_out = []
        for number, example in asked:
            laid = prompts.lay_out(asker, self.shots(name, seed, example.local, memory), example.text)
            free = [laid.before + query for query in prompts.content_free]
            laid_out.append((number, prompts.data.test[example.text].label, laid.context, free))
            contexts.update(dict.fromkeys((laid.context, *free)))
        # the same model without memory, or with an empty one, is asked once under all its names
        apart = bank is not None or asker.whole
        known = {} if apart else self._known.setdefault((id(asker.model), asker.window, name), {})
        waiting = [context for context in contexts if context not in known]
        for at, scored in asker.score([Choice(context, prompts.options) for context in waiting], bank=bank):
            known[waiting[at]] = scored
        for number, label, question, free in laid_out:
            first = asker.tokenizer.decode([known[question].next_token])
            right = starts_label(first, prompts.data.kind.labels[label])
            yield number, judged(known[question], [known[context] for context in free], label, first=right)


def chosen_texts(data: IclSet, limit: int | None) -> list[int]:
    """Numbers of the test texts that are asked: all, or so many, drawn with a fixed seed."""
    count = len(data.test)
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(random.Random(f"{data.name} test").sample(range(count), limit))


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
    shares = [_shares(row) for row in content_free]
    prior = [sum(column) / len(shares) for column in zip(*shares, strict=True)]
    # a label that nothing makes likely has no prior to divide by: the smallest number stands for it
    return [value - math.log(max(share, 1e-300)) for value, share in zip(logprobs, prior, strict=True)]


def judged(scored: Scored, content_free: Sequence[Scored], label: int, *, first: bool) -> dict[str, float]:
    """The metrics of one answer, each 0 or 100; of equal scores the first label is taken."""
    corrected = calibrated(scored.logprobs, [free.logprobs for free in content_free])
    return {
        FIRST_TOKEN: 100.0 * first,
        LIKELIHOOD: 100.0 * (_best(scored.logprobs) == label),
        CALIBRATED: 100.0 * (_best(corrected) == label),
    }


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda number: values[number])


def _shares(logprobs: Sequence[float]) -> list[float]:
    top = max(logprobs)
    weights = [math.exp(value - top) for value in logprobs]
    return [weight / sum(weights) for weight in weights]
