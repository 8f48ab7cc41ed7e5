"""The text in which facts are hidden, and where each trial hides them."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longmem.data.facts import Facts, draw_facts
from longmem.data.python_source import STDLIB, TEST, packages
from longmem.data.text import TextSource, read_documents
from longmem.errors import DataError
from longmem.evaluation.task import Example, digest_of


@dataclass(frozen=True)
class Haystack:
    """Real text as whole segments.

    Attributes:
        ids: (n, T) token ids.
        source: where it is from, for the result file.
    """

    ids: NDArray[np.int64]
    source: tuple[str, ...]

    @property
    def window(self) -> int:
        """T."""
        return int(self.ids.shape[1])

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.ids.tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Trial(Example):
    """One question about a text of its own.

    Attributes:
        kind: of its facts, see ``longmem.data.facts``.
        length: tokens of the text.
        depth: % of the text before the fact that is asked for.
        first: number of the text's first segment in the haystack.
        hidden: (position in the text, token ids) of every sentence; they replace what stood there.
        question: token ids.
        options: token ids of the answers, the true one first.
    """

    kind: str
    length: int
    depth: float
    first: int
    hidden: tuple[tuple[int, tuple[int, ...]], ...]
    question: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]

    def changed(self, haystack: Haystack) -> dict[int, list[int]]:
        """The segments that hold something, by their number in the haystack, with what is hidden in them."""
        window = haystack.window
        found: dict[int, NDArray[np.int64]] = {}
        for position, tokens in self.hidden:
            for at, token in enumerate(tokens, position):
                number = self.first + at // window
                if number not in found:
                    found[number] = haystack.ids[number].copy()
                found[number][at % window] = token
        return {number: ids.tolist() for number, ids in sorted(found.items())}

    def text(self, haystack: Haystack, last: int | None = None) -> list[int]:
        """The whole text with what is hidden in it, or its last tokens."""
        count = self.length // haystack.window
        ids = haystack.ids[self.first : self.first + count].copy()
        for number, segment in self.changed(haystack).items():
            ids[number - self.first] = segment
        flat: list[int] = ids.flatten()[-last if last else None :].tolist()
        return flat


def read_haystack(paths: Sequence[str], tokenizer: Any, tokens: int, window: int) -> Haystack:
    """At least so many tokens of text, cut into segments.

    Args:
        paths: see ``TextSource``; empty takes the source of Python's standard library, the packages that
            ``longmem data python`` holds out from training first.
        tokenizer: of the models.
        tokens: how many are needed.
        window: T.

    Raises:
        DataError: the text is too short.
    """
    wanted = -(-tokens // window) * window
    found: list[int] = []
    for text in _texts(paths):
        found += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(found) >= wanted:
            break
    if len(found) < wanted:
        raise DataError(
            f"{', '.join(paths) or 'the standard library'}: {len(found):,} tokens of text, the longest of --lengths "
            f"needs {wanted:,}; give more --data, or shorter --lengths"
        )
    source = tuple(paths) or (f"Python {sysconfig.get_python_version()} standard library",)
    return Haystack(np.array(found[:wanted], dtype=np.int64).reshape(-1, window), source)


def _texts(paths: Sequence[str]) -> Iterator[str]:
    if paths:
        yield from (document.text for document in read_documents(TextSource(tuple(paths))))
        return
    named = dict(packages(Path(sysconfig.get_paths()["stdlib"])))
    held_out = [name for name in TEST[STDLIB] if name in named]
    for name in (*held_out, *(name for name in named if name not in held_out)):
        yield named[name]


def make_trials(
    haystack: Haystack,
    tokenizer: Any,
    *,
    kinds: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
    seed: int,
) -> list[Trial]:
    """Every kind at every length and depth, so many times; each trial draws its facts, its text and its places.

    Raises:
        DataError: a text is too short for what has to be hidden in it.
    """
    made = []
    digest = haystack.digest
    for kind in kinds:
        for length in lengths:
            for depth in depths:
                for number in range(trials):
                    random = np.random.default_rng([seed, *kind.encode(), length, round(1000 * depth), number])
                    made.append(_trial(haystack, tokenizer, digest, kind, length, depth, number, random))
    return made


def _trial(
    haystack: Haystack,
    tokenizer: Any,
    text_digest: str,
    kind: str,
    length: int,
    depth: float,
    number: int,
    random: np.random.Generator,
) -> Trial:
    facts = draw_facts(kind, random)
    count = length // haystack.window
    first = int(random.integers(len(haystack.ids) - count + 1))
    hidden = _hide(facts, tokenizer, count * haystack.window, depth, haystack.window, random)
    question = _tokens(tokenizer, facts.question)
    options = tuple(_tokens(tokenizer, option) for option in facts.options)
    name = f"{kind}-{length}-{depth:g}-{number:04d}"
    return Trial(
        id=name,
        digest=digest_of(text_digest, length, first, hidden, question, options),
        group=group_name(kind, length, depth),
        unit=name,
        kind=kind,
        length=length,
        depth=depth,
        first=first,
        hidden=hidden,
        question=question,
        options=options,
    )


def group_name(kind: str, length: int, depth: float) -> str:
    return f"{kind}, {length:,} tokens, depth {depth:g} %"


def _hide(
    facts: Facts, tokenizer: Any, length: int, depth: float, window: int, random: np.random.Generator
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """The fact asked for at its depth, give or take half a segment; all else anywhere."""
    asked, *rest = [_tokens(tokenizer, sentence) for sentence in (*facts.asked, *facts.others)]
    everything = sum(map(len, (asked, *rest)))
    if 2 * everything > length:
        raise DataError(
            f"a text of {length} tokens is too short to hide {everything} tokens in ({facts.kind}); "
            "use longer --lengths"
        )
    target = round(depth / 100 * (length - len(asked))) + int(random.integers(-(window // 2), window // 2 + 1))
    hidden = [(min(max(target, 0), length - len(asked)), asked)]
    for sentence in rest:
        hidden.append((_free_place(hidden, len(sentence), length, random), sentence))
    return tuple(hidden)


def _free_place(
    taken: Iterable[tuple[int, tuple[int, ...]]], size: int, length: int, random: np.random.Generator
) -> int:
    """A random position where nothing is hidden yet."""
    free = np.ones(length - size + 1, dtype=bool)
    for position, tokens in taken:
        free[max(0, position - size + 1) : position + len(tokens)] = False
    return int(random.choice(np.flatnonzero(free)))


def _tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
