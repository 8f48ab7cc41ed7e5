"""Facts told in one conversation and asked for in another, with other text between; kinds and values held out."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from longmem.data.told import Session, asked_ids, question_ids, told_ids, told_session
from longmem.errors import DataError
from longmem.evaluation.asking import Answer, Asker, Prompt, Tokens, rereading
from longmem.evaluation.results import Json
from longmem.evaluation.systems import BACKBONE
from longmem.evaluation.task import Example, Metric, Task, different
from longmem.evaluation.tasks.needle import Haystack
from longmem.store.recall import PlainTexts, Recall

IN_WINDOW = "in_window"
TELLING = 8192  # tokens that a session takes at most, for the size of memory


class Asked(NamedTuple):
    """The number of a session, of its fact, and the tokens between."""

    session: int
    fact: int
    between: int


class FactsTask(Task):
    """Facts of earlier conversations. Groups are tokens of other text between, units are conversations.

    A system with memory reads the conversation that tells ten facts, and then the text between. In a new conversation
    it is asked for each fact by itself. ``in_window`` is the backbone with the telling conversation in its window, and
    no text between: what the model could know at best. Systems named ``+recall`` also have passages in their window
    that text search finds for the question, in the conversation and in the text between.

    Args:
        haystack: the text between.
        tokenizer: of all systems.
        between: tokens.
        sessions: conversations, each asked for all of its facts.
        facts: told in a conversation.
        recall: passages for the systems ``+recall``; 0 leaves them out.
        new_tokens: of an answer, at most.
        seed: of facts, values and texts.

    Raises:
        DataError: the text is too short.
    """

    name = "facts"
    metrics = (
        Metric("value_nats", "value", "nats", "lower"),
        Metric("first_token", "first token of the value is the first choice", "%"),
        Metric("exact", "every token of the value is the first choice", "%"),
        Metric("named", "greedy answer names the value", "%"),
    )

    def __init__(
        self,
        haystack: Haystack,
        tokenizer: Any,
        between: Sequence[int] = (1024, 16_384, 131_072),
        sessions: int = 10,
        facts: int = 10,
        recall: int = 5,
        new_tokens: int = 24,
        seed: int = 0,
    ) -> None:
        different(between=between)
        if max(between) > haystack.ids.size:
            raise DataError(f"{haystack.ids.size:,} tokens of text, --between needs {max(between):,}; give more --data")
        self.text, self.digest, self.source = haystack.ids.reshape(-1), haystack.digest, haystack.source
        self.tokenizer, self.between, self.recall, self.new_tokens = tokenizer, list(between), recall, new_tokens
        self.seeds = (seed,)
        draw = random.Random(f"{seed} facts")
        self.sessions: list[Session] = [told_session(draw, facts, held_out=True) for _ in range(sessions)]
        self._told = [tuple(told_ids(session, tokenizer)) for session in self.sessions]
        self._search = lru_cache(maxsize=2)(self._searched)
        self._notes = lru_cache(maxsize=None)(self._found)

    def systems(self, askers: Sequence[Asker]) -> list[Asker]:
        label = "backbone, the conversation in its window"
        known = [replace(a, name=IN_WINDOW, label=label, whole=True) for a in askers if a.name == BACKBONE]
        return [*rereading(askers, self.recall), *known]

    def settings(self) -> Json:
        return {
            "text": list(self.source),
            "text_digest": self.digest,
            "between": self.between,
            "sessions": len(self.sessions),
            "facts": len(self.sessions[0].facts),
            "recall": self.recall,
            "new_tokens": self.new_tokens,
            "seed": self.seeds[0],
        }

    def examples(self) -> list[Example]:
        return [
            Example(f"{between}-{unit}-{number}", f"{between:,} tokens between", unit, Asked(at, number, between))
            for between in self.between
            for at, session in enumerate(self.sessions)
            for unit in (f"conversation {at + 1}",)
            for number in range(len(session.facts))
        ]

    def prompt(self, example: Example, asker: Asker) -> Prompt:
        """To score the value where it stands in the answer, and to have the whole answer generated."""
        asked, fact = example.item, self._fact(example)
        before = self.sessions[asked.session].messages if asker.name == IN_WINDOW else ()
        if asker.recall and (notes := self._notes(asked, asker.recall)):
            before = ({"role": "system", "content": notes},)
        whole = asked_ids([fact], self.tokenizer, before)
        (first, end), question = whole.values[0], question_ids(fact, self.tokenizer, before)
        contexts, value = (tuple(question), tuple(whole.ids[:first])), tuple(whole.ids[first:end])
        memory = () if asker.name == IN_WINDOW else (*self._told[asked.session], *self._between(asked))
        return Prompt(contexts, (value,), self.new_tokens, memory)

    def gold(self, example: Example) -> Json:
        fact = self._fact(example)
        return {"asked": fact.asked, "expected": fact.value}

    def measure(self, example: Example, prompt: Prompt, answer: Answer) -> dict[str, float]:
        scored, value = answer.scored[1], prompt.options[0]
        said = self.tokenizer.decode(answer.said, skip_special_tokens=True)
        return {
            "value_nats": -scored.logprobs[0],
            "first_token": 100.0 * (scored.next_token == value[0]),
            "exact": 100.0 * scored.greedy[0],
            "named": 100.0 * names(said, self._fact(example).value),
        }

    def notes(self, result: Json) -> Iterator[str]:
        """The questions and values, for who wants to see what was asked."""
        yield f"{len(self.sessions)} conversations, e.g. {self.sessions[0].facts[0].said!r}"

    def _fact(self, example: Example) -> Any:
        return self.sessions[example.item.session].facts[example.item.fact]

    def _between(self, asked: Asked) -> Tokens:
        draw = random.Random(f"{self.seeds[0]} {asked.session} {asked.between}")
        start = draw.randrange(len(self.text) - asked.between + 1)
        return tuple(self.text[start : start + asked.between].tolist())

    def _searched(self, session: int, between: int) -> Recall:
        told = "".join(f"{message['role']}: {message['content']}\n" for message in self.sessions[session].messages)
        other = self.tokenizer.decode(self._between(Asked(session, 0, between)))
        return Recall(PlainTexts({"conversation": told, "text": other}), "")

    def _found(self, asked: Asked, passages: int) -> str:
        fact = self.sessions[asked.session].facts[asked.fact]
        return self._search(asked.session, asked.between).notes(fact.asked, self.tokenizer, passages)[0]


def names(said: str, value: str) -> bool:
    """Whether an answer has the value in it, as whole words in any case."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", said, re.IGNORECASE) is not None
