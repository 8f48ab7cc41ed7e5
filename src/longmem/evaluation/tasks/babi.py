"""bAbI questions whose facts are hidden, in their order, in the text of books: BABILong (Kuratov et al. 2024)."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from longmem.data.text import TextSource, read_documents
from longmem.errors import DataError
from longmem.evaluation.asking import Answer, Asker, Prompt, Tokens, rereading
from longmem.evaluation.results import Json
from longmem.evaluation.task import Example, Metric, different, digest_of
from longmem.evaluation.tasks.needle import Haystack, NeedleTask, Trial, _Hidden
from longmem.evaluation.tasks.shots import encode_after
from longmem.store.recall import PlainTexts, Recall

SHOWN = "Story: {facts}\nQuestion: {question}\nAnswer: {answer}\n\n"
ASKED = "Question: {}\nAnswer:"
NEW_TOKENS = 12


@dataclass(frozen=True)
class Story:
    """A question, its answer, and all facts of the story before it."""

    facts: tuple[str, ...]
    question: str
    answer: str


@dataclass(frozen=True)
class BabiSet:
    """One task of bAbI; ``labels``: every answer that its test file has."""

    number: int
    train: tuple[Story, ...]
    test: tuple[Story, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(sorted({story.answer for story in self.test}))


def read_babi(path: str, numbers: Sequence[int]) -> list[BabiSet]:
    """Read tasks from the folder or archive of bAbI's English files, ``qa1_single-supporting-fact_test.txt`` ...

    Raises:
        DataError: a file is missing, or a line is not of their form.
    """
    found: dict[tuple[int, str], tuple[Story, ...]] = {}
    for document in read_documents(TextSource((path,), include=("*qa*_test.txt", "*qa*_train.txt"))):
        name = re.search(r"qa(\d+)_[^/]*_(train|test)\.txt$", document.id)
        if name and int(name[1]) in numbers and "10k" not in document.id:
            found[int(name[1]), name[2]] = _stories(document.text, document.place)
    missing = [f"qa{n}_*_{part}.txt" for n in numbers for part in ("train", "test") if (n, part) not in found]
    if missing:
        raise DataError(f"{path}: no {', '.join(missing)} in it; name the folder or archive of bAbI's English tasks")
    return [BabiSet(number, found[number, "train"], found[number, "test"]) for number in numbers]


def _stories(text: str, place: str) -> tuple[Story, ...]:
    stories, facts = [], list[str]()
    for at, line in enumerate(text.splitlines(), 1):
        number, _, rest = line.strip().partition(" ")
        if not number.isdigit():
            if line.strip():
                raise DataError(f"{place}, line {at}: does not begin with a number, as lines of bAbI do")
            continue
        if number == "1":
            facts = []
        question, *answer = re.split(r"[\t|]", rest)  # tabs as published; some copies have bars
        if answer:
            stories.append(Story(tuple(facts), question.strip(), answer[0].strip()))
        else:
            facts.append(rest.strip())
    return tuple(stories)


class Hidden(NamedTuple):
    """A story of a task, and the text in which its facts are."""

    task: BabiSet
    story: Story
    trial: Trial


class BabiTask(NeedleTask):
    """bAbI in book text. Groups are a task and a length, every question is a unit.

    Facts replace the book's words where they stand, after the end of a sentence where one is near. As in ``NeedleTask``
    a system with memory reads the whole text into it and has only the question in its window, behind some short
    stories with their answers; a system without memory has the end of the text in front of them.

    Args:
        haystack: the book text.
        sets: from ``read_babi``.
        tokenizer: of all systems.
        lengths: tokens of text, each a multiple of the haystack's segments.
        trials: questions of each task, the same at every length that they fit.
        shots: stories of the training file, with their answers, in the window before the question.
        recall: passages for the systems ``+recall``; 0 leaves them out.
        seed: of questions, places and texts.

    Raises:
        ConfigError: lists every setting that breaks a rule.
    """

    name = "babi"
    metrics = (
        Metric("choice", "true answer likeliest", "%"),
        Metric("answered", "greedy answer, by BABILong's rule", "%", chance=0.0),
        Metric("answer_nats", "true answer", "nats", "lower"),
    )

    def __init__(
        self,
        haystack: Haystack,
        sets: Sequence[BabiSet],
        tokenizer: Any,
        lengths: Sequence[int] = (1024, 4096, 16_384, 65_536),
        trials: int = 50,
        shots: int = 2,
        recall: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(haystack, tokenizer, lengths=lengths, trials=trials, seed=seed)
        different(task=[each.number for each in sets])
        self.sets, self.shots, self.recall = list(sets), shots, recall
        ends = [token for token in np.unique(haystack.ids) if tokenizer.decode([int(token)]).strip() in (".", "!", "?")]
        self._after_end = np.roll(np.isin(haystack.ids.reshape(-1), ends), 1)
        self._searched: tuple[Trial, Recall] | None = None

    def systems(self, askers: Sequence[Asker]) -> list[Asker]:
        return rereading(askers, self.recall)

    def settings(self) -> Json:
        mine = {"tasks": [each.number for each in self.sets], "shots": self.shots, "recall": self.recall}
        stories = digest_of([[story.facts, story.question] for each in self.sets for story in each.test])
        known = super().settings()
        return {name: known[name] for name in ("text", "text_digest", "lengths", "trials", "seed")} | mine | {
            "stories_digest": stories
        }  # fmt: skip

    def examples(self) -> list[Example]:
        return [
            Example(name, f"qa{task.number}, {length:,} tokens", name, self._hidden(task, length, number))
            for task in self.sets
            for length in self.lengths
            for number in range(self.trials)
            for name in (f"qa{task.number}-{length}-{number:04d}",)
        ]

    def _hidden(self, task: BabiSet, length: int, number: int) -> Hidden:
        pick = random.Random(f"{self.seeds[0]} {task.number} {number}")
        for _ in range(100):  # in a short text a long story leaves no room for the book
            story = pick.choice(task.test)
            sentences = encode_after(self.tokenizer, ".", [f" {fact}" for fact in story.facts])
            needed = sum(map(len, sentences))
            if needed <= length // 2:
                break
        else:
            raise DataError(f"stories of qa{task.number} do not fit a text of {length} tokens; use longer --lengths")
        count = length // self.haystack.window
        first = pick.randrange(len(self.haystack.ids) - count + 1)
        # places among the words that stay: so no two facts meet, and all keep their order
        places = sorted(pick.randrange(length - needed + 1) for _ in sentences)
        after = self._after_end[first * self.haystack.window : first * self.haystack.window + length]
        hidden, used = [], 0
        for at, (place, sentence) in enumerate(zip(places, sentences, strict=True)):
            start = place + used
            most = (places[at + 1] if at + 1 < len(places) else length - needed) + used
            near = np.flatnonzero(after[start : min(most, start + 64) + 1])
            hidden.append((start + int(near[0]) if len(near) else start, sentence))
            used += len(sentence)
        question = encode_after(self.tokenizer, "\n\n", [ASKED.format(story.question)])[0]
        right = [story.answer, *(label for label in task.labels if label != story.answer)]
        options = encode_after(self.tokenizer, "Answer:", [f" {label}" for label in right])
        return Hidden(task, story, Trial(length, first, tuple(hidden), question, tuple(options)))

    def prompt(self, example: Example, asker: Asker) -> Prompt:
        item = example.item
        trial, before = item.trial, self._shown(item.task)
        if asker.recall:
            notes, _ = self._search(trial).notes(item.story.question, self.tokenizer, asker.recall)
            before += encode_after(self.tokenizer, "\n\n", [f"{notes}\n\n" if notes else "\n"])[0]
        context = (*before, *trial.question)
        if asker.reads_memory:
            return Prompt((context,), trial.options, NEW_TOKENS, _Hidden(self, trial))
        return Prompt(((*trial.text(self.haystack, asker.window), *context),), trial.options, NEW_TOKENS)

    def gold(self, example: Example) -> Json:
        return {"asked": example.item.story.question, "expected": example.item.story.answer}

    def measure(self, example: Example, prompt: Prompt, answer: Answer) -> dict[str, float]:
        (scored,), item = answer.scored, example.item
        said = self.tokenizer.decode(answer.said, skip_special_tokens=True)
        return {
            "choice": 100.0 * (scored.best == 0),
            "answered": 100.0 * answered(said, item.story, item.task.labels),
            "answer_nats": -scored.logprobs[0],
        }

    def _shown(self, task: BabiSet) -> Tokens:
        """Short stories of the training file with their answers, the same for every question of a task."""
        short = sorted(task.train, key=lambda story: len(story.facts))[: max(self.shots, len(task.train) // 4)]
        chosen = random.Random(f"{self.seeds[0]} {task.number} shots").sample(short, min(self.shots, len(short)))
        texts = [
            SHOWN.format(facts=" ".join(story.facts), question=story.question, answer=story.answer) for story in chosen
        ]
        return encode_after(self.tokenizer, "\n\n", ["\n\n" + "".join(texts)])[0]

    def _search(self, trial: Trial) -> Recall:
        """Of the text with the facts in it; the last one is kept."""
        if self._searched is None or self._searched[0] is not trial:
            text = self.tokenizer.decode(trial.text(self.haystack))
            self._searched = (trial, Recall(PlainTexts({"text": text}), ""))
        return self._searched[1]


def answered(said: str, story: Story, labels: Sequence[str]) -> bool:
    """BABILong's rule: of all labels that the question does not name, the first sentence has the right one alone."""
    first, question = said.strip().lower().split("\n")[0].split(".")[0], story.question.lower()
    named = {label.lower() for label in labels if label.lower() in first and label.lower() not in question}
    return named == {story.answer.lower()}
