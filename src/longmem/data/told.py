"""Made-up facts that a user tells in one conversation and asks for in a later one: to calibrate on, to measure with.

A kind of fact says how it is told, asked and answered, and where its value is drawn from; ``told_facts.tsv`` lists
105 kinds, ``told_values.tsv`` the values. Every fifth kind and every fourth value are held out: what is measured on
was never trained on, neither its wording nor its value.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.resources import files
from typing import Any, NamedTuple

from longmem.errors import ConfigError

_ALWAYS = ("days", "months")  # too few of them to hold any out
_BEFORE = ("", "By the way: ", "Something else. ", "Please remember this. ", "I wanted to tell you something. ")
_AFTER = ("", " I am quite happy about it.", " That is how it is.", " Just so you know.", " Keep it in mind.")
_REPLIES = (
    "Thank you for telling me!",
    "I see. I will remember that.",
    "That is good to know.",
    "Noted.",
    "Oh, that is interesting!",
    "All right, I will keep it in mind.",
    "Thanks for sharing that with me.",
)

Message = dict[str, str]
"""``{"role": "user" or "assistant", "content": text}``, as chat templates take them."""


class ToldFact(NamedTuple):
    """What the user tells, the question in a later conversation, and its answer: before, value, after."""

    said: str
    asked: str
    before: str
    value: str
    after: str


class Session(NamedTuple):
    """A conversation, and the facts that it told, in order."""

    facts: tuple[ToldFact, ...]
    messages: tuple[Message, ...]


class AskedIds(NamedTuple):
    """Token ids of a conversation that asks; for each question, from where to where the tokens of its value are."""

    ids: list[int]
    values: list[tuple[int, int]]


def told_session(draw: random.Random, count: int, *, held_out: bool = False) -> Session:
    """A conversation that tells ``count`` facts of different kinds; ``held_out`` ones are kept for measuring."""
    kinds = [kind for number, kind in enumerate(_kinds()) if (number % 5 == 4) == held_out]
    if not 1 <= count <= len(kinds):
        raise ConfigError(f"facts of a session ({count}) must be 1 to {len(kinds)}, the kinds there are to draw from")
    facts, used = [], set[str]()
    for said, asked, answer, pool in draw.sample(kinds, count):
        values = _values(pool, held_out)
        value = draw.choice([value for value in values if value not in used] or values)
        used.add(value)
        before, after = answer.split("{}")
        facts.append(ToldFact(said.format(value), asked, before, value, after))
    return Session(tuple(facts), tuple(_messages(facts, draw)))


def told_ids(session: Session, tokenizer: Any) -> list[int]:
    """The conversation that told the facts, through the tokenizer's chat template where it has one."""
    return _ids(tokenizer, chat_text(tokenizer, session.messages, answer=False))


def question_ids(fact: ToldFact, tokenizer: Any, before: Sequence[Message] = ()) -> list[int]:
    """A conversation, after these messages, up to where the fact is to be answered."""
    messages = [*before, {"role": "user", "content": fact.asked}]
    return _ids(tokenizer, chat_text(tokenizer, messages, answer=True))


def asked_ids(facts: Sequence[ToldFact], tokenizer: Any, before: Sequence[Message] = ()) -> AskedIds:
    """A conversation, after these messages, that asks for the given facts one after the other, with their answers."""
    messages = list(before)
    ids: list[int] = []
    values = []
    done = ""
    for fact in facts:
        messages.append({"role": "user", "content": fact.asked})
        prompt = chat_text(tokenizer, messages, answer=True)
        lead = prompt[len(done) :] + fact.before
        value = fact.value
        if lead.endswith(" ") and not value[0].isdigit():
            lead, value = lead[:-1], " " + value  # the space belongs to the word's token
        ids += _ids(tokenizer, lead)
        first = len(ids)
        ids += _ids(tokenizer, value)
        values.append((first, len(ids)))
        messages.append({"role": "assistant", "content": fact.before + fact.value + fact.after})
        whole = chat_text(tokenizer, messages, answer=False)
        ids += _ids(tokenizer, whole[len(prompt) + len(fact.before + fact.value) :])
        done = whole
    return AskedIds(ids, values)


def _messages(facts: Sequence[ToldFact], draw: random.Random) -> Iterator[Message]:
    for fact in facts:
        yield {"role": "user", "content": draw.choice(_BEFORE) + fact.said + draw.choice(_AFTER)}
        yield {"role": "assistant", "content": draw.choice(_REPLIES)}


def chat_text(tokenizer: Any, messages: Sequence[Message], *, answer: bool) -> str:
    """The text of a conversation; with ``answer`` it ends where the assistant begins to speak."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)
        return str(text)
    lines = "".join(f"{message['role'].capitalize()}: {message['content']}\n" for message in messages)
    return lines + "Assistant: " * answer


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@lru_cache(maxsize=1)
def _kinds() -> list[tuple[str, ...]]:
    """(said, asked, answer, values) of every kind."""
    return _table("told_facts.tsv")


def _table(name: str) -> list[tuple[str, ...]]:
    lines = files(__package__).joinpath(name).read_text(encoding="utf-8").splitlines()
    return [tuple(line.split("\t")) for line in lines[1:]]


@lru_cache(maxsize=64)
def _values(pool: str, held_out: bool) -> list[str]:
    if pool == "times":
        values = [f"{hour}:{minute:02d}" for hour in range(1, 13) for minute in (5, 10, 20, 25, 35, 40, 50, 55)]
    elif words := next((words for name, words in _table("told_values.tsv") if name == pool), None):
        values = words.split()
    else:
        first, last = map(int, pool.split("-"))
        values = [str(number) for number in range(first, last + 1)]
    if pool in _ALWAYS:
        return values
    values = random.Random(pool).sample(values, len(values))  # lists of neighbours are not held out in a pattern
    return [value for number, value in enumerate(values) if (number % 4 == 3) == held_out]
