"""SQuAD v1.1 with demonstrations in the window and in memory: greedy answers, exact match and F1 (paper, SQuAD)."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from longmem.errors import ConfigError, DataError
from longmem.evaluation.asking import Asker, Prompt
from longmem.evaluation.runner import TaskResult
from longmem.evaluation.task import Example, Metric, digest_of
from longmem.evaluation.tasks.shots import Shots, Tokens, draw, encode_after, start_tokens
from longmem.evaluation.tasks.squad_data import SquadFile, SquadQuestion
from longmem.evaluation.tasks.squad_metrics import exact_match, f1_score

EXACT, F1 = "exact_match", "f1"
METRICS = (Metric(EXACT, "exact match", "%"), Metric(F1, "F1", "%"))
TEMPLATE = "Context: {passage}\nQuestion: {question}\nAnswer: {answer}\n\n"
DEFAULT_LIMIT = 200


@dataclass(frozen=True)
class SquadSettings:
    """How many demonstrations and questions.

    Attributes:
        local_shots: demonstrations in the window.
        memory_shots: numbers of demonstrations in memory, each reported apart.
        seeds: draws of demonstrations; they are 1 to ``seeds``.
        limit: questions, drawn once with a fixed seed over all articles; None is all of them.
        max_answer_tokens: an answer that has no line end by then is cut.

    Raises:
        ConfigError: lists every setting that breaks a rule.
    """

    local_shots: int = 3
    memory_shots: tuple[int, ...] = (0, 200)
    seeds: int = 1
    limit: int | None = DEFAULT_LIMIT
    max_answer_tokens: int = 32

    def __post_init__(self) -> None:
        problems = [] if self.local_shots >= 0 else [f"local_shots ({self.local_shots}) must not be below 0"]
        many = self.memory_shots
        if not many or min(many) < 0 or len(set(many)) < len(many):
            problems.append(f"memory_shots ({','.join(map(str, many))}) must be different numbers from 0 up; try 0,200")
        for name in ("seeds", "limit", "max_answer_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name} ({value}) must be at least 1")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True)
class SquadExample(Example):
    """A question after the demonstrations of one seed; ``number`` is its place in the file."""

    number: int
    seed: int
    memory: int


class SquadTask:
    """SQuAD over demonstrations; see ``longmem.evaluation.task.Task``.

    A demonstration is one question of a passage with its first answer; no passage is shown twice or asked about.
    Systems see demonstrations as in ``IclTask``. Intervals draw whole articles.

    Args:
        train: what demonstrations are drawn from.
        asked: whose questions are asked, ``dev-v1.1.json``.
        tokenizer: of all systems.
        settings: how many of what.

    Raises:
        DataError: no passage of ``train`` is left that is not asked about.
    """

    name = "squad"
    metrics = METRICS

    def __init__(
        self, train: SquadFile, asked: SquadFile, tokenizer: Any, settings: SquadSettings | None = None
    ) -> None:
        self.chosen = settings or SquadSettings()
        self.train, self.asked, self.tokenizer = train, asked, tokenizer
        tested = {question.passage for question in asked.questions}
        passages: dict[str, list[SquadQuestion]] = defaultdict(list)
        for question in train.questions:
            if question.passage not in tested:
                passages[question.passage].append(question)
        if not passages:
            raise DataError(f"{train.name}: every passage in it is asked about in {asked.name}; name the training file")
        self._passages = list(passages.values())
        self._shots = lru_cache(maxsize=None)(self._draw)

    @property
    def seeds(self) -> range:
        """Of the demonstrations."""
        return range(1, self.chosen.seeds + 1)

    def settings(self) -> dict[str, Any]:
        files = {"train": self.train, "asked": self.asked}
        return {
            **{key: {"file": f.name, "sha256": f.sha256, "questions": len(f.questions)} for key, f in files.items()},
            "local_shots": self.chosen.local_shots,
            "memory_shots": list(self.chosen.memory_shots),
            "demonstration_seeds": list(self.seeds),
            "limit": self.chosen.limit,
            "max_answer_tokens": self.chosen.max_answer_tokens,
            "template": TEMPLATE,
        }

    def examples(self) -> list[SquadExample]:
        """Every chosen question, for every seed and number of demonstrations in memory.

        Raises:
            DataError: there are too few passages to draw demonstrations from.
        """
        found = []
        for seed in self.seeds:
            for memory in self.chosen.memory_shots:
                shown = self._shots(seed, memory).digest()
                group = f"{self.chosen.local_shots} + {memory}"
                for number, query in self._queries.items():
                    question = self.asked.questions[number]
                    digest = digest_of(shown, query, question.answers, self.chosen.max_answer_tokens)
                    name = f"{question.id}, {group}, seed {seed}"
                    found.append(SquadExample(name, digest, group, question.article, number, seed, memory))
        return found

    def answer(self, asker: Asker, examples: Sequence[SquadExample]) -> Iterator[tuple[int, dict[str, float]]]:
        """Exact match and F1 in %; demonstrations in memory are read once for each seed.

        Raises:
            ConfigError: there are demonstrations for memory, but the system's memory holds nothing after reading them;
                or the window has no room for a question.
        """
        sittings: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, example in enumerate(examples):
            seen = example.memory if asker.reads_memory or asker.whole else 0
            sittings[example.seed, seen].append(number)
        for (seed, seen), numbers in sittings.items():
            shots = self._shots(seed, seen)
            bank = shots.remembered(asker) if asker.reads_memory and seen else None
            of_question: dict[int, list[int]] = defaultdict(list)
            for number in numbers:
                of_question[examples[number].number].append(number)
            new = self.chosen.max_answer_tokens
            prompts = [Prompt(shots.lay_out(asker, self._queries[n], new).context, new) for n in of_question]
            members = list(of_question.items())
            for at, ids in asker.generate(prompts, bank=bank):
                question, same = members[at]
                values = judged(self.tokenizer.decode(ids, skip_special_tokens=True), self.asked.questions[question])
                for number in same:
                    yield number, values

    def summarise(self, result: TaskResult, askers: Sequence[Asker]) -> TaskResult:
        """The result with ``extra``.

        ``per_seed`` (group -> system -> metric -> values by seed), ``by_article`` (the same by article), and ``shots``
        (group -> system -> mean number of demonstrations in the ``window``, and in ``memory`` or in front of the others
        in the full-context window; ``cut``: mean tokens of the passage that did not fit).
        """
        examples = self.examples()
        by_seed: dict[Any, list[float]] = defaultdict(list)
        by_article: dict[Any, list[float]] = defaultdict(list)
        for example, scores in zip(examples, result.examples, strict=True):
            for system, values in scores.values.items():
                for metric, value in values.items():
                    by_seed[example.group, system, metric, str(example.seed)].append(value)
                    by_article[example.group, system, metric, example.unit].append(value)
        asked = [asker for asker in askers if asker.name in result.systems]
        return result.with_extra(per_seed=_nested(by_seed), by_article=_nested(by_article), shots=self._seen(asked))

    def _seen(self, askers: Sequence[Asker]) -> dict[str, dict[str, dict[str, float]]]:
        found: dict[str, dict[str, dict[str, float]]] = {}
        for memory in self.chosen.memory_shots:
            group = found.setdefault(f"{self.chosen.local_shots} + {memory}", {})
            for asker in askers:
                counts = []
                for seed in self.seeds:
                    shots = self._shots(seed, memory)
                    held = shots.held(asker)
                    for query in self._queries.values():
                        laid = shots.lay_out(asker, query, self.chosen.max_answer_tokens)
                        counts.append((laid.local, laid.memory + held, laid.cut))
                means = np.mean(counts, axis=0).round(2).tolist()
                group[asker.name] = dict(zip(("window", "memory", "cut"), means, strict=True))
        return found

    def _draw(self, seed: int, memory: int) -> Shots:
        near, far = draw(self.train.name, seed, len(self._passages), self.chosen.local_shots, memory)
        pick = random.Random(f"{self.train.name} {seed} questions")
        # for all passages, so that a passage has the same question whatever the numbers of demonstrations
        which = [pick.randrange(len(questions)) for questions in self._passages]
        texts = encode_after(
            self.tokenizer, "\n\n", [shown(self._passages[n][which[n]], answered=True) for n in (*near, *far)]
        )
        start = start_tokens(self.tokenizer)
        return Shots(start, tuple(texts[: len(near)]), tuple(texts[len(near) :]))

    @cached_property
    def _queries(self) -> dict[int, Tokens]:
        """Place in the file -> question as tokens, of those that are asked."""
        count, limit = len(self.asked.questions), self.chosen.limit
        numbers = list(range(count))
        if limit is not None and limit < count:
            numbers = sorted(random.Random(f"{self.asked.name} questions").sample(numbers, limit))
        texts = [shown(self.asked.questions[number], answered=False) for number in numbers]
        return dict(zip(numbers, encode_after(self.tokenizer, "\n\n", texts), strict=True))


def shown(question: SquadQuestion, *, answered: bool) -> str:
    """A question by ``TEMPLATE``, with its first answer or cut before the space that leads to it."""
    # the template is cut, not the text: an answer may say "Answer:" itself
    template = TEMPLATE if answered else TEMPLATE.partition(" {answer}")[0]
    return template.format(passage=question.passage, question=question.question, answer=question.answers[0])


def first_line(text: str) -> str:
    """An answer ends where its line does."""
    return text.partition("\n")[0].strip()


def judged(text: str, question: SquadQuestion) -> dict[str, float]:
    """The metrics of what was generated, 0 to 100."""
    answer = first_line(text)
    return {
        EXACT: 100 * exact_match(answer, question.answers),
        F1: 100 * f1_score(answer, question.answers),
    }


def _nested(values: dict[tuple[str, str, str, str], list[float]]) -> dict[str, Any]:
    """group -> system -> metric -> (seed or article) -> mean."""
    found: dict[str, Any] = {}
    for (group, system, metric, part), numbers in values.items():
        of_metric = found.setdefault(group, {}).setdefault(system, {}).setdefault(metric, {})
        of_metric[part] = round(float(np.mean(numbers)), 3)
    return found
