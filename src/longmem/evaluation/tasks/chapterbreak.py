"""ChapterBreak: which of six beginnings follows a long prefix that ends at a chapter's end (Sun, Thai and Iyyer 2022).

Paper, section on long-context understanding. As in the authors' script the likeliest beginning wins, suffixes are cut
to 128 tokens, and prefixes lose their left end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from longmem.errors import ConfigError
from longmem.evaluation.asking import Answer, Asker, Prompt, encode, encode_after, start_tokens
from longmem.evaluation.results import Json
from longmem.evaluation.tasks import Example, Metric, Source, Task, drawn, read_source

BETWEEN = "\n\n"  # between a prefix and a suffix, the same for all suffixes


class Item(NamedTuple):
    """A chapter boundary: its split, its work and its number there, the text before it, and beginnings of chapters, the
    first of which is the true one."""

    split: str
    work: str
    number: int
    context: str
    options: tuple[str, ...]


def read_chapterbreak(path: str | Path) -> Source:
    """Read ``chapterbreak_ctx_<N>.json``: split -> work -> examples, each with ``ctx``, ``pos`` and ``negs``."""
    form = 'ChapterBreak\'s form, {split: {work: [{"ctx", "pos", "negs"}, ...]}}'
    return read_source(path, form, "name a chapterbreak_ctx_<N>.json file, or make it again", _items)


def _items(splits: Any, where: list[str]) -> Iterator[Item]:
    for split, works in splits.items():
        for work, examples in works.items():
            for number, one in enumerate(examples):
                where.append(f"{split}, work {work}, example {number + 1}")
                texts = (one["ctx"], one["pos"], *one["negs"])
                if len(texts) < 3 or not all(text.strip() for text in texts):
                    raise ValueError("ctx, pos and negs must be texts, none of them empty")
                yield Item(split, work, number, texts[0], texts[1:])


@dataclass(eq=False, kw_only=True)
class ChapterBreakTask(Task):
    """Six-way suffix identification. Groups are a split and a prefix length, units are works."""

    name = "chapterbreak"
    data: str
    prefixes: Sequence[int] = (4096, 6144, 8192)
    suffix_tokens: int = 128
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.file = read_chapterbreak(self.data)
        named = re.search(r"_ctx_(\d+)\.json$", self.file.name)
        if named and int(named[1]) < max(self.prefixes):
            raise ConfigError(f"--prefix {max(self.prefixes)} is longer than the prefixes of {self.file.name}")

    @property
    def metrics(self) -> list[Metric]:
        options = {len(item.options) for item in self.file.items}
        chance = 100 / options.pop() if len(options) == 1 else None
        return [
            Metric("accuracy", "accuracy by likelihood", "%", chance=chance),
            Metric("accuracy_per_token", "accuracy by likelihood per token", "%", chance=chance),
            Metric("gold_nats", "true suffix, per token", "nats", "lower"),
        ]

    def source(self) -> Json:
        return self.file.about()

    def examples(self) -> list[Example]:
        """Items are a prefix length and an ``Item``."""
        splits: dict[str, list[Item]] = {}
        for item in self.file.items:
            splits.setdefault(item.split, []).append(item)
        found = []
        for prefix in self.prefixes:
            short = f"{prefix >> 10}k" if prefix % 1024 == 0 else str(prefix)
            for split, items in splits.items():
                for item in (items[n] for n in drawn(f"{self.seed} {split}", len(items), self.limit)):
                    unit = f"{split}/{item.work}"
                    name = f"{unit}/{item.number}, {prefix}"
                    found.append(Example(name, f"{split}, {short}", unit, (prefix, item)))
        return found

    def prompt(self, example: Example, asker: Asker) -> Prompt:
        """The last tokens of the prefix, and the first of each suffix."""
        prefix, item = example.item
        suffixes = encode_after(self.tokenizer, BETWEEN, [option.strip() for option in item.options])
        before = item.context.rstrip() + BETWEEN
        # as they are with a word after them, since a line end is another token where the text ends
        tokens, word = encode(self.tokenizer, before + "The"), encode(self.tokenizer, "The")
        tokens = tokens[: -len(word)] if tokens[-len(word) :] == word else encode(self.tokenizer, before)
        context = (*start_tokens(self.tokenizer), *tokens[-prefix:])
        return Prompt((context,), tuple(ids[: self.suffix_tokens] for ids in suffixes))

    def measure(self, example: Example, prompt: Prompt, answer: Answer) -> dict[str, float]:
        """Whether the first option wins, by summed log-likelihood and per token; as in the authors' script also a tie
        counts as right."""
        (scored,) = answer.scored
        each = [logprob / len(option) for logprob, option in zip(scored.logprobs, prompt.options, strict=True)]
        return {
            "accuracy": 100.0 * (scored.logprobs[0] >= max(scored.logprobs)),
            "accuracy_per_token": 100.0 * (each[0] >= max(each)),
            "gold_nats": -each[0],
        }
