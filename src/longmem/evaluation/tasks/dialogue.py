"""Conversations over several sessions: older sessions are in memory, questions and replies come after them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from longmem.errors import ConfigError
from longmem.evaluation.asking import Asker, Choice, Prompt, Scored
from longmem.evaluation.task import Example, Metric, digest_of, numbered
from longmem.evaluation.tasks.dialogue_data import ADVERSARIAL, Conversation, DialogueFile, Question
from longmem.evaluation.tasks.dialogue_metrics import bleu_signature, choices, measure, reference
from longmem.evaluation.tasks.shots import Tokens, encode_after, start_tokens
from longmem.memory import MemoryBank

BATCH = 32  # questions that are asked together
ASKED = "Question: {} Short answer:"
OFFERED = " (a) {a} (b) {b}. Select the correct answer by writing (a) or (b)."


@dataclass(frozen=True)
class DialogueSettings:
    """How much is asked, and how.

    Attributes:
        recent: tokens of the newest session that stand in the window in front of what is asked, for every system.
        new_tokens: of an answer; it also ends at a line end.
        answer_tokens: of a reference whose likelihood is measured, the first ones.
        conversations: of each file, the first ones; None is all.
        questions: of each conversation, drawn with ``seed``; None is all.
        seed: of that draw, and of the order in which adversarial questions offer their answers.

    Raises:
        ConfigError: lists every setting that breaks a rule.
    """

    recent: int = 256
    new_tokens: int = 50
    answer_tokens: int = 128
    conversations: int | None = None
    questions: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"recent": 0, "seed": self.seed}
        problems = [
            f"{name} ({value}) must be at least {least.get(name, 1)}"
            for name, value in asdict(self).items()
            if value is not None and value < least.get(name, 1)
        ]
        if problems:
            raise ConfigError(problems)

    @classmethod
    def for_window(cls, window: int, **settings: Any) -> DialogueSettings:
        """What fits: half of the window for the newest session, at most a quarter for an answer."""
        cls(**settings)  # says what is wrong with those given
        known = {
            "recent": window // 2,
            "new_tokens": max(1, min(cls.new_tokens, window // 4)),
            "answer_tokens": max(1, min(cls.answer_tokens, window // 4)),
        }
        return cls(**(known | {name: value for name, value in settings.items() if value is not None}))


@dataclass(frozen=True)
class DialogueExample(Example):
    """A question about a conversation; ``offered``: the two answers that an adversarial one offers."""

    conversation: Conversation = field(repr=False)
    question: Question
    offered: dict[str, str] | None

    @property
    def words(self) -> str:
        """What stands before the answer."""
        question = self.question
        if question.category is None:
            return question.text
        return ASKED.format(question.text + ("" if self.offered is None else OFFERED.format(**self.offered)))

    @property
    def expected(self) -> str:
        """The text whose likelihood is measured; of an adversarial question the letter of the right choice."""
        if self.offered is None:
            return reference(self.question.answer, self.question.category)
        return f"({'b' if self.offered['a'] == self.question.answer else 'a'})"


class DialogueTask:
    """Questions of LoCoMo, replies of MSC; see ``longmem.evaluation.task.Task``.

    Groups are LoCoMo's categories and MSC's sessions, units are conversations. Sessions are read into memory once for
    all questions about them. In the window stand the newest tokens of the sessions, the session that goes on (MSC), and
    the question; what of that does not fit goes to memory too. A system without memory sees the window alone, the
    full-context backbone the sessions in front of it, as far as they fit.

    Args:
        files: from ``read_dialogues``.
        tokenizer: of all systems.
        settings: default if None.
        answers: JSONL file to which every question and answer is added, for people to read.
    """

    name = "dialogue"
    metrics = (
        Metric("f1", "F1 of words", "%"),
        Metric("bleu", "BLEU-4", "%"),
        Metric("answer_nats", "reference answer, per token", "nats", "lower"),
    )

    def __init__(
        self,
        files: Sequence[DialogueFile],
        tokenizer: Any,
        settings: DialogueSettings | None = None,
        answers: Path | None = None,
    ) -> None:
        names = numbered([file.name for file in files])
        self.files = [replace(file, name=name) for file, name in zip(files, names, strict=True)]
        self.tokenizer, self.answers = tokenizer, answers
        self.chosen = settings or DialogueSettings()
        self.start = start_tokens(tokenizer)
        self._known: tuple[Conversation, Tokens] | None = None
        self._examples = [
            example
            for file in self.files
            for name, conversation in _named(file.name, file.conversations[: self.chosen.conversations])
            for example in self._examples_of(name, conversation)
        ]

    def settings(self) -> dict[str, Any]:
        return {
            "files": {
                file.name: {"kind": file.kind, "sha256": file.sha256, "conversations": len(file.conversations)}
                for file in self.files
            },
            **asdict(self.chosen),
            "prompt": ASKED,
            "adversarial": OFFERED,
            "bleu": bleu_signature(),
        }

    def examples(self) -> list[DialogueExample]:
        return self._examples

    def answer(self, asker: Asker, examples: Sequence[DialogueExample]) -> Iterator[tuple[int, dict[str, float]]]:
        """F1, BLEU and likelihood of each answer; sessions are read into memory once for a conversation."""
        together: dict[int, list[int]] = {}
        for number, example in enumerate(examples):
            together.setdefault(id(example.conversation), []).append(number)
        for numbers in together.values():
            memory, _ = self._sessions(examples[numbers[0]].conversation)
            bank = asker.remember(memory) if asker.reads_memory and memory else None
            for at in range(0, len(numbers), BATCH):
                batch = numbers[at : at + BATCH]
                found = self._ask(asker, [examples[number] for number in batch], bank)
                yield from zip(batch, found, strict=True)

    def question(self, example: DialogueExample) -> tuple[Choice, Prompt]:
        """To score the reference answer, and to have one generated."""
        memory, recent = self._sessions(example.conversation)
        (asked,) = encode_after(self.tokenizer, "\n", [example.question.before + example.words])
        (answer,) = encode_after(self.tokenizer, "x:", [f" {example.expected}"])
        context = (*(() if memory else self.start), *recent, *asked)
        return (
            Choice(context, [answer[: self.chosen.answer_tokens]], memory),
            Prompt(context, self.chosen.new_tokens, memory),
        )

    def _ask(
        self, asker: Asker, examples: Sequence[DialogueExample], bank: MemoryBank | None
    ) -> Iterator[dict[str, float]]:
        asked = [self.question(example) for example in examples]
        scored: dict[int, Scored] = {}
        generated: dict[int, list[int]] = {}
        room = asker.window - max(self.chosen.new_tokens, self.chosen.answer_tokens)
        # a context longer than the window leaves a part in memory, and so needs one of its own
        short = [number for number, (choice, _) in enumerate(asked) if len(choice.context) <= room]
        long = [number for number, (choice, _) in enumerate(asked) if len(choice.context) > room]
        for numbers, shared in ((short, bank), (long, None)):
            for at, answer in asker.score([asked[number][0] for number in numbers], shared):
                scored[numbers[at]] = answer
            for at, ids in asker.generate([asked[number][1] for number in numbers], shared):
                generated[numbers[at]] = ids
        for number, example in enumerate(examples):
            said = first_line(self.tokenizer.decode(generated[number], skip_special_tokens=True))
            values = measure(said, example.question.answer, example.question.category, example.offered)
            tokens = len(asked[number][0].options[0])
            self._write(asker, example, said)
            yield {**values, "answer_nats": -scored[number].logprobs[0] / tokens}

    def _sessions(self, conversation: Conversation) -> tuple[Tokens, Tokens]:
        """The sessions' tokens: those that only memory holds, and the newest ones, which stand in the window."""
        if self._known is None or self._known[0] is not conversation:
            parts = encode_after(self.tokenizer, "\n", list(conversation.sessions))
            self._known = (conversation, tuple(token for part in parts for token in part))
        tokens = self._known[1]
        cut = max(0, len(tokens) - self.chosen.recent)
        return ((*self.start, *tokens[:cut]) if cut else ()), tokens[cut:]

    def _examples_of(self, name: str, conversation: Conversation) -> Iterator[DialogueExample]:
        questions = list(conversation.questions)
        if self.chosen.questions is not None and self.chosen.questions < len(questions):
            drawn = random.Random(f"{self.chosen.seed} {name}").sample(range(len(questions)), self.chosen.questions)
            questions = [questions[number] for number in sorted(drawn)]
        # the ids tell tokenizers apart
        before = digest_of(conversation.sessions, encode_after(self.tokenizer, "\n", list(conversation.sessions[:1])))
        for question in questions:
            offered = None
            if question.category == ADVERSARIAL:
                swapped = random.Random(f"{self.chosen.seed} {name} {question.id}").random() < 0.5
                offered = choices(question.answer, swapped)
            kept = asdict(self.chosen) | {"conversations": None, "questions": None}
            yield DialogueExample(
                id=f"{name}/{question.id}",
                digest=digest_of(before, asdict(question), offered, kept),
                group=question.group,
                # a conversation whose sessions are in several files is drawn as one
                unit=name if conversation.of is None else conversation.of,
                conversation=conversation,
                question=question,
                offered=offered,
            )

    def _write(self, asker: Asker, example: DialogueExample, said: str) -> None:
        if self.answers is None:
            return
        line = {"system": asker.name, "example": example.id, "asked": example.words}
        self.answers.parent.mkdir(parents=True, exist_ok=True)
        with self.answers.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"expected": example.expected, "said": said}, ensure_ascii=False) + "\n")


def _named(file: str, conversations: Sequence[Conversation]) -> Iterator[tuple[str, Conversation]]:
    """Conversations by names of which there are no two."""
    names = numbered([f"{file}/{conversation.id}" for conversation in conversations])
    yield from zip(names, conversations, strict=True)


def first_line(text: str) -> str:
    """The first line with something on it: where an answer ends."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
