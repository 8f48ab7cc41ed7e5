"""What is hidden in long text, and asked for at its end: needles, and bAbI questions as in BABILong."""

from __future__ import annotations

import hashlib
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from longmem.chat import PlainTexts, Recall
from longmem.data.facts import KINDS, OPTIONS, draw_facts
from longmem.data.text import HELD_OUT, TextSource, package_text, packages, read_documents
from longmem.errors import ConfigError, DataError, not_a_multiple
from longmem.evaluation.asking import Answer, Asker, Prompt, Tokens, encode, encode_after
from longmem.evaluation.results import Json
from longmem.evaluation.tasks import Example, Metric, Task, digest_of
from longmem.memory.session import EncodedText
from longmem.progress import Progress
from longmem.types import Memory


class Haystack:
    """Real text as whole segments: ``ids`` (n, T), their hash, and the places that they are from."""

    def __init__(self, ids: NDArray[np.int64], places: Sequence[str]) -> None:
        self.ids, self.places = ids, list(places)
        self.digest = hashlib.sha256(ids.tobytes()).hexdigest()[:16]
        self._encoded: EncodedText | None = None

    @property
    def window(self) -> int:
        """T."""
        return int(self.ids.shape[1])

    def source(self) -> Json:
        """For the result file."""
        return {"text": self.places, "text_digest": self.digest}

    def encoded(self, model: Any) -> EncodedText:
        """The text as this model encodes it; kept until another model asks."""
        if self._encoded is None or self._encoded.model is not model:
            self._encoded = None  # not two of them at a time
            with Progress("reading the text into memory", len(self.ids), "segments") as progress:
                self._encoded = EncodedText(model, torch.from_numpy(self.ids), lambda done: progress.advance())
        return self._encoded


def read_haystack(paths: Sequence[str], tokenizer: Any, tokens: int, window: int) -> Haystack:
    """At least so many tokens of text, cut into segments of ``window``; without paths Python's standard library.

    Raises:
        DataError: the text is too short.
    """
    wanted, found = -(-tokens // window) * window, list[int]()
    for text in (document.text for document in read_documents(paths)) if paths else standard_library():
        found += encode(tokenizer, text)
        if len(found) >= wanted:
            break
    else:
        raise DataError(
            f"{', '.join(paths) or 'the standard library'}: {len(found):,} tokens of text, {wanted:,} are needed; give "
            "more text, or ask for fewer tokens"
        )
    places = paths or [f"Python {sysconfig.get_python_version()} standard library"]
    return Haystack(np.array(found[:wanted], dtype=np.int64).reshape(-1, window), places)


def notes_on(question: str, text: str, tokenizer: Any, passages: int) -> str:
    """So many passages of the text that share words with the question, as they are put into a window."""
    return _search(text).notes(question, tokenizer, passages)[0] if passages else ""


@lru_cache(maxsize=2)
def _search(text: str) -> Recall:
    return Recall(PlainTexts({"text": text}), "")


def standard_library() -> Iterator[str]:
    """Packages of this Python's own standard library; first those that are held out from training."""
    library = Path(sysconfig.get_paths()["stdlib"])
    yield from (package_text(library / name, library) for name in HELD_OUT)
    yield from (text for name, text in packages(library) if name not in HELD_OUT)


@dataclass(frozen=True, eq=False)
class Trial:
    """One question about a text of its own, which is a ``LongText``; the first of the options is the true answer.

    A segment's keys and values depend on that segment alone. So the haystack is encoded once, and for a trial only the
    segments in which something is hidden are encoded again.

    Attributes:
        length: tokens of the text.
        first: number of the text's first segment in the haystack.
        hidden: (position in the text, token ids) of every sentence; they replace what was there.
    """

    haystack: Haystack
    length: int
    first: int
    hidden: tuple[tuple[int, Tokens], ...]
    question: Tokens
    options: tuple[Tokens, ...]

    @property
    def digest(self) -> str:
        return digest_of(self.haystack.digest, self.length, self.first, self.hidden)

    def open(self, asker: Asker) -> AbstractContextManager[Memory]:
        window, ids = self.haystack.window, self._ids()
        touched = {at // window for start, tokens in self.hidden for at in range(start, start + len(tokens))}
        changed = {self.first + n: ids[n * window : (n + 1) * window].tolist() for n in sorted(touched)}
        return self.haystack.encoded(asker.model).holding(self.first, self.length // window, changed, asker.memory_size)

    def text(self, last: int | None = None) -> Tokens:
        """The whole text with what is hidden in it, or its last tokens."""
        return tuple(self._ids()[-last if last else None :].tolist())

    def _ids(self) -> NDArray[np.int64]:
        start = self.first * self.haystack.window
        ids = self.haystack.ids.reshape(-1)[start : start + self.length].copy()
        for position, tokens in self.hidden:
            ids[position : position + len(tokens)] = tokens
        return ids


@dataclass(eq=False, kw_only=True)
class HiddenTask(Task):
    """A system with memory reads the whole text into it, in segments of the haystack, and has only the question in its
    window. A system without memory has the end of the text in front of the question, as much as fits its window.

    Every length is a multiple of the window. A trial has its own seed, and does not depend on which others are made.
    """

    text: Sequence[str] = ()
    lengths: Sequence[int]
    trials: int
    seed: int = 0

    @property
    def remembered(self) -> int:
        return max(self.lengths)

    def begin(self, askers: Sequence[Asker]) -> Sequence[Asker]:
        found, window = super().begin(askers), self.window
        if problems := [line for n in self.lengths for line in not_a_multiple("length", n, "the window", window)]:
            raise ConfigError(problems)
        self.haystack = read_haystack(self.text, self.tokenizer, max(self.lengths), window)
        return found

    def source(self) -> Json:
        return self.haystack.source()

    def asked(self, trial: Trial, asker: Asker, before: Tokens = (), new_tokens: int = 0) -> Prompt:
        """The question, with ``before`` in front of it in the window of every system."""
        context = (*before, *trial.question)
        if asker.reads_memory:
            return Prompt((context,), trial.options, new_tokens, trial)
        return Prompt(((*trial.text(asker.window), *context),), trial.options, new_tokens)


# needles


@dataclass(eq=False, kw_only=True)
class NeedleTask(HiddenTask):
    """Groups are a kind of fact, a length and a depth; every trial is a unit."""

    name = "needle"
    metrics = (
        Metric("exact", "exact answer", "%", chance=0.0),
        Metric("choice", f"true answer likeliest of {OPTIONS}", "%", chance=100 / OPTIONS),
    )
    kinds: Sequence[str]
    depths: Sequence[float]

    def __post_init__(self) -> None:
        problems = [f"kind ({k!r}) must be one of {', '.join(KINDS)}" for k in self.kinds if k not in KINDS]
        problems += [f"depth ({d:g}) must be from 0 to 100 %" for d in self.depths if not 0 <= d <= 100]
        if problems:
            raise ConfigError(problems)

    def examples(self) -> list[Example]:
        """Every kind at every length and depth.

        Raises:
            DataError: a text is too short for what has to be hidden in it.
        """
        found = []
        for kind in self.kinds:
            for length in self.lengths:
                for depth in self.depths:
                    group = f"{kind}, {length:,} tokens, depth {depth:g} %"
                    for number in range(self.trials):
                        name = f"{kind}-{length}-{depth:g}-{number:04d}"
                        found.append(Example(name, group, name, self._trial(kind, length, depth, number)))
        return found

    def _trial(self, kind: str, length: int, depth: float, number: int) -> Trial:
        """The fact asked for at its depth, give or take half a segment; all else anywhere."""
        draw = np.random.default_rng([self.seed, *kind.encode(), length, round(1000 * depth), number])
        facts = draw_facts(kind, draw)
        window, tokenizer = self.haystack.window, self.tokenizer
        first = int(draw.integers(len(self.haystack.ids) - length // window + 1))
        asked, *rest = [encode(tokenizer, sentence) for sentence in (*facts.asked, *facts.others)]
        everything = sum(map(len, (asked, *rest)))
        if 2 * everything > length:
            raise DataError(
                f"a text of {length} tokens is too short to hide {everything} tokens in ({kind}); use longer --lengths"
            )
        target = round(depth / 100 * (length - len(asked))) + int(draw.integers(-(window // 2), window // 2 + 1))
        hidden = [(min(max(target, 0), length - len(asked)), asked)]
        for sentence in rest:
            free = np.ones(length - len(sentence) + 1, dtype=bool)
            for position, tokens in hidden:
                free[max(0, position - len(sentence) + 1) : position + len(tokens)] = False
            hidden.append((int(draw.choice(np.flatnonzero(free))), sentence))
        options = tuple(encode(tokenizer, option) for option in facts.options)
        return Trial(self.haystack, length, first, tuple(hidden), encode(tokenizer, facts.question), options)

    def prompt(self, example: Example, asker: Asker) -> Prompt:
        return self.asked(example.item, asker)

    def measure(self, example: Example, prompt: Prompt, answer: Answer) -> dict[str, float]:
        """``exact``: every token of the true answer is the model's first choice, so that greedy decoding writes it."""
        (scored,) = answer.scored
        return {"exact": 100.0 * scored.greedy[0], "choice": 100.0 * (scored.best == 0)}


# bAbI

SHOWN = "Story: {facts}\nQuestion: {question}\nAnswer: {answer}\n\n"
ASKED = "Question: {}\nAnswer:"
NEW_TOKENS = 12


class Story(NamedTuple):
    """A question with all facts of the story before it."""

    facts: tuple[str, ...]
    question: str
    answer: str


class BabiSet(NamedTuple):
    """One task of bAbI."""

    number: int
    train: tuple[Story, ...]
    test: tuple[Story, ...]

    @property
    def labels(self) -> list[str]:
        """Every answer that its test file has."""
        return sorted({story.answer for story in self.test})


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
    for at, line in enumerate(filter(str.strip, text.splitlines()), 1):
        number, _, rest = line.strip().partition(" ")
        if not number.isdigit():
            raise DataError(f"{place}, line {at}: does not begin with a number, as lines of bAbI do")
        if number == "1":
            facts = []
        question, *answer = re.split(r"[\t|]", rest)  # tabs as published; some copies have bars
        if answer:
            stories.append(Story(tuple(facts), question.strip(), answer[0].strip()))
        else:
            facts.append(rest.strip())
    return tuple(stories)


@dataclass(eq=False, kw_only=True)
class BabiTask(HiddenTask):
    """bAbI in books, as in BABILong (Kuratov et al. 2024). Groups are a task and a length, every question is a unit.

    Facts replace the book's words where they stand, in their order, after the end of a sentence where one is near.
    Every system has short stories with their answers before the question.
    """

    name = "babi"
    metrics = (
        Metric("choice", "true answer likeliest", "%"),
        Metric("answered", "greedy answer, by BABILong's rule", "%", chance=0.0),
        Metric("answer_nats", "true answer", "nats", "lower"),
    )
    data: str
    tasks: Sequence[int]
    shots: int
    recall: int = 0

    def __post_init__(self) -> None:
        self.sets = read_babi(self.data, self.tasks)

    def source(self) -> Json:
        stories = [[story.facts, story.question] for each in self.sets for story in each.test]
        return self.haystack.source() | {"stories_digest": digest_of(stories)}

    def examples(self) -> list[Example]:
        """Items are a trial and the task of bAbI that it is of."""
        found = []
        for task in self.sets:
            for length in self.lengths:
                for number in range(self.trials):
                    name = f"qa{task.number}-{length}-{number:04d}"
                    trial, story = self._trial(task, length, number)
                    gold = {"asked": story.question, "expected": story.answer}
                    found.append(Example(name, f"qa{task.number}, {length:,} tokens", name, (trial, task), gold))
        return found

    def _trial(self, task: BabiSet, length: int, number: int) -> tuple[Trial, Story]:
        pick = random.Random(f"{self.seed} {task.number} {number}")
        for _ in range(100):  # in a short text a long story leaves no room for the book
            story = pick.choice(task.test)
            sentences = encode_after(self.tokenizer, ".", [f" {fact}" for fact in story.facts])
            needed = sum(map(len, sentences))
            if needed <= length // 2:
                break
        else:
            raise DataError(f"stories of qa{task.number} do not fit a text of {length} tokens; use longer --lengths")
        window = self.haystack.window
        first = pick.randrange(len(self.haystack.ids) - length // window + 1)
        # places among the words that stay: so no two facts meet, and all keep their order
        places = sorted(pick.randrange(length - needed + 1) for _ in sentences)
        after = self._after_end[first * window : first * window + length]
        hidden, used = [], 0
        for place, following, sentence in zip(places, [*places[1:], length - needed], sentences, strict=True):
            start = place + used
            near = np.flatnonzero(after[start : min(following + used, start + 64) + 1])
            hidden.append((start + int(near[0]) if len(near) else start, sentence))
            used += len(sentence)
        question = encode_after(self.tokenizer, "\n\n", [ASKED.format(story.question)])[0]
        right = [story.answer, *(label for label in task.labels if label != story.answer)]
        options = encode_after(self.tokenizer, "Answer:", [f" {label}" for label in right])
        return Trial(self.haystack, length, first, tuple(hidden), question, tuple(options)), story

    @cached_property
    def _after_end(self) -> NDArray[np.bool_]:
        """Of every token of the haystack whether a sentence ends before it."""
        ids = self.haystack.ids
        ends = [token for token in np.unique(ids) if self.tokenizer.decode([int(token)]).strip() in (".", "!", "?")]
        return np.roll(np.isin(ids.reshape(-1), ends), 1)

    def prompt(self, example: Example, asker: Asker) -> Prompt:
        trial, task = example.item
        short = sorted(task.train, key=lambda story: len(story.facts))[: max(self.shots, len(task.train) // 4)]
        shown = random.Random(f"{self.seed} {task.number} shots").sample(short, min(self.shots, len(short)))
        texts = (SHOWN.format(facts=" ".join(each.facts), question=each.question, answer=each.answer) for each in shown)
        (before,) = encode_after(self.tokenizer, "\n\n", ["\n\n" + "".join(texts)])
        if asker.recall:
            text = self.tokenizer.decode(trial.text())
            notes = notes_on(example.gold["asked"], text, self.tokenizer, asker.recall)
            before += encode_after(self.tokenizer, "\n\n", [f"{notes}\n\n" if notes else "\n"])[0]
        return self.asked(trial, asker, before, NEW_TOKENS)

    def measure(self, example: Example, prompt: Prompt, answer: Answer) -> dict[str, float]:
        (scored,), (_, task) = answer.scored, example.item
        return {
            "choice": 100.0 * (scored.best == 0),
            "answered": 100.0 * answered(self.said(answer), **example.gold, labels=task.labels),
            "answer_nats": -scored.logprobs[0],
        }


def answered(said: str, asked: str, expected: str, labels: Sequence[str]) -> bool:
    """BABILong's rule: of all labels that the question does not name, the first sentence has the right one alone."""
    first, question = said.strip().lower().split("\n")[0].split(".")[0], asked.lower()
    named = {label.lower() for label in labels if label.lower() in first and label.lower() not in question}
    return named == {expected.lower()}
