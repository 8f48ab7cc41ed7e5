"""Made-up facts that are hidden in a text and asked for later: to train on, and to measure with.

Names and codes are drawn for every question, so that the answer cannot be known without reading it. A fact is said two
or three times in a line, as the usual pass key test says it twice ("... Remember it. ... is the pass key."). Each time
it falls on other places of its chunks, and one of them is whole where a segment's end cuts the line in two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from longmem.errors import ConfigError

CODE_DIGITS = 5
DISTRACTORS = 3
"""Other facts of the same kind that are hidden beside the one asked for, where a kind has any."""
OPTIONS = 4
"""Answers whose likelihoods are compared: the true one, and others."""

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
        kind: see ``KINDS``.
        asked: the sentences that the answer needs, in the order in which they are read.
        others: sentences of the same kind, which the question does not ask for.
        question: ends where the answer begins.
        options: the true answer first, then wrong ones; each begins with a space.
    """

    kind: str
    asked: tuple[str, ...]
    others: tuple[str, ...]
    question: str
    options: tuple[str, ...]

    @property
    def answer(self) -> str:
        return self.options[0]


def draw_facts(kind: str, random: np.random.Generator) -> Facts:
    """Facts of a kind, all names and codes drawn.

    Args:
        kind: ``passkey``: one pass key; ``pair``: one thing and its code; ``multi``: several things, one asked for;
            ``twohop``: who keeps a thing, and that person's code, hidden apart, with others of both kinds.
        random: what decides everything.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind ({kind!r}) must be one of {', '.join(KINDS)}")
    return KINDS[kind](random)


def _passkey(random: np.random.Generator) -> Facts:
    codes = _codes(random, OPTIONS)
    return Facts("passkey", (_said(f"The pass key is {codes[0]}.", 3),), (), "\nThe pass key is", _options(codes))


def _pair(random: np.random.Generator) -> Facts:
    thing, codes = _things(random, 1)[0], _codes(random, OPTIONS)
    fact = _said(f"The code of the {thing} is {codes[0]}.")
    return Facts("pair", (fact,), (), f"\nThe code of the {thing} is", _options(codes))


def _multi(random: np.random.Generator) -> Facts:
    """The wrong options are the codes of the other things."""
    things, codes = _things(random, 1 + DISTRACTORS), _codes(random, 1 + DISTRACTORS)
    first, *more = (_said(f"The code of the {thing} is {code}.") for thing, code in zip(things, codes, strict=True))
    return Facts("multi", (first,), tuple(more), f"\nThe code of the {things[0]} is", _options(codes))


def _twohop(random: np.random.Generator) -> Facts:
    """The answer says both steps: a reader of one layer can write the first down and go on from it."""
    count = 1 + DISTRACTORS
    things, people = _things(random, count), random.choice(_PEOPLE, count, replace=False).tolist()
    codes = _codes(random, count)
    keeps = [_said(f"The keeper of the {thing} is {who}.") for thing, who in zip(things, people, strict=True)]
    knows = [_said(f"The code of {who} is {code}.") for who, code in zip(people, codes, strict=True)]
    answers = [f" {who}. The code of {who} is {code}" for who, code in zip(people, codes, strict=True)]
    others = tuple(sentence for pair in zip(keeps[1:], knows[1:], strict=True) for sentence in pair)
    return Facts("twohop", (keeps[0], knows[0]), others, f"\nThe keeper of the {things[0]} is", tuple(answers))


KINDS: dict[str, Callable[[np.random.Generator], Facts]] = {
    "passkey": _passkey, "pair": _pair, "multi": _multi, "twohop": _twohop,
}  # fmt: skip


def _said(sentence: str, times: int = 2) -> str:
    """A line that says something more than once: what a segment's end cuts in two is still whole elsewhere."""
    return "\n" + " ".join([sentence] * times) + "\n"


def _options(codes: Sequence[str]) -> tuple[str, ...]:
    return tuple(f" {code}" for code in codes)


def _codes(random: np.random.Generator, count: int) -> list[str]:
    """Different numbers of ``CODE_DIGITS`` digits, the first of them no zero."""
    low = 10 ** (CODE_DIGITS - 1)
    return [str(number) for number in low + random.choice(9 * low, count, replace=False)]


def _things(random: np.random.Generator, count: int) -> list[str]:
    numbers = random.choice(len(_ADJECTIVES) * len(_NOUNS), count, replace=False)
    return [f"{_ADJECTIVES[n // len(_NOUNS)]} {_NOUNS[n % len(_NOUNS)]}" for n in numbers]
