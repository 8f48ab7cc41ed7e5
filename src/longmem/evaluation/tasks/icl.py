"""Memory-augmented in-context learning: label short texts after demonstrations in the window and in memory.

Paper, section "in-context learning"; scored as the released script does, and by likelihood of the labels with and
without contextual calibration (Zhao et al. 2021, "Calibrate Before Use"). The sets are the five of the paper, and two
with so many classes that their demonstrations fit no window. Demonstrations come first here, those of SQuAD too.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice, product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from longmem.chat import PlainTexts, Recall
from longmem.data.tokens import start_tokens
from longmem.errors import ConfigError, DataError
from longmem.evaluation.asking import Answer, Asker, Prompt, Tokens, encode_after
from longmem.evaluation.results import Bootstrap, Json
from longmem.evaluation.tasks import Example, Metric, Source, Task, drawn, group_scores, lines_of, read_source


class Asked(NamedTuple):
    """A question behind demonstrations, as token ids.

    Attributes:
        local: demonstrations for the window, the last nearest to the question.
        found: those of memory that text search finds for the question, the best last; for systems ``+recall``.
        memory: demonstrations for memory, the last newest.
        queries: the question first, then what takes its place to calibrate.
        options: to score; without any ``new_tokens`` are generated.
        right: number of the true option.
    """

    local: Sequence[Tokens]
    memory: Sequence[Tokens]
    queries: Sequence[Tokens]
    options: tuple[Tokens, ...] = ()
    new_tokens: int = 0
    right: int = 0
    found: Sequence[Tokens] = ()


class LaidOut(NamedTuple):
    """Every query behind the demonstrations that fit. How many of them are of ``local``, how many of ``memory`` are in
    memory or in a full context; tokens of the question that did not fit (``cut``)."""

    contexts: tuple[Tokens, ...]
    local: int
    memory: int
    cut: int


def lay_out(asked: Asked, asker: Asker, start: Tokens) -> LaidOut:
    """What is in the window before the answer; demonstrations are whole or left out, the farthest ones first.

    Any query fits behind the demonstrations; it loses its beginning where it does not fit even alone. In a full context
    demonstrations of memory are in front of those of the window.

    Raises:
        ConfigError: there is no room for a query.
    """
    after = max(map(len, asked.options), default=1) - 1 + asked.new_tokens  # the last token of an option is no input
    room = asker.window - after - len(start)
    if room < 1:
        raise ConfigError(f"window ({asker.window}) has no room for a question beside {after} tokens of answer")
    shown = [query[-room:] for query in asked.queries]
    room -= max(map(len, shown))
    near = fitting(asked.local, room)
    local = asked.local[len(asked.local) - near :]
    room -= sum(map(len, local))
    far = fitting(asked.memory, room) if asker.whole and near == len(asked.local) else 0
    before = (*start, *chain.from_iterable((*asked.memory[len(asked.memory) - far :], *local)))
    held = fitting(asked.memory, asker.memory_size or 0)
    return LaidOut(tuple((*before, *query) for query in shown), near, far + held, len(asked.queries[0]) - len(shown[0]))


def fitting(texts: Sequence[Tokens], room: int) -> int:
    """How many of the last texts have at most ``room`` tokens together."""
    return sum(total <= room for total in accumulate(map(len, reversed(texts))))


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


@dataclass(eq=False, kw_only=True)
class ShotsTask(Task):
    """Questions (items are ``Asked``) after demonstrations, which are the same for every system. What is drawn for the
    window is not in memory; systems named ``+recall`` also have some of memory's in their window. The last part of a
    group's name says how many: ``4 + 200``. Draws are numbered from 1.
    """

    draws: int

    @property
    def seeds(self) -> Sequence[int]:
        return range(1, self.draws + 1)

    def begin(self, askers: Sequence[Asker]) -> Sequence[Asker]:
        self._laid: dict[tuple[str, str], list[tuple[int, int, int, int]]] = {}
        return super().begin(askers)

    def prompt(self, example: Example, asker: Asker) -> Prompt:
        asked, start = example.item, start_tokens(self.tokenizer)
        if asker.recall:
            asked = asked._replace(local=(*asked.local, *asked.found))
        laid = lay_out(asked, asker, start)
        self._laid.setdefault((example.group, asker.name), []).append((*laid[1:], len(asked.local)))
        memory = (*start, *chain.from_iterable(asked.memory)) if asked.memory and asker.reads_memory else ()
        return Prompt(laid.contexts, asked.options, asked.new_tokens, memory)

    def finish(self, result: Json, examples: Sequence[Example], bootstrap: Bootstrap) -> None:
        """``extra`` has ``shots``: group -> system -> means of what ``LaidOut`` counts."""
        shots: Json = {}
        result["extra"] = {"shots": shots}
        for (group, system), laid in self._laid.items():
            numbers = np.mean(laid, axis=0).round(2).tolist()[:3]
            shots.setdefault(group, {})[system] = dict(zip(("window", "memory", "cut"), numbers, strict=True))

    def notes(self, result: Json) -> Iterator[str]:
        """What of demonstrations and questions did not fit, where something did not."""
        for (group, system), laid in self._laid.items():
            window, memory, cut, wanted = np.mean(laid, axis=0).round(2)
            if window < wanted or 0 < memory < int(shots_of(group).split(" + ")[1]) or cut:
                yield (
                    f"{group}, {system}: on average {window:g} demonstrations fit the window, {memory:g} are in "
                    f"memory, and {cut:g} tokens of the question are cut"
                )


def shots_of(group: str) -> str:
    """The numbers of demonstrations in the name of a group."""
    return group.rpartition(", ")[2]


# labelled sets


class Kind(NamedTuple):
    """Of a set: its folder, the files to show and to ask, its classes, the template's words before a text and a label.

    Files are those of ``data/icl/original`` in the released code, and as its script has it the dev files of SST-2 and
    SST-5 are asked. Without ``labels`` the files name the class of every text.
    """

    folder: str
    train: str = "train.csv"
    test: str = "test.csv"
    labels: tuple[str, ...] = ("negative", "positive")
    words: tuple[str, str] = ("Review:", "Sentiment:")

    def asked(self, text: str) -> str:
        """A text, with the space that parts it from the one before, up to where its label begins."""
        return f" {self.words[0]} {text} {self.words[1]}"


FIVE = ("terrible", "bad", "okay", "good", "great")
INTENT = ("Request:", "Intent:")
KINDS = {
    "sst2": Kind("SST-2", "train.tsv", "dev.tsv"),
    "mr": Kind("mr"),
    "subj": Kind("subj", labels=("subjective", "objective"), words=("Input:", "Type:")),
    "sst5": Kind("sst-5", "stsa.fine.train", "stsa.fine.dev", FIVE),
    "mpqa": Kind("mpqa"),
    "banking77": Kind("icl_banking77", labels=(), words=INTENT),
    "clinc150": Kind("icl_clinc150", "data_full.json.gz", "data_full.json.gz", (), INTENT),
}


class Labelled(NamedTuple):
    """A text and the name of its class."""

    text: str
    label: str


class IclSet(NamedTuple):
    """A set as it is used: names of classes in label order, texts to show and texts to ask, neither empty.

    No text of ``train`` is there twice or tested. ``source``: the files, and how many texts were left out.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    train: tuple[Labelled, ...]
    test: tuple[Labelled, ...]
    source: Json


def read_icl(folder: str | Path, name: str) -> IclSet:
    """Read one of ``KINDS`` from a folder with one subfolder for each (``SST-2``, ``mr``, ``subj``, ``sst-5`` ...).

    Raises:
        DataError: a file is missing, or a line is not what its format says; names file and line.
    """
    kind = KINDS[name]
    place = Path(folder) / kind.folder
    train, test = read_labelled(place / kind.train, kind.labels), read_labelled(place / kind.test, kind.labels, "test")
    labels = kind.labels or tuple(sorted({each.label for each in train.items}))
    asked = tuple(each for each in test.items if each.text and each.label in labels)
    taken, usable = {each.text for each in asked}, dict[str, Labelled]()
    for each in train.items:
        if each.text and each.text not in taken:
            usable.setdefault(each.text, each)
    if not usable or not asked:
        raise DataError(f"{place}: {len(usable)} texts to show and {len(asked)} to ask; both need some")
    source = {
        "train": train.about() | {"left_out": len(train.items) - len(usable)},  # empty, there twice, or tested
        "test": test.about() | {"left_out": len(test.items) - len(asked)},  # empty, or of a class that is not shown
    }
    return IclSet(name, kind, labels, tuple(usable.values()), asked, source)


def read_labelled(path: Path, labels: Sequence[str] = (), part: str = "train") -> Source:
    """Every ``Labelled`` text of a file, empty ones too, in any of the forms in which these sets are published.

    A ``.gz`` is JSON with lists of text and class, of which ``part`` is read; ``text,category`` heads a CSV file of
    such lines, ``sentence<TAB>label`` a file of those. Any other ``.csv`` has ``label,text`` without a heading, any
    other file ``label<space>text``.

    Args:
        labels: names of the classes that the file numbers from 0; without them it names the classes itself.

    Raises:
        DataError: no such file, or a line without label or with one that is not known.
    """

    names = dict(enumerate(labels))

    def parse(raw: bytes, where: list[str]) -> Iterator[Labelled]:
        for number, record in enumerate(records(raw), 1):
            where.append(f"text {number} ({str(record)[:60]})")
            text, label = record
            if names:
                yield Labelled(text.strip(), names[int(label)])
            else:
                yield Labelled(" ".join(text.split()), label.replace("_", " "))

    def records(raw: bytes) -> Iterable[Sequence[str]]:
        if path.suffix == ".gz":
            pairs: list[tuple[str, str]] = json.loads(gzip.decompress(raw))[part]
            return pairs
        lines = [line for line in lines_of(raw) if line]
        if lines[:1] == ["sentence\tlabel"]:
            return (line.rsplit("\t", 1) for line in lines[1:])
        if path.suffix == ".csv":
            rows = csv.reader(f"{line}\n" for line in lines)
            return islice(rows, 1, None) if lines[:1] == ["text,category"] else (row[::-1] for row in rows)
        return (line.split(" ", 1)[::-1] for line in lines)

    form = f"text with a label from 0 to {len(labels) - 1}" if labels else "what is published"
    return read_source(path, form, "fetch the file again", parse)


CONTENT_FREE = ("N/A", "[MASK]", "")  # of Zhao et al.; their label probabilities are averaged
MOST_CALIBRATED = 20  # classes; with more of them each content-free text would cost as much as the question


@dataclass(eq=False, kw_only=True)
class IclTask(ShotsTask):
    """In-context learning over some sets. Groups are a set and its demonstrations, units are texts."""

    name = "icl"
    metrics = (
        Metric("first_token", "accuracy, first token is a prefix of the label", "%"),
        Metric("likelihood", "accuracy by label likelihood", "%"),
        Metric("calibrated", "accuracy by calibrated label likelihood", "%"),  # uncalibrated where classes are many
    )
    data: str
    datasets: Sequence[str]
    local_shots: Sequence[int]
    memory_shots: Sequence[int]
    limit: int | None
    recall: int = 0

    def __post_init__(self) -> None:
        if unknown := set(self.datasets) - KINDS.keys():
            raise ConfigError(f"datasets ({','.join(sorted(unknown))}) must be some of {', '.join(KINDS)}")
        self.sets = [read_icl(self.data, name) for name in self.datasets]

    def source(self) -> Json:
        return {
            "sets": {data.name: data.source for data in self.sets},
            "test_texts": "drawn without replacement, not stratified, the same for all seeds and systems",
            "templates": {data.name: f"{data.kind.asked('{text}')} {{label}}." for data in self.sets},
            "content_free": list(CONTENT_FREE),
        }

    def examples(self) -> list[Example]:
        """Every chosen test text, for every seed and every number of demonstrations.

        Raises:
            DataError: a set has too few training texts.
        """
        return [example for data in self.sets for example in self._examples(data)]

    def _examples(self, data: IclSet) -> Iterator[Example]:
        reader, kind, free = self.tokenizer, data.kind, CONTENT_FREE if len(data.labels) <= MOST_CALIBRATED else ()
        options = tuple(encode_after(reader, kind.words[1], [f" {label}" for label in data.labels]))
        known = encode_after(reader, ".", [f"{kind.asked(text)} {label}." for text, label in data.train])
        chosen = drawn(f"{data.name} test", len(data.test), self.limit)
        texts = (*free, *(data.test[n].text for n in chosen))
        queries = encode_after(reader, ".", [kind.asked(text) for text in texts])
        for seed, memory in product(self.seeds, self.memory_shots):
            _, far = draw(data.name, seed, len(data.train), 0, memory)
            search = Recall(PlainTexts({str(n): data.train[n].text for n in far}), "")
            found = [[known[n] for n in nearest(search, data.test[test].text, self.recall)] for test in chosen]
            for local in self.local_shots:
                near, far = draw(data.name, seed, len(data.train), local, memory)
                shots, said = ([known[n] for n in near], [known[n] for n in far]), f"{local} + {memory}"
                for n, query, best in zip(chosen, queries[len(free) :], found, strict=True):
                    unit, label = f"{data.name}/{n}", data.test[n].label
                    right = data.labels.index(label)
                    asked = Asked(*shots, [query, *queries[: len(free)]], options, right=right, found=best)
                    about = f"{data.name}, {said}", unit, asked, {"expected": label}, seed
                    yield Example(f"{unit}, {said}, seed {seed}", *about)

    def measure(self, example: Example, prompt: Prompt, answer: Answer) -> dict[str, float]:
        """Each 0 or 100; of equal scores the first label is taken."""
        right, (scored, *free) = example.item.right, answer.scored
        corrected = calibrated(scored.logprobs, [each.logprobs for each in free])
        return {
            "first_token": 100.0 * starts_label(self.tokenizer.decode([scored.next_token]), example.gold["expected"]),
            "likelihood": 100.0 * (scored.best == right),
            "calibrated": 100.0 * (int(np.argmax(corrected)) == right),
        }

    def finish(self, result: Json, examples: Sequence[Example], bootstrap: Bootstrap) -> None:
        """With ``average, 20 + 2000`` groups, in which every set has the same weight; examples averaged over seeds.

        ``extra`` also has ``per_seed`` (group -> seed -> system -> metric -> value) and ``sets`` (chance and largest
        class in %).
        """
        super().finish(result, examples, bootstrap)
        values, sizes = [one["values"] for one in result["examples"]], Counter(each.group for each in examples)
        for said in dict.fromkeys(map(shots_of, sizes)) if len(self.sets) > 1 else ():
            some = [n for n, each in enumerate(examples) if shots_of(each.group) == said]
            chosen, of_chosen = [examples[n] for n in some], [values[n] for n in some]
            weights, name = [1 / sizes[each.group] for each in chosen], f"average, {said}"
            result["groups"].append(group_scores(name, chosen, of_chosen, self.metrics, bootstrap, weights=weights))
        result["examples"] = [
            {"id": f"{unit}, {shots_of(group)}", "group": group, "unit": unit, "values": mean}
            for (group, unit), mean in means(lambda each: (each.group, each.unit), examples, values).items()
        ]
        per_seed: Json = {}
        result["extra"]["per_seed"] = per_seed
        for (group, seed), mean in means(lambda each: (each.group, each.seed), examples, values).items():
            per_seed.setdefault(group, {})[seed] = mean
        about = result["extra"]["sets"] = {}
        for data in self.sets:
            largest = max(Counter(each.label for each in data.test).values())
            about[data.name] = {"chance": 100 / len(data.labels), "majority": round(100 * largest / len(data.test), 2)}


def means(part: Callable[[Example], Hashable], examples: Sequence[Example], values: Sequence[Json]) -> dict[Any, Json]:
    """part (a text, a seed) -> system -> metric -> mean over the examples that are of this part."""
    parts: dict[Hashable, list[Json]] = {}
    for example, of_example in zip(examples, values, strict=True):
        parts.setdefault(part(example), []).append(of_example)
    return {
        name: {
            system: {metric: round(fmean(each[system][metric] for each in some), 2) for metric in metrics}
            for system, metrics in some[0].items()
        }
        for name, some in parts.items()
    }


def nearest(search: Recall, text: str, count: int) -> list[int]:
    """Numbers of the demonstrations that share most with a text, the best last; at most ``count``."""
    passages = search.search(text, 4 * count)  # a long demonstration is several
    return [int(name) for name in dict.fromkeys(each.document for each in passages)][:count][::-1]


def starts_label(first: str, label: str) -> bool:
    """The released script's rule: the first token, stripped, is not empty and the label begins with it."""
    return bool(first.strip()) and label.startswith(first.strip())


def calibrated(logprobs: Sequence[float], content_free: Sequence[Sequence[float]]) -> list[float]:
    """Log-probabilities of the labels in nats, each divided by what the label gets where there is nothing to judge.

    Zhao et al. 2021, equation 1 with W = diag(p)^-1 and b = 0, where p is the mean, over content-free texts, of the
    label probabilities, which sum to 1 for each text. The result is not normalised; without texts nothing is corrected.
    """
    if not content_free:
        return list(logprobs)
    rows = np.array(content_free)
    weights = np.exp(rows - rows.max(axis=1, keepdims=True))
    prior = (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0)
    # a label that nothing makes likely has no prior to divide by: the smallest number stands for it
    return [value - math.log(max(share, 1e-300)) for value, share in zip(logprobs, prior.tolist(), strict=True)]
