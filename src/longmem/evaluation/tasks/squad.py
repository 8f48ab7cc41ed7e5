"""SQuAD v1.1: greedy answers, exact match and F1 (paper, SQuAD); and demonstrations in front of questions."""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longmem.errors import ConfigError, DataError
from longmem.evaluation.asking import Answer, Asker, Prompt, Tokens, encode_after, start_tokens
from longmem.evaluation.results import Bootstrap, Json
from longmem.evaluation.tasks import Example, Metric, Source, Task, drawn, leaves, means_by, read_source


class Asked(NamedTuple):
    """A question behind demonstrations, as token ids.

    Attributes:
        local: demonstrations for the window, the last nearest to the question.
        memory: demonstrations for memory, the last newest.
        queries: the question first, then what takes its place to calibrate.
        options: to score; without any ``new_tokens`` are generated.
        about: what the task knows about the question.
    """

    local: Sequence[Tokens]
    memory: Sequence[Tokens]
    queries: Sequence[Tokens]
    options: tuple[Tokens, ...] = ()
    new_tokens: int = 0
    about: Any = None


class LaidOut(NamedTuple):
    """Every query behind the demonstrations that fit; how many of them are of ``local`` and of ``memory``; tokens of
    the question that did not fit (``cut``)."""

    contexts: tuple[Tokens, ...]
    local: int
    memory: int
    cut: int


def lay_out(asked: Asked, asker: Asker, start: Tokens) -> LaidOut:
    """What is in the window before the answer; demonstrations are whole or left out, the farthest ones first.

    Any query fits behind the demonstrations; it loses its beginning where it does not fit even alone. In a full context
    demonstrations of memory are in front of those of the window.

    Raises:
        ConfigError: there is no room for a query.
    """
    after = max(map(len, asked.options), default=1) - 1 + asked.new_tokens  # the last token of an option is no input
    room = asker.window - after - len(start)
    if room < 1:
        raise ConfigError(f"window ({asker.window}) has no room for a question beside {after} tokens of answer")
    shown = [query[-room:] for query in asked.queries]
    room -= max(map(len, shown))
    near = fitting(asked.local, room)
    local = asked.local[len(asked.local) - near :]
    room -= sum(map(len, local))
    far = fitting(asked.memory, room) if asker.whole and near == len(asked.local) else 0
    before = (*start, *chain.from_iterable((*asked.memory[len(asked.memory) - far :], *local)))
    return LaidOut(tuple((*before, *query) for query in shown), near, far, len(asked.queries[0]) - len(shown[0]))


def fitting(texts: Sequence[Tokens], room: int) -> int:
    """How many of the last texts have at most ``room`` tokens together."""
    count = 0
    for text in reversed(texts):
        room -= len(text)
        if room < 0:
            break
        count += 1
    return count


def draw(name: str, seed: int, size: int, local: int, memory: int) -> tuple[list[int], list[int]]:
    """Numbers of the demonstrations for window and memory out of ``size``, in the order in which they are shown.

    More demonstrations contain fewer ones: 20 are 16 others and the 4, which are nearest to the question.

    Raises:
        DataError: there are not so many.
    """
    if local + memory > size:
        raise DataError(
            f"{name}: {local} demonstrations in the window and {memory:,} in memory need {local + memory:,} different "
            f"ones, there are {size:,}; ask for fewer"
        )
    order = list(range(size))
    random.Random(f"{name} {seed}").shuffle(order)
    return order[:local][::-1], order[size - memory :]


@dataclass(eq=False, kw_only=True)
class ShotsTask(Task):
    """Questions (items are ``Asked``) after demonstrations, which are the same for every system, and never both in the
    window and in memory. The last part of a group's name says how many: ``4 + 200``. Draws are numbered from 1.
    """

    draws: int = 1

    @property
    def seeds(self) -> Sequence[int]:
        return range(1, self.draws + 1)

    def prompt(self, example: Example, asker: Asker) -> Prompt:
        asked, start = example.item, start_tokens(self.tokenizer)
        memory = (*start, *chain.from_iterable(asked.memory)) if asked.memory and asker.reads_memory else ()
        return Prompt(lay_out(asked, asker, start).contexts, asked.options, asked.new_tokens, memory)

    def shots_seen(self, examples: Sequence[Example], askers: Sequence[Asker]) -> Json:
        """group -> system -> mean numbers of demonstrations in its ``window``, and in its ``memory`` or, of those for
        memory, in a full-context window; ``cut``: mean tokens of the question that did not fit."""
        found: Json = {}
        for example in examples:
            for asker in askers:
                laid = lay_out(example.item, asker, start_tokens(self.tokenizer))
                held = fitting(example.item.memory, asker.memory_size or 0)
                seen = (laid.local, laid.memory + held, laid.cut)
                found.setdefault(example.group, {}).setdefault(asker.name, []).append(seen)
        names = ("window", "memory", "cut")
        means: Json = leaves(found, lambda s: dict(zip(names, np.mean(s, axis=0).round(2).tolist(), strict=True)))
        return means

    def notes(self, result: Json) -> Iterator[str]:
        """What of demonstrations and questions did not fit, where something did not."""
        for group, systems in result["extra"]["shots"].items():
            local, memory = (int(number) for number in group.rpartition(", ")[2].split(" + "))
            for name, seen in systems.items():
                if seen["window"] < local or 0 < seen["memory"] < memory or seen["cut"]:
                    yield (
                        f"{group}, {name}: on average {seen['window']:g} demonstrations fit the window, "
                        f"{seen['memory']:g} are in memory, and {seen['cut']:g} tokens of the question are cut"
                    )


# SQuAD

TEMPLATE = "Context: {passage}\nQuestion: {question}\nAnswer: {answer}\n\n"
PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")


class SquadQuestion(NamedTuple):
    """A question, the passage it is about, and every answer that counts (a short span of the passage)."""

    id: str
    article: str
    passage: str
    question: str
    answers: tuple[str, ...]


def read_squad(path: str | Path) -> Source:
    """Read ``train-v1.1.json`` or ``dev-v1.1.json``, or a file of the same form."""
    return read_source(path, "SQuAD v1.1's form", "name a SQuAD v1.1 JSON file", _questions)


def _questions(content: Any, where: list[str]) -> Iterator[SquadQuestion]:
    for a, article in enumerate(content["data"]):
        where.append(f"data[{a}]")
        for p, paragraph in enumerate(article["paragraphs"]):
            for q, asked in enumerate(paragraph["qas"]):
                where.append(f"data[{a}].paragraphs[{p}].qas[{q}]")
                # a template of lines needs texts of one line
                texts = (paragraph["context"], asked["question"], *(one["text"] for one in asked["answers"]))
                passage, question, *answers = (" ".join(text.split()) for text in texts)
                if not answers:
                    raise ValueError("no answer; SQuAD v1.1 has one or more for every question, v2.0 not")
                title = str(article.get("title", a))
                yield SquadQuestion(asked["id"], title, passage, question, tuple(answers))


@dataclass(eq=False, kw_only=True)
class SquadTask(ShotsTask):
    """SQuAD after demonstrations. Groups are numbers of demonstrations, units are articles.

    A demonstration is one question of a passage with its first answer; no passage is shown twice or asked about.
    """

    name = "squad"
    metrics = (Metric("exact_match", "exact match", "%"), Metric("f1", "F1", "%"))
    train: str
    data: str
    local_shots: int = 3
    memory_shots: Sequence[int] = (0, 200)
    limit: int | None = 200
    max_answer_tokens: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self.shown, self.asked = read_squad(self.train), read_squad(self.data)

    def source(self) -> Json:
        return {"shown": self.shown.about(), "asked": self.asked.about(), "template": TEMPLATE}

    def examples(self) -> list[Example]:
        """Every chosen question, for every seed and number of demonstrations in memory.

        Raises:
            DataError: ``train`` has too few passages that are not asked about.
        """
        everything, found = self.asked.items, []
        chosen = [everything[n] for n in drawn(f"{self.asked.name} questions", len(everything), self.limit)]
        queries = encode_after(self.tokenizer, "\n\n", [shown(question, answered=False) for question in chosen])
        for seed in self.seeds:
            for memory in self.memory_shots:
                group, shots = f"{self.local_shots} + {memory}", self.shots(seed, memory)
                for question, query in zip(chosen, queries, strict=True):
                    item = Asked(*shots, [query], new_tokens=self.max_answer_tokens, about=question)
                    name = f"{question.id}, {group}, seed {seed}"
                    found.append(Example(name, group, question.article, item, seed))
        return found

    def shots(self, seed: int, memory: int) -> tuple[list[Tokens], list[Tokens]]:
        """Demonstrations for the window and for memory."""
        tested = {question.passage for question in self.asked.items}
        passages: dict[str, list[SquadQuestion]] = {}
        for question in self.shown.items:
            if question.passage not in tested:
                passages.setdefault(question.passage, []).append(question)
        near, far = draw(self.shown.name, seed, len(passages), self.local_shots, memory)
        pick = random.Random(f"{self.shown.name} {seed} questions")
        # for all passages, so that a passage has the same question whatever the numbers of demonstrations
        which = [questions[pick.randrange(len(questions))] for questions in passages.values()]
        encoded = encode_after(self.tokenizer, "\n\n", [shown(which[n], answered=True) for n in (*near, *far)])
        return encoded[: len(near)], encoded[len(near) :]

    def gold(self, example: Example) -> Json:
        question = example.item.about
        return {"asked": question.question, "expected": question.answers}

    def measure(self, example: Example, prompt: Prompt, answer: Answer) -> dict[str, float]:
        """The metrics of the first line of what was generated, 0 to 100."""
        said, answers = self.said(answer).partition("\n")[0].strip(), example.item.about.answers
        return {"exact_match": 100 * exact_match(said, answers), "f1": 100 * f1_score(said, answers)}

    def summarise(
        self, result: Json, examples: Sequence[Example], askers: Sequence[Asker], bootstrap: Bootstrap
    ) -> None:
        """``extra`` has means ``per_seed`` and ``by_article``, and ``shots`` (see ``shots_seen``)."""
        values = [one["values"] for one in result["examples"]]
        result["extra"] = {
            "per_seed": means_by(examples, values, lambda example: example.seed),
            "by_article": means_by(examples, values, lambda example: example.unit),
            "shots": self.shots_seen(examples, askers),
        }


def shown(question: SquadQuestion, *, answered: bool) -> str:
    """A question by ``TEMPLATE``, with its first answer or cut before the space that leads to it."""
    # the template is cut, not the text: an answer may say "Answer:" itself
    template = TEMPLATE if answered else TEMPLATE.partition(" {answer}")[0]
    return template.format(passage=question.passage, question=question.question, answer=question.answers[0])


def normalise_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, one space between words (evaluate-v1.1.py)."""
    # punctuation goes first, as published: "a-ha" is one word, not the article and a word
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction is one of the answers after ``normalise_answer``, else 0.0."""
    return float(normalise_answer(prediction) in map(normalise_answer, answers))


def f1_score(prediction: str, answers: Sequence[str]) -> float:
    """The best F1 (0 to 1) of the prediction's words against those of one of the answers, both normalised.

    Words count as often as they occur in both. Where they share no word F1 is 0, also if both are empty.
    """
    best, found = 0.0, normalise_answer(prediction).split()
    for true in (normalise_answer(answer).split() for answer in answers):
        shared = (Counter(found) & Counter(true)).total()
        best = max(best, 2 * shared / (len(found) + len(true))) if shared else best
    return best
