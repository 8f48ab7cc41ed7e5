"""Demonstrations in front of a question: as many as fit are in the window, further ones go to memory."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from longmem.errors import ConfigError, DataError
from longmem.evaluation.asking import Asker, Tokens
from longmem.evaluation.results import Json
from longmem.evaluation.task import Example, Task, leaves


class Shots(NamedTuple):
    """Demonstrations of one draw as token ids: ``local`` ones for the window, the last nearest to the question, and
    those for ``memory``, the last newest; ``start`` is the tokenizer's start token, or empty."""

    start: Tokens
    local: tuple[Tokens, ...]
    memory: tuple[Tokens, ...]

    def lay_out(self, asker: Asker, query: Tokens, after: int, least: int = 0) -> LaidOut:
        """What is in the window before the answer; demonstrations are whole or left out, the farthest ones first.

        Args:
            asker: its window, and whether demonstrations of memory are in it too (the full-context backbone).
            query: cut from the left where even it does not fit.
            after: tokens of the window to leave free after it.
            least: tokens to reserve for the query, so that another one of up to this length can take its place.

        Raises:
            ConfigError: there is no room for a query.
        """
        room = asker.window - after - len(self.start)
        if room < 1:
            raise ConfigError(f"window ({asker.window}) has no room for a question beside {after} tokens of answer")
        shown = query[-room:]
        room -= max(len(shown), min(least, room))
        near = fitting(self.local, room)
        room -= sum(map(len, self.local[len(self.local) - near :]))
        far = fitting(self.memory, room) if asker.whole and near == len(self.local) else 0
        before = (*self.memory[len(self.memory) - far :], *self.local[len(self.local) - near :])
        context = (*self.start, *chain.from_iterable(before))
        return LaidOut(context, shown, near, far, len(query) - len(shown))

    def remembered(self, asker: Asker) -> Tokens:
        """What a system with memory reads into it."""
        return (*self.start, *chain.from_iterable(self.memory)) if self.memory and asker.reads_memory else ()


class LaidOut(NamedTuple):
    """Start token and demonstrations ``before`` the ``query``; how many of them are of ``local`` and of ``memory``;
    tokens of the question that did not fit (``cut``)."""

    before: Tokens
    query: Tokens
    local: int
    memory: int
    cut: int


class ShotsTask(Task):
    """A task whose questions come after demonstrations; the last part of a group's name says how many: ``4 + 200``."""

    @abstractmethod
    def laid_out(self, example: Example, asker: Asker) -> tuple[Shots, LaidOut]:
        """The demonstrations of an example, and what of them is in the window."""

    def shots_seen(self, examples: Sequence[Example], askers: Sequence[Asker]) -> Json:
        """group -> system -> mean numbers of demonstrations in its ``window``, and in its ``memory`` or, of those for
        memory, in a full-context window; ``cut``: mean tokens of the question that did not fit."""
        found: Json = {}
        for example in examples:
            for asker in askers:
                shots, laid = self.laid_out(example, asker)
                held = 0 if asker.memory_size is None else fitting(shots.memory, asker.memory_size)
                seen = (laid.local, laid.memory + held, laid.cut)
                found.setdefault(example.group, {}).setdefault(asker.name, []).append(seen)
        means: Json = leaves(
            found,
            lambda seen: dict(zip(("window", "memory", "cut"), np.mean(seen, axis=0).round(2).tolist(), strict=True)),
        )
        return means

    def notes(self, result: Json) -> Iterator[str]:
        """What of demonstrations and questions did not fit, where something did not."""
        who: dict[str, list[str]] = {}
        for group, systems in result["extra"]["shots"].items():
            local, memory = (int(number) for number in group.rpartition(", ")[2].split(" + "))
            for name, seen in systems.items():
                for said, short in (
                    (f"{seen['window']:g} of {local} demonstrations fit the window", seen["window"] < local),
                    (f"{seen['memory']:g} of {memory:,} are in memory", 0 < seen["memory"] < memory),
                    (f"{seen['cut']:g} tokens of the question are cut", seen["cut"] > 0),
                ):
                    if short:
                        who.setdefault(f"{group}: {said}", []).append(name)
        return (f"{line}, on average ({', '.join(names)})" for line, names in who.items())


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


def encode_after(tokenizer: Any, before: str, texts: Sequence[str]) -> list[Tokens]:
    """Token ids of texts, without special ones, as they are after another text.

    Some tokenizers put a space sign before every beginning, which is none where a text goes on.
    """
    if not texts:
        return []
    ahead: list[int] = tokenizer(before, add_special_tokens=False, verbose=False)["input_ids"]
    joined = tokenizer([before + text for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
    if all(ids[: len(ahead)] == ahead for ids in joined):
        return [tuple(ids[len(ahead) :]) for ids in joined]
    return [tuple(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]
