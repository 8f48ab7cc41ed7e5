"""ChapterBreak: which of six beginnings follows a long prefix that ends at a chapter's end (Sun, Thai and Iyyer 2022).

Paper, section on long-context understanding; protocol of the dataset's authors: the beginning of highest likelihood
wins, suffixes are cut to 128 tokens, prefixes lose their left end.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from longmem.errors import ConfigError
from longmem.evaluation.asking import Asker, Choice, Scored
from longmem.evaluation.task import Example, Metric, digest_of, numbered
from longmem.evaluation.tasks.chapterbreak_data import ChapterBreakFile, Item, files_for
from longmem.evaluation.tasks.shots import Tokens, encode_after, start_tokens

BETWEEN = "\n\n"  # between a prefix and a suffix, the same for all suffixes
BATCH = 32  # examples that are tokenized and asked together
ACCURACY, PER_TOKEN, GOLD = "accuracy", "accuracy_per_token", "gold_nats"


@dataclass(frozen=True)
class ChapterBreakSettings:
    """How an example is asked.

    Attributes:
        prefixes: tokens before the boundary, the nearest ones.
        suffix: tokens of a suffix, the first ones.
        limit: examples of each split, drawn with ``seed``, the same for every prefix; None is all.
        seed: of that draw.

    Raises:
        ConfigError: lists every setting that breaks a rule.
    """

    prefixes: tuple[int, ...] = (4096, 6144, 8192)
    suffix: int = 128
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not self.prefixes or min(self.prefixes) < 1 or len(set(self.prefixes)) < len(self.prefixes):
            problems.append(
                f"prefix ({','.join(map(str, self.prefixes))}) must be different numbers from 1 up; try 4k,8k"
            )
        if self.suffix < 1:
            problems.append(f"suffix tokens ({self.suffix}) must be at least 1; the authors' is 128")
        if self.limit is not None and self.limit < 1:
            problems.append(f"limit ({self.limit}) must be at least 1; leave it out to take all")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True)
class ChapterBreakExample(Example):
    """One boundary behind a prefix of so many tokens."""

    prefix: int
    item: Item = field(repr=False)


class ChapterBreakTask:
    """Six-way suffix identification; see ``longmem.evaluation.task.Task``.

    Groups are a split and a prefix length, units are works. A system that sees no more than its window is asked once
    for all prefixes that are at least as long, since they are the same to it.

    Args:
        files: from ``read_chapterbreak``; for a prefix those are taken whose own are just long enough.
        tokenizer: of all systems.
        settings: default if None.

    Raises:
        ConfigError: no file has prefixes so long, or two that are taken for one prefix have the same work.
    """

    name = "chapterbreak"

    def __init__(
        self, files: Sequence[ChapterBreakFile], tokenizer: Any, settings: ChapterBreakSettings | None = None
    ) -> None:
        names = numbered([file.name for file in files])
        self.files = [replace(file, name=name) for file, name in zip(files, names, strict=True)]
        self.tokenizer = tokenizer
        self.chosen = settings or ChapterBreakSettings()
        self.start = start_tokens(tokenizer)
        taken = {prefix: files_for(self.files, prefix) for prefix in self.chosen.prefixes}
        for found in taken.values():
            _refuse_works_that_come_twice(found)
        self.taken = {prefix: [file.name for file in found] for prefix, found in taken.items()}
        self._examples = [example for prefix, found in taken.items() for example in self._examples_of(prefix, found)]
        options = {len(example.item.options) for example in self._examples}
        chance = 100 / options.pop() if len(options) == 1 else None
        self.metrics = (
            Metric(ACCURACY, "accuracy by likelihood", "%", chance=chance),
            Metric(PER_TOKEN, "accuracy by likelihood per token", "%", chance=chance),
            Metric(GOLD, "true suffix, per token", "nats", "lower"),
        )

    def settings(self) -> dict[str, Any]:
        return {
            "files": {file.name: {"sha256": file.sha256, "examples": len(file.items)} for file in self.files},
            "file_of_prefix": {str(prefix): names for prefix, names in self.taken.items()},
            "prefixes": list(self.chosen.prefixes),
            "suffix_tokens": self.chosen.suffix,
            "limit": self.chosen.limit,
            "seed": self.chosen.seed,
        }

    def examples(self) -> list[ChapterBreakExample]:
        return self._examples

    def answer(self, asker: Asker, examples: Sequence[ChapterBreakExample]) -> Iterator[tuple[int, dict[str, float]]]:
        """Accuracies (0 or 100) and the likelihood of the true suffix."""
        same: dict[tuple[str, str, int, int], list[int]] = {}
        for number, example in enumerate(examples):
            item = example.item
            seen = example.prefix if asker.reads_memory else min(example.prefix, asker.window)
            same.setdefault((item.split, item.work, item.number, seen), []).append(number)
        asked = list(same.values())
        for at in range(0, len(asked), BATCH):
            batch = asked[at : at + BATCH]
            questions = [self.question(examples[numbers[0]]) for numbers in batch]
            for which, scored in asker.score(questions):
                values = measure(scored, questions[which].options)
                yield from ((number, values) for number in batch[which])

    def question(self, example: ChapterBreakExample) -> Choice:
        """The last tokens of the prefix, and the first of each suffix."""
        return Choice(self._prefix(example), self._suffixes(example.item))

    def _prefix(self, example: ChapterBreakExample) -> Tokens:
        text = example.item.context.rstrip() + BETWEEN
        if getattr(self.tokenizer, "is_fast", False):
            # with a word behind it, since a line end is another token where the text ends
            encoded = self.tokenizer(text + "The", add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            inside = [start < len(text) for start, _ in encoded["offset_mapping"]]
            ids = [token for token, mine in zip(encoded["input_ids"], inside, strict=True) if mine]
        else:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return (*self.start, *ids[-example.prefix :])

    def _suffixes(self, item: Item) -> list[Tokens]:
        found = encode_after(self.tokenizer, BETWEEN, [option.strip() for option in item.options])
        return [ids[: self.chosen.suffix] for ids in found]

    def _examples_of(self, prefix: int, files: Sequence[ChapterBreakFile]) -> Iterator[ChapterBreakExample]:
        splits: dict[str, list[Item]] = {}
        for file in files:
            for item in file.items:
                splits.setdefault(item.split, []).append(item)
        for split, items in splits.items():
            if self.chosen.limit is not None and self.chosen.limit < len(items):
                drawn = random.Random(f"{self.chosen.seed} {split}").sample(range(len(items)), self.chosen.limit)
                items = [items[number] for number in sorted(drawn)]
            for item in items:
                yield ChapterBreakExample(
                    id=f"{split}/{item.work}/{item.number}, {prefix}",
                    # the suffixes' ids tell tokenizers apart
                    digest=digest_of(prefix, item.context, self._suffixes(item)),
                    group=f"{split}, {_short(prefix)}",
                    unit=f"{split}/{item.work}",
                    prefix=prefix,
                    item=item,
                )


def _refuse_works_that_come_twice(files: Sequence[ChapterBreakFile]) -> None:
    """Examples are told apart by split, work and number: those of another file would get each other's answers."""
    seen: dict[tuple[str, str], ChapterBreakFile] = {}
    for file in files:
        for item in file.items:
            other = seen.setdefault((item.split, item.work), file)
            if other is not file:
                raise ConfigError(
                    f"{other.name} and {file.name} are both taken for a prefix and have the same work ({item.split}, "
                    f"{item.work}); give one of them, or one with another name of the split"
                )


def measure(scored: Scored, options: Sequence[Sequence[int]]) -> dict[str, float]:
    """Whether the first option wins, by summed log-likelihood and per token; as the authors' script, it wins a tie."""
    each = [logprob / len(option) for logprob, option in zip(scored.logprobs, options, strict=True)]
    return {
        ACCURACY: 100.0 * (scored.logprobs[0] >= max(scored.logprobs)),
        PER_TOKEN: 100.0 * (each[0] >= max(each)),
        GOLD: -each[0],
    }


def _short(tokens: int) -> str:
    return f"{tokens >> 10}k" if tokens % 1024 == 0 else str(tokens)
