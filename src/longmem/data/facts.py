"""Made-up facts, to train on and to measure with: drawn anew, so that no answer is known without having read it.

*Hidden facts* are lines in a text (``draw_facts``), *told facts* are said in one conversation and asked for in a later
one (``told_session``).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

from longmem.data.tokens import Message, chat_text, token_ids
from longmem.errors import ConfigError

# hidden in a text

CODE_DIGITS = 5
OPTIONS = 4
"""Answers whose likelihoods are compared: the true one, and others. Where a kind hides other facts beside the one asked
for, they have the other answers."""

_ADJECTIVES = (
    "amber ancient blue brass broken copper crooked empty golden green heavy hidden iron little lonely narrow "
    "painted purple quiet red silver wooden yellow white"
).split()
_NOUNS = (
    "anchor apple basket bell boat bottle bridge candle castle chair clock cup door drum engine flag garden hammer "
    "horse lamp mirror mountain river tower"
).split()
_PEOPLE = (
    "Adam Agnes Albert Alice Anna Arthur Clara Daniel David Edith Edward Emily Emma Frank George Harry Helen Henry "
    "Jack James Jane John Julia Kate Laura Lewis Lucy Mark Martha Mary Oliver Paul Peter Philip Ralph Richard "
    "Robert Rose Ruth Sam Sarah Simon Sophie Susan Thomas Victor Walter William"
).split()


@dataclass(frozen=True)
class Facts:
    """What is hidden, and the question about it.

    Attributes:
        asked: the lines that the answer needs, in the order in which they are read.
        others: lines of the same kind, which the question does not ask for.
        question: ends where the answer begins.
        options: the true answer first, then wrong ones; each begins with a space.
    """

    asked: tuple[str, ...]
    others: tuple[str, ...]
    question: str
    options: tuple[str, ...]

    @property
    def answer(self) -> str:
        return self.options[0]


def draw_facts(kind: str, draw: np.random.Generator) -> Facts:
    """Facts of a kind, all names and codes drawn.

    Args:
        kind: ``passkey``: one pass key; ``pair``: one thing and its code; ``multi``: several things, one asked for;
            ``twohop``: who keeps a thing, and that person's code, hidden apart, with others of both kinds.
    """
    return KINDS[kind](draw)


def _passkey(draw: np.random.Generator) -> Facts:
    codes = _codes(draw)
    line = _line(f"The pass key is {codes[0]}.", 3)
    return Facts((line,), (), "\nThe pass key is", tuple(f" {code}" for code in codes))


def _things(draw: np.random.Generator, count: int) -> Facts:
    things, codes = _names(draw, count), _codes(draw)
    first, *others = (_line(f"The code of the {thing} is {code}.") for thing, code in zip(things, codes, strict=False))
    question = f"\nThe code of the {things[0]} is"
    return Facts((first,), tuple(others), question, tuple(f" {code}" for code in codes))


def _twohop(draw: np.random.Generator) -> Facts:
    """The answer says both steps: a reader of one layer can write the first down and go on from it."""
    things, people = _names(draw, OPTIONS), draw.choice(_PEOPLE, OPTIONS, replace=False).tolist()
    codes = _codes(draw)
    keeps = [_line(f"The keeper of the {thing} is {who}.") for thing, who in zip(things, people, strict=True)]
    knows = [_line(f"The code of {who} is {code}.") for who, code in zip(people, codes, strict=True)]
    answers = [f" {who}. The code of {who} is {code}" for who, code in zip(people, codes, strict=True)]
    others = tuple(line for pair in zip(keeps[1:], knows[1:], strict=True) for line in pair)
    return Facts((keeps[0], knows[0]), others, f"\nThe keeper of the {things[0]} is", tuple(answers))


KINDS: dict[str, Callable[[np.random.Generator], Facts]] = {
    "passkey": _passkey,
    "pair": partial(_things, count=1),
    "multi": partial(_things, count=OPTIONS),
    "twohop": _twohop,
}


def _line(sentence: str, times: int = 2) -> str:
    """A line that says something more than once: each time it falls on other places of its chunks, and where a
    segment's end cuts it in two, it is still whole once."""
    return "\n" + " ".join([sentence] * times) + "\n"


def _codes(draw: np.random.Generator) -> list[str]:
    """Different numbers of ``CODE_DIGITS`` digits, the first of them no zero."""
    low = 10 ** (CODE_DIGITS - 1)
    return [str(number) for number in low + draw.choice(9 * low, OPTIONS, replace=False)]


def _names(draw: np.random.Generator, count: int) -> list[str]:
    numbers = draw.choice(len(_ADJECTIVES) * len(_NOUNS), count, replace=False)
    return [f"{_ADJECTIVES[n // len(_NOUNS)]} {_NOUNS[n % len(_NOUNS)]}" for n in numbers]


# told in a conversation
#
# told_facts.tsv lists 105 kinds of facts, how each is said, asked and answered, and which values of told_values.tsv it
# takes. Every fifth kind and every fourth value are held out: what is measured on was never trained on, neither its
# wording nor its value.

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
    kinds = [kind for number, kind in enumerate(_table("told_facts.tsv")) if (number % 5 == 4) == held_out]
    if not 1 <= count <= len(kinds):
        raise ConfigError(f"facts of a session ({count}) must be 1 to {len(kinds)}, the kinds there are to draw from")
    facts, used = [], set[str]()
    for said, asked, answer, pool in draw.sample(kinds, count):
        values = _values(pool, held_out)
        value = draw.choice([value for value in values if value not in used] or values)
        used.add(value)
        before, after = answer.split("{}")
        facts.append(ToldFact(said.format(value), asked, before, value, after))
    return session_of(facts, draw)


def changed_session(session: Session, draw: random.Random, *, held_out: bool = False) -> Session:
    """A later conversation: the facts of a ``told_session`` once more, in another order and each with another value."""
    kinds = {asked: (said, pool) for said, asked, _, pool in _table("told_facts.tsv")}
    facts, used = [], {fact.value for fact in session.facts}
    for fact in draw.sample(session.facts, len(session.facts)):
        said, pool = kinds[fact.asked]
        some = (_values(pool, of) for of in (held_out, not held_out))  # of a few kinds one value is held out
        value = draw.choice(next(left for values in some if (left := [each for each in values if each not in used])))
        used.add(value)
        facts.append(fact._replace(said=said.format(value), value=value))
    return session_of(facts, draw)


def session_of(facts: Sequence[ToldFact], draw: random.Random) -> Session:
    """A conversation that tells these facts."""
    messages = list[Message]()
    for fact in facts:
        messages.append({"role": "user", "content": draw.choice(_BEFORE) + fact.said + draw.choice(_AFTER)})
        messages.append({"role": "assistant", "content": draw.choice(_REPLIES)})
    return Session(tuple(facts), tuple(messages))


def told_ids(session: Session, tokenizer: Any) -> list[int]:
    """The conversation that told the facts, through the tokenizer's chat template where it has one."""
    return token_ids(tokenizer, chat_text(tokenizer, session.messages, answer=False))


def question_ids(fact: ToldFact, tokenizer: Any, before: Sequence[Message] = ()) -> list[int]:
    """A conversation, after these messages, up to where the fact is to be answered."""
    messages = [*before, {"role": "user", "content": fact.asked}]
    return token_ids(tokenizer, chat_text(tokenizer, messages, answer=True))


def asked_ids(facts: Sequence[ToldFact], tokenizer: Any, before: Sequence[Message] = ()) -> AskedIds:
    """A conversation, after these messages, that asks for the given facts one after the other, with their answers."""
    messages, ids, values, done = list(before), list[int](), [], ""
    for fact in facts:
        messages.append({"role": "user", "content": fact.asked})
        prompt = chat_text(tokenizer, messages, answer=True)
        lead, value = prompt[len(done) :] + fact.before, fact.value
        if lead.endswith(" ") and not value[0].isdigit():
            lead, value = lead[:-1], " " + value  # the space belongs to the word's token
        ids += token_ids(tokenizer, lead)
        first = len(ids)
        ids += token_ids(tokenizer, value)
        values.append((first, len(ids)))
        messages.append({"role": "assistant", "content": fact.before + fact.value + fact.after})
        done = chat_text(tokenizer, messages, answer=False)
        ids += token_ids(tokenizer, done[len(prompt) + len(fact.before + fact.value) :])
    return AskedIds(ids, values)


@lru_cache
def _table(name: str) -> list[list[str]]:
    """The lines of a table of this package, without its heads."""
    lines = files(__package__).joinpath(name).read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines[1:]]


@lru_cache
def _values(pool: str, held_out: bool) -> list[str]:
    """Of a line of told_values.tsv, or of a range of numbers (``2-30``)."""
    first, _, last = pool.partition("-")
    values = list(map(str, range(int(first), int(last) + 1))) if last else dict(_table("told_values.tsv"))[pool].split()
    if pool in _ALWAYS:
        return values
    values = random.Random(pool).sample(values, len(values))  # lists of neighbours are not held out in a pattern
    return [value for number, value in enumerate(values) if (number % 4 == 3) == held_out]
