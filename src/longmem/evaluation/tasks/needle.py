"""Needle: facts hidden at chosen depths in real text, and asked for at its end."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from longmem.data.facts import KINDS, OPTIONS, Facts, draw_facts
from longmem.data.text import TextSource, read_documents
from longmem.errors import DataError
from longmem.evaluation.asking import Answer, Asker, Prompt, Tokens
from longmem.evaluation.documents import standard_library
from longmem.evaluation.task import Example, Json, Metric, Task, different, digest_of
from longmem.memory.encoded import EncodedText
from longmem.progress import Progress
from longmem.types import Memory


@dataclass(frozen=True)
class Haystack:
    """Real text as whole segments: ``ids`` (n, T), and where it is from."""

    ids: NDArray[np.int64]
    source: tuple[str, ...]

    @property
    def window(self) -> int:
        """T."""
        return int(self.ids.shape[1])

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.ids.tobytes()).hexdigest()[:16]


def read_haystack(paths: Sequence[str], tokenizer: Any, tokens: int, window: int) -> Haystack:
    """At least so many tokens of text, cut into segments of ``window``; without paths Python's standard library.

    Raises:
        DataError: the text is too short.
    """
    wanted = -(-tokens // window) * window
    found: list[int] = []
    texts = (document.text for document in read_documents(TextSource(tuple(paths)))) if paths else standard_library()
    for text in texts:
        found += _tokens(tokenizer, text)
        if len(found) >= wanted:
            break
    if len(found) < wanted:
        raise DataError(
            f"{', '.join(paths) or 'the standard library'}: {len(found):,} tokens of text, the longest of --lengths "
            f"needs {wanted:,}; give more --data, or shorter --lengths"
        )
    source = tuple(paths) or (f"Python {sysconfig.get_python_version()} standard library",)
    return Haystack(np.array(found[:wanted], dtype=np.int64).reshape(-1, window), source)


@dataclass(frozen=True)
class Trial:
    """One question about a text of its own.

    Attributes:
        length: tokens of the text.
        first: number of the text's first segment in the haystack.
        hidden: (position in the text, token ids) of every sentence; they replace what was there.
        question: token ids.
        options: token ids of the answers, the true one first.
    """

    length: int
    first: int
    hidden: tuple[tuple[int, Tokens], ...]
    question: Tokens
    options: tuple[Tokens, ...]

    def changed(self, haystack: Haystack) -> dict[int, list[int]]:
        """The segments that hold something, by their number in the haystack, with what is hidden in them."""
        found: dict[int, NDArray[np.int64]] = {}
        for position, tokens in self.hidden:
            for at, token in enumerate(tokens, position):
                number = self.first + at // haystack.window
                found.setdefault(number, haystack.ids[number].copy())[at % haystack.window] = token
        return {number: ids.tolist() for number, ids in sorted(found.items())}

    def text(self, haystack: Haystack, last: int | None = None) -> list[int]:
        """The whole text with what is hidden in it, or its last tokens."""
        count = self.length // haystack.window
        first = 0 if last is None else max(0, count - -(-last // haystack.window))
        ids = haystack.ids[self.first + first : self.first + count].copy()
        for number, segment in self.changed(haystack).items():
            if number >= self.first + first:
                ids[number - self.first - first] = segment
        flat: list[int] = ids.flatten()[-last if last else None :].tolist()
        return flat


class NeedleTask(Task):
    """Facts hidden in long texts. Groups are a kind of fact, a length and a depth; every trial is a unit.

    A system with memory reads the whole text into it, in segments of the haystack, and has only the question in its
    window. A system without memory has the end of the text in front of the question, as much as fits its window.

    Args:
        kinds: of facts, see ``longmem.data.facts.KINDS``.
        lengths: tokens of text, each a multiple of the haystack's segments.
        depths: where the fact is hidden, in % of the text.
        trials: for each kind, length and depth; each draws its facts, its text and its places.
        seed: of facts, places and texts.

    Raises:
        ConfigError: lists every setting that breaks a rule.
    """

    name = "needle"
    metrics: Sequence[Metric] = (
        Metric("exact", "exact answer", "%", chance=0.0),
        Metric("choice", f"true answer likeliest of {OPTIONS}", "%", chance=100 / OPTIONS),
    )

    def __init__(
        self,
        haystack: Haystack,
        tokenizer: Any,
        kinds: Sequence[str] = ("passkey",),
        lengths: Sequence[int] = (4096, 16384, 65536),
        depths: Sequence[float] = (0, 25, 50, 75, 100),
        trials: int = 40,
        seed: int = 0,
    ) -> None:
        window = haystack.window
        problems = [f"kind ({kind!r}) must be one of {', '.join(KINDS)}" for kind in kinds if kind not in KINDS]
        problems += [f"depth ({depth:g}) must be from 0 to 100 %" for depth in depths if not 0 <= depth <= 100]
        problems += [
            f"length ({length}) must be a multiple of the window ({window}); try {max(1, length // window) * window}"
            for length in lengths
            if length % window or length < window
        ]
        if not kinds or len(set(kinds)) < len(kinds):
            problems.append(f"kinds ({','.join(kinds) or 'none'}) must be one or more, all different")
        different(problems, lengths=lengths, depths=depths)
        self.haystack, self.tokenizer = haystack, tokenizer
        self.kinds, self.lengths, self.depths, self.trials = list(kinds), list(lengths), list(depths), trials
        self.seeds = (seed,)
        self._digest = haystack.digest
        self._encoded: EncodedText | None = None

    def settings(self) -> Json:
        return {
            "text": list(self.haystack.source),
            "text_digest": self._digest,
            "kinds": self.kinds,
            "lengths": self.lengths,
            "depths": self.depths,
            "trials": self.trials,
            "seed": self.seeds[0],
        }

    def examples(self) -> list[Example]:
        """Every kind at every length and depth.

        Raises:
            DataError: a text is too short for what has to be hidden in it.
        """
        return [
            Example(
                name, f"{kind}, {length:,} tokens, depth {depth:g} %", name, self._trial(kind, length, depth, number)
            )
            for kind in self.kinds
            for length in self.lengths
            for depth in self.depths
            for number in range(self.trials)
            for name in (f"{kind}-{length}-{depth:g}-{number:04d}",)
        ]

    def _trial(self, kind: str, length: int, depth: float, number: int) -> Trial:
        # a seed of its own: a trial does not depend on which others are made beside it
        random = np.random.default_rng([self.seeds[0], *kind.encode(), length, round(1000 * depth), number])
        facts = draw_facts(kind, random)
        count = length // self.haystack.window
        first = int(random.integers(len(self.haystack.ids) - count + 1))
        hidden = self._hide(facts, length, depth, random)
        question = tuple(_tokens(self.tokenizer, facts.question))
        options = tuple(tuple(_tokens(self.tokenizer, option)) for option in facts.options)
        return Trial(length, first, hidden, question, options)

    def _hide(
        self, facts: Facts, length: int, depth: float, random: np.random.Generator
    ) -> tuple[tuple[int, Tokens], ...]:
        """The fact asked for at its depth, give or take half a segment; all else anywhere."""
        asked, *rest = [tuple(_tokens(self.tokenizer, sentence)) for sentence in (*facts.asked, *facts.others)]
        everything, half = sum(map(len, (asked, *rest))), self.haystack.window // 2
        if 2 * everything > length:
            raise DataError(
                f"a text of {length} tokens is too short to hide {everything} tokens in ({facts.kind}); "
                "use longer --lengths"
            )
        target = round(depth / 100 * (length - len(asked))) + int(random.integers(-half, half + 1))
        hidden = [(min(max(target, 0), length - len(asked)), asked)]
        for sentence in rest:
            free = np.ones(length - len(sentence) + 1, dtype=bool)
            for position, tokens in hidden:
                free[max(0, position - len(sentence) + 1) : position + len(tokens)] = False
            hidden.append((int(random.choice(np.flatnonzero(free))), sentence))
        return tuple(hidden)

    def prompt(self, example: Example, asker: Asker) -> Prompt:
        trial = example.item
        if asker.reads_memory:
            return Prompt((trial.question,), trial.options, memory=_Hidden(self, trial))
        return Prompt(((*trial.text(self.haystack, asker.window), *trial.question),), trial.options)

    def measure(self, example: Example, prompt: Prompt, answer: Answer) -> dict[str, float]:
        """``exact``: every token of the true answer is the model's first choice, so that greedy decoding writes it."""
        (scored,) = answer.scored
        return {"exact": 100.0 * scored.greedy[0], "choice": 100.0 * (scored.best == 0)}

    def encoded(self, model: Any) -> EncodedText:
        """The text as this model encodes it; kept until another model asks."""
        if self._encoded is None or self._encoded.model is not model:
            self._encoded = None  # not two of them at a time
            ids = torch.from_numpy(self.haystack.ids)
            with Progress("reading the text into memory", len(ids), "segments") as progress:
                self._encoded = EncodedText(model, ids, lambda done: progress.advance())
        return self._encoded


class _Hidden:
    """The memory of a trial; see ``LongText``.

    A segment's keys and values depend on that segment alone. So the text is encoded once, and for a trial only the
    segments in which something is hidden are encoded again.
    """

    def __init__(self, task: NeedleTask, trial: Trial) -> None:
        self.task, self.trial = task, trial
        self.digest = digest_of(task._digest, trial.length, trial.first, trial.hidden)

    def open(self, asker: Asker) -> AbstractContextManager[Memory]:
        trial, haystack = self.trial, self.task.haystack
        count, changed = trial.length // haystack.window, trial.changed(haystack)
        return self.task.encoded(asker.model).holding(trial.first, count, changed, asker.memory_size)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
