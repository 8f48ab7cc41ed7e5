"""ChapterBreak: which of six beginnings follows a long prefix that ends at a chapter's end (Sun, Thai and Iyyer 2022).

Paper, section on long-context understanding. As in the authors' script the likeliest beginning wins, suffixes are cut
to 128 tokens, and prefixes lose their left end.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from longmem.errors import ConfigError, DataError
from longmem.evaluation.asking import Answer, Asker, Prompt, Tokens
from longmem.evaluation.documents import start_tokens
from longmem.evaluation.results import Json
from longmem.evaluation.task import Example, Metric, Task, different, drawn, numbered, of_form
from longmem.evaluation.tasks.shots import encode_after

BETWEEN = "\n\n"  # between a prefix and a suffix, the same for all suffixes


class Item(NamedTuple):
    """A chapter boundary: its split, its work and its number there, the text before it, and beginnings of chapters, the
    first of which is the true one."""

    split: str
    work: str
    number: int
    context: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class ChapterBreakFile:
    """A file and what is in it; ``prefix``: tokens of its prefixes, by its name, None if that does not say."""

    name: str
    prefix: int | None
    sha256: str
    items: list[Item] = field(repr=False)


def read_chapterbreak(path: str | Path) -> ChapterBreakFile:
    """Read ``chapterbreak_ctx_<N>.json``: split -> work -> examples, each with ``ctx``, ``pos`` and ``negs``.

    Raises:
        DataError: no such file, or something in it is not of that form; says what and where.
    """
    path, items = Path(path), []
    form = 'ChapterBreak\'s form, {split: {work: [{"ctx", "pos", "negs"}, ...]}}'
    with of_form(path, form, "name a chapterbreak_ctx_<N>.json file, or make it again") as where:
        raw = path.read_bytes()
        for split, works in json.loads(raw).items():
            for work, examples in works.items():
                for number, one in enumerate(examples):
                    where.append(f"{split}, work {work}, example {number + 1}")
                    texts = (one["ctx"], one["pos"], *one["negs"])
                    if len(texts) < 3 or not all(isinstance(text, str) and text.strip() for text in texts):
                        raise ValueError("ctx, pos and negs must be texts, none of them empty")
                    items.append(Item(split, work, number, texts[0], texts[1:]))
    if not items:
        raise DataError(f"{path}: no examples in it; fetch or make the file again")
    length = re.search(r"_ctx_(\d+)\.json$", path.name)
    return ChapterBreakFile(path.name, length and int(length[1]), hashlib.sha256(raw).hexdigest(), items)


def files_for(files: Sequence[ChapterBreakFile], prefix: int) -> list[ChapterBreakFile]:
    """Those whose prefixes are long enough, the shortest of them, all of a length together; and those that do not say.

    Raises:
        ConfigError: none is long enough.
    """
    lengths = {file.prefix for file in files if file.prefix is not None}
    shortest = min((length for length in lengths if length >= prefix), default=None)
    found = [file for file in files if file.prefix in (None, shortest)]
    if not found:
        raise ConfigError(
            f"--prefix {prefix} is longer than the prefixes of the files ({max(lengths)} tokens, by their names); "
            "give a file with longer ones, or a smaller --prefix"
        )
    return found


class ChapterBreakTask(Task):
    """Six-way suffix identification. Groups are a split and a prefix length, units are works.

    Args:
        files: from ``read_chapterbreak``; for a prefix those are taken whose own are just long enough.
        prefixes: tokens before the boundary, the nearest ones.
        suffix_tokens: of a suffix, the first ones.
        limit: examples of each split, drawn with ``seed``, the same for every prefix; None is all.

    Raises:
        ConfigError: no file has prefixes so long.
    """

    name = "chapterbreak"

    def __init__(
        self,
        files: Sequence[ChapterBreakFile],
        tokenizer: Any,
        prefixes: Sequence[int] = (4096, 6144, 8192),
        suffix_tokens: int = 128,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        different(prefix=prefixes)
        names = numbered([file.name for file in files])
        self.files = [replace(file, name=name) for file, name in zip(files, names, strict=True)]
        self.taken = {prefix: files_for(self.files, prefix) for prefix in prefixes}
        self.tokenizer, self.suffix_tokens, self.limit, self.seeds = tokenizer, suffix_tokens, limit, (seed,)
        self.start = start_tokens(tokenizer)
        options = {len(item.options) for files in self.taken.values() for file in files for item in file.items}
        chance = 100 / options.pop() if len(options) == 1 else None
        self.metrics = (
            Metric("accuracy", "accuracy by likelihood", "%", chance=chance),
            Metric("accuracy_per_token", "accuracy by likelihood per token", "%", chance=chance),
            Metric("gold_nats", "true suffix, per token", "nats", "lower"),
        )

    def settings(self) -> Json:
        return {
            "files": {file.name: {"sha256": file.sha256, "examples": len(file.items)} for file in self.files},
            "file_of_prefix": {str(prefix): [file.name for file in files] for prefix, files in self.taken.items()},
            "prefixes": list(self.taken),
            "suffix_tokens": self.suffix_tokens,
            "limit": self.limit,
            "seed": self.seeds[0],
        }

    def examples(self) -> list[Example]:
        return [example for prefix in self.taken for example in self._examples(prefix)]

    def _examples(self, prefix: int) -> Iterator[Example]:
        splits: dict[str, list[Item]] = {}
        for file in self.taken[prefix]:
            for item in file.items:
                splits.setdefault(item.split, []).append(item)
        short = f"{prefix >> 10}k" if prefix % 1024 == 0 else str(prefix)
        for split, items in splits.items():
            for number in drawn(f"{self.seeds[0]} {split}", len(items), self.limit):
                unit = f"{split}/{items[number].work}"
                name = f"{unit}/{items[number].number}, {prefix}"
                yield Example(name, f"{split}, {short}", unit, (prefix, items[number]))

    def prompt(self, example: Example, asker: Asker) -> Prompt:
        """The last tokens of the prefix, and the first of each suffix."""
        prefix, item = example.item
        suffixes = encode_after(self.tokenizer, BETWEEN, [option.strip() for option in item.options])
        context = (*self.start, *self._tokens(item.context.rstrip() + BETWEEN)[-prefix:])
        return Prompt((context,), tuple(ids[: self.suffix_tokens] for ids in suffixes))

    def _tokens(self, text: str) -> Tokens:
        """As they are with a word after them, since a line end is another token where the text ends."""
        if not getattr(self.tokenizer, "is_fast", False):
            return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        encoded = self.tokenizer(text + "The", add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return tuple(token for token, (start, _) in pairs if start < len(text))

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
