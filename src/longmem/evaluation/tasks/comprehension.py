"""ChapterBreak: which of six beginnings follows a long prefix that ends at a chapter's end (Sun, Thai and Iyyer 2022).
SQuAD v1.1: greedy answers after demonstrations, exact match and F1. Both are in the paper.

In ChapterBreak, as in the authors' script, the likeliest beginning wins, suffixes are cut to 128 tokens, and prefixes
lose their left end. SQuAD's scores are those of ``evaluate-v1.1.py``.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from longmem.data.tokens import start_tokens
from longmem.errors import ConfigError
from longmem.evaluation.asking import Answer, Asker, Prompt, Tokens, encode, encode_after
from longmem.evaluation.results import Json
from longmem.evaluation.tasks import Example, Metric, Source, Task, drawn, read_source
from longmem.evaluation.tasks.icl import Asked, ShotsTask, draw

# ChapterBreak

BETWEEN = "\n\n"  # between a prefix and a suffix, the same for all suffixes


class Item(NamedTuple):
    """A chapter boundary: its split, its work and its number there, the text before it, and beginnings of chapters, the
    first of which is the true one."""

    split: str
    work: str
    number: int
    context: str
    options: tuple[str, ...]


def read_chapterbreak(path: str | Path) -> Source:
    """Read ``chapterbreak_ctx_<N>.json``: split -> work -> examples, each with ``ctx``, ``pos`` and ``negs``."""
    form = 'ChapterBreak\'s form, {split: {work: [{"ctx", "pos", "negs"}, ...]}}'
    return read_source(path, form, "name a chapterbreak_ctx_<N>.json file, or make it again", _items)


def _items(raw: bytes, where: list[str]) -> Iterator[Item]:
    for split, works in json.loads(raw).items():
        for work, examples in works.items():
            for number, one in enumerate(examples):
                where.append(f"{split}, work {work}, example {number + 1}")
                texts = (one["ctx"], one["pos"], *one["negs"])
                if len(texts) != 7 or not all(text.strip() for text in texts):
                    raise ValueError("ctx, pos and five negs must be texts, none of them empty")
                yield Item(split, work, number, texts[0], texts[1:])


@dataclass(eq=False, kw_only=True)
class ChapterBreakTask(Task):
    """Six-way suffix identification. Groups are a split and a prefix length, units are works."""

    name = "chapterbreak"
    metrics = (
        Metric("accuracy", "accuracy by likelihood", "%", chance=100 / 6),
        Metric("accuracy_per_token", "accuracy by likelihood per token", "%", chance=100 / 6),
        Metric("gold_nats", "true suffix, per token", "nats", "lower"),
    )
    data: str
    prefixes: Sequence[int]
    suffix_tokens: int
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.file = read_chapterbreak(self.data)
        named = re.search(r"_ctx_(\d+)\.json$", self.file.name)
        if named and int(named[1]) < max(self.prefixes):
            raise ConfigError(f"--prefix {max(self.prefixes)} is longer than the prefixes of {self.file.name}")

    def source(self) -> Json:
        return self.file.about()

    def examples(self) -> list[Example]:
        """Items are a prefix length and an ``Item``."""
        splits: dict[str, list[Item]] = {}
        for item in self.file.items:
            splits.setdefault(item.split, []).append(item)
        found = []
        for prefix in self.prefixes:
            short = f"{prefix >> 10}k" if prefix % 1024 == 0 else str(prefix)
            for split, items in splits.items():
                for item in (items[n] for n in drawn(f"{self.seed} {split}", len(items), self.limit)):
                    unit = f"{split}/{item.work}"
                    name = f"{unit}/{item.number}, {prefix}"
                    found.append(Example(name, f"{split}, {short}", unit, (prefix, item)))
        return found

    def prompt(self, example: Example, asker: Asker) -> Prompt:
        """The last tokens of the prefix, and the first of each suffix."""
        prefix, item = example.item
        suffixes = encode_after(self.tokenizer, BETWEEN, [option.strip() for option in item.options])
        before = item.context.rstrip() + BETWEEN
        # as they are with a word after them, since a line end is another token where the text ends
        tokens, word = encode(self.tokenizer, before + "The"), encode(self.tokenizer, "The")
        tokens = tokens[: -len(word)] if tokens[-len(word) :] == word else encode(self.tokenizer, before)
        context = (*start_tokens(self.tokenizer), *tokens[-prefix:])
        return Prompt((context,), tuple(ids[: self.suffix_tokens] for ids in suffixes))

    def measure(self, example: Example, prompt: Prompt, answer: Answer) -> dict[str, float]:
        """Whether the first option wins, by summed log-likelihood and per token; as in the authors' script also a tie
        counts as right."""
        (scored,) = answer.scored
        each = [logprob / len(option) for logprob, option in zip(scored.logprobs, prompt.options, strict=True)]
        return {
            "accuracy": 100.0 * (scored.logprobs[0] >= max(scored.logprobs)),
            "accuracy_per_token": 100.0 * (each[0] >= max(each)),
            "gold_nats": -each[0],
        }


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


def _questions(raw: bytes, where: list[str]) -> Iterator[SquadQuestion]:
    for a, article in enumerate(json.loads(raw)["data"]):
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
    local_shots: int
    memory_shots: Sequence[int]
    limit: int | None
    max_answer_tokens: int

    def __post_init__(self) -> None:
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
                    asked = Asked(*shots, [query], new_tokens=self.max_answer_tokens)
                    gold = {"asked": question.question, "expected": question.answers}
                    name = f"{question.id}, {group}, seed {seed}"
                    found.append(Example(name, group, question.article, asked, gold, seed))
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

    def measure(self, example: Example, prompt: Prompt, answer: Answer) -> dict[str, float]:
        """The metrics of the first line of what was generated, 0 to 100."""
        said, answers = self.said(answer).partition("\n")[0].strip(), example.gold["expected"]
        exact = normalise_answer(said) in map(normalise_answer, answers)
        return {"exact_match": 100.0 * exact, "f1": 100 * f1_score(said, answers)}


def shown(question: SquadQuestion, *, answered: bool) -> str:
    """A question by ``TEMPLATE``, with its first answer or cut before the space that leads to it."""
    # the template is cut, not the text: an answer may say "Answer:" itself
    template = TEMPLATE if answered else TEMPLATE.partition(" {answer}")[0]
    return template.format(passage=question.passage, question=question.question, answer=question.answers[0])


def normalise_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, one space between words (evaluate-v1.1.py)."""
    # punctuation goes first, as published: "a-ha" is one word, not the article and a word
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def f1_score(prediction: str, answers: Sequence[str]) -> float:
    """The best F1 (0 to 1) of the prediction's words against those of one of the answers, both normalised.

    Words count as often as they occur in both. Where they share no word F1 is 0, also if both are empty.
    """
    best, found = 0.0, normalise_answer(prediction).split()
    for true in (normalise_answer(answer).split() for answer in answers):
        shared = (Counter(found) & Counter(true)).total()
        best = max(best, 2 * shared / (len(found) + len(true))) if shared else best
    return best
