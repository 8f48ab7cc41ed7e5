"""SQuAD v1.1 with demonstrations in the window and in memory: greedy answers, exact match and F1 (paper, SQuAD)."""

from __future__ import annotations

import hashlib
import json
import random
import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from longmem.errors import DataError
from longmem.evaluation.asking import Answer, Asker, Prompt, Tokens
from longmem.evaluation.documents import start_tokens
from longmem.evaluation.results import Bootstrap, Json
from longmem.evaluation.task import Example, Metric, different, drawn, means_by, of_form
from longmem.evaluation.tasks.shots import LaidOut, Shots, ShotsTask, draw, encode_after

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


class SquadFile(NamedTuple):
    """The questions of a file in its order, and its hash."""

    name: str
    sha256: str
    questions: tuple[SquadQuestion, ...]


def read_squad(path: str | Path) -> SquadFile:
    """Read ``train-v1.1.json`` or ``dev-v1.1.json``, or a file of the same form.

    Raises:
        DataError: no such file, not JSON, or not of that form; names the file and the place in it.
    """
    file, found = Path(path), dict[str, SquadQuestion]()
    with of_form(file, "SQuAD v1.1's form", "name a SQuAD v1.1 JSON file") as where:
        content = file.read_bytes()
        for a, article in enumerate(json.loads(content)["data"]):
            where.append(f"data[{a}]")
            for p, paragraph in enumerate(article["paragraphs"]):
                for q, asked in enumerate(paragraph["qas"]):
                    where.append(f"data[{a}].paragraphs[{p}].qas[{q}]")
                    # a template of lines needs texts of one line
                    texts = (paragraph["context"], asked["question"], *(one["text"] for one in asked["answers"]))
                    passage, question, *answers = (" ".join(text.split()) for text in texts)
                    if not answers:
                        raise ValueError("no answer; SQuAD v1.1 has one or more for every question, v2.0 not")
                    if asked["id"] in found:
                        raise ValueError(f"two questions have the id {asked['id']!r}")
                    title = str(article.get("title", a))
                    found[asked["id"]] = SquadQuestion(asked["id"], title, passage, question, tuple(answers))
    if not found:
        raise DataError(f"{file}: no question in it; name a SQuAD v1.1 JSON file")
    return SquadFile(file.name, hashlib.sha256(content).hexdigest()[:16], tuple(found.values()))


class SquadTask(ShotsTask):
    """SQuAD after demonstrations. Groups are numbers of demonstrations, units are articles.

    A demonstration is one question of a passage with its first answer; no passage is shown twice or asked about.

    Args:
        train: what demonstrations are drawn from.
        asked: whose questions are asked, ``dev-v1.1.json``.
        seeds: draws of demonstrations, numbered from 1.
        limit: questions, drawn once over all articles; None is all.

    Raises:
        DataError: no passage of ``train`` is left that is not asked about.
    """

    name = "squad"
    metrics = (Metric("exact_match", "exact match", "%"), Metric("f1", "F1", "%"))

    def __init__(
        self,
        train: SquadFile,
        asked: SquadFile,
        tokenizer: Any,
        local_shots: int = 3,
        memory_shots: Sequence[int] = (0, 200),
        seeds: int = 1,
        limit: int | None = 200,
        max_answer_tokens: int = 32,
    ) -> None:
        different(memory_shots=memory_shots)
        self.train, self.asked, self.tokenizer = train, asked, tokenizer
        self.local_shots, self.memory_shots, self.seeds = local_shots, list(memory_shots), range(1, seeds + 1)
        self.limit, self.max_answer_tokens = limit, max_answer_tokens
        tested = {question.passage for question in asked.questions}
        passages: dict[str, list[SquadQuestion]] = {}
        for question in train.questions:
            if question.passage not in tested:
                passages.setdefault(question.passage, []).append(question)
        if not passages:
            raise DataError(f"{train.name}: every passage in it is asked about in {asked.name}; name the training file")
        self._passages = list(passages.values())
        self.shots = lru_cache(maxsize=None)(self._draw)

    def settings(self) -> Json:
        files = {"train": self.train, "asked": self.asked}
        return {
            **{key: {"file": f.name, "sha256": f.sha256, "questions": len(f.questions)} for key, f in files.items()},
            "local_shots": self.local_shots,
            "memory_shots": self.memory_shots,
            "demonstration_seeds": list(self.seeds),
            "limit": self.limit,
            "max_answer_tokens": self.max_answer_tokens,
            "template": TEMPLATE,
        }

    def examples(self) -> list[Example]:
        """Every chosen question, for every seed and number of demonstrations in memory."""
        return [
            Example(f"{question.id}, {group}, seed {seed}", group, question.article, question, seed)
            for seed in self.seeds
            for memory in self.memory_shots
            for group in (f"{self.local_shots} + {memory}",)
            for question in self._queries
        ]

    def prompt(self, example: Example, asker: Asker) -> Prompt:
        shots, laid = self.laid_out(example, asker)
        context, new = laid.before + laid.query, self.max_answer_tokens
        return Prompt((context,), new_tokens=new, memory=shots.remembered(asker))

    def gold(self, example: Example) -> Json:
        return {"asked": example.item.question, "expected": example.item.answers}

    def measure(self, example: Example, prompt: Prompt, answer: Answer) -> dict[str, float]:
        """The metrics of the first line of what was generated, 0 to 100."""
        said = self.tokenizer.decode(answer.said, skip_special_tokens=True).partition("\n")[0].strip()
        answers = example.item.answers
        return {"exact_match": 100 * exact_match(said, answers), "f1": 100 * f1_score(said, answers)}

    def summarise(
        self, result: Json, examples: Sequence[Example], askers: Sequence[Asker], bootstrap: Bootstrap
    ) -> None:
        """``extra`` has means ``per_seed`` and ``by_article``, and ``shots`` (see ``ShotsTask.shots_seen``)."""
        values = [one["values"] for one in result["examples"]]
        result["extra"] = {
            "per_seed": means_by(examples, values, lambda example: example.seed),
            "by_article": means_by(examples, values, lambda example: example.unit),
            "shots": self.shots_seen(examples, askers),
        }

    def laid_out(self, example: Example, asker: Asker) -> tuple[Shots, LaidOut]:
        shots = self.shots(example.seed, int(example.group.partition(" + ")[2]))
        return shots, shots.lay_out(asker, self._queries[example.item], self.max_answer_tokens)

    def _draw(self, seed: int, memory: int) -> Shots:
        near, far = draw(self.train.name, seed, len(self._passages), self.local_shots, memory)
        pick = random.Random(f"{self.train.name} {seed} questions")
        # for all passages, so that a passage has the same question whatever the numbers of demonstrations
        which = [pick.randrange(len(questions)) for questions in self._passages]
        texts = [shown(self._passages[n][which[n]], answered=True) for n in (*near, *far)]
        encoded = encode_after(self.tokenizer, "\n\n", texts)
        return Shots(start_tokens(self.tokenizer), tuple(encoded[: len(near)]), tuple(encoded[len(near) :]))

    @cached_property
    def _queries(self) -> dict[SquadQuestion, Tokens]:
        """Questions that are asked -> their tokens."""
        everything = self.asked.questions
        chosen = [everything[n] for n in drawn(f"{self.asked.name} questions", len(everything), self.limit)]
        texts = [shown(question, answered=False) for question in chosen]
        return dict(zip(chosen, encode_after(self.tokenizer, "\n\n", texts), strict=True))


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
