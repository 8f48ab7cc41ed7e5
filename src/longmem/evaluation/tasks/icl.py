"""Memory-augmented in-context learning: label short texts after demonstrations in the window and in memory.

Paper, section "in-context learning"; scored as the released script does, and by likelihood of the labels with and
without contextual calibration (Zhao et al. 2021, "Calibrate Before Use"). The sets are the five of the paper, and two
with so many classes that their demonstrations fit no window. Demonstrations come first here, those of SQuAD too.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from longmem.errors import ConfigError, DataError
from longmem.evaluation.asking import Answer, Asker, Prompt, Tokens, encode_after, start_tokens
from longmem.evaluation.results import Bootstrap, Json
from longmem.evaluation.tasks import Example, Metric, Task, drawn, group_scores, read_source


class Asked(NamedTuple):
    """A question behind demonstrations, as token ids.

    Attributes:
        local: demonstrations for the window, the last nearest to the question.
        memory: demonstrations for memory, the last newest.
        queries: the question first, then what takes its place to calibrate.
        options: to score; without any ``new_tokens`` are generated.
        about: what the task knows about the question.
    """

    local: Sequence[Tokens]
    memory: Sequence[Tokens]
    queries: Sequence[Tokens]
    options: tuple[Tokens, ...] = ()
    new_tokens: int = 0
    about: Any = None


class LaidOut(NamedTuple):
    """Every query behind the demonstrations that fit; how many of them are of ``local`` and of ``memory``; tokens of
    the question that did not fit (``cut``)."""

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
    return LaidOut(tuple((*before, *query) for query in shown), near, far, len(asked.queries[0]) - len(shown[0]))


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


@dataclass(eq=False, kw_only=True)
class ShotsTask(Task):
    """Questions (items are ``Asked``) after demonstrations, which are the same for every system, and never both in the
    window and in memory. The last part of a group's name says how many: ``4 + 200``. Draws are numbered from 1.
    """

    draws: int = 1

    @property
    def seeds(self) -> Sequence[int]:
        return range(1, self.draws + 1)

    def prompt(self, example: Example, asker: Asker) -> Prompt:
        asked, start = example.item, start_tokens(self.tokenizer)
        memory = (*start, *chain.from_iterable(asked.memory)) if asked.memory and asker.reads_memory else ()
        return Prompt(lay_out(asked, asker, start).contexts, asked.options, asked.new_tokens, memory)

    def shots_seen(self, examples: Sequence[Example], askers: Sequence[Asker]) -> Json:
        """group -> system -> mean numbers of demonstrations in its ``window``, and in its ``memory`` or, of those for
        memory, in a full-context window; ``cut``: mean tokens of the question that did not fit."""
        found: Json = {}
        for example in examples:
            for asker in askers:
                laid = lay_out(example.item, asker, start_tokens(self.tokenizer))
                held = fitting(example.item.memory, asker.memory_size or 0)
                seen = (laid.local, laid.memory + held, laid.cut)
                found.setdefault(example.group, {}).setdefault(asker.name, []).append(seen)
        names = ("window", "memory", "cut")
        means: Json = leaves(found, lambda s: dict(zip(names, np.mean(s, axis=0).round(2).tolist(), strict=True)))
        return means

    def notes(self, result: Json) -> Iterator[str]:
        """What of demonstrations and questions did not fit, where something did not."""
        for group, systems in result["extra"]["shots"].items():
            local, memory = (int(number) for number in group.rpartition(", ")[2].split(" + "))
            for name, seen in systems.items():
                if seen["window"] < local or 0 < seen["memory"] < memory or seen["cut"]:
                    yield (
                        f"{group}, {name}: on average {seen['window']:g} demonstrations fit the window, "
                        f"{seen['memory']:g} are in memory, and {seen['cut']:g} tokens of the question are cut"
                    )


def means_by(examples: Sequence[Example], result: Json, part: Callable[[Example], Any], digits: int = 3) -> Json:
    """group -> system -> metric -> part (a seed, an article) -> mean over examples."""
    found: Json = {}
    for example, of_example in zip(examples, result["examples"], strict=True):
        for system, of_metrics in of_example["values"].items():
            for metric, value in of_metrics.items():
                place = found.setdefault(example.group, {}).setdefault(system, {}).setdefault(metric, {})
                place.setdefault(str(part(example)), []).append(value)
    means: Json = leaves(found, lambda numbers: round(float(np.mean(numbers)), digits))
    return means


def leaves(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Nested dicts with every value changed that is no dict."""
    return {key: leaves(inner, change) for key, inner in tree.items()} if isinstance(tree, dict) else change(tree)


# labelled sets


class Kind(NamedTuple):
    """Of a set: its folder, the files to show and to ask, its classes, the template's words before a text and a label.

    Files are those of ``data/icl/original`` in the released code, and as its script has it the dev files of SST-2 and
    SST-5 are asked: see ``read_labelled``. Without ``labels`` every text has the name of its class, in
    ``text,category`` lines below a heading, or in JSON lists ``train`` and ``test``.
    """

    folder: str
    train: str = "train.csv"
    test: str = "test.csv"
    labels: tuple[str, ...] = ("negative", "positive")
    words: tuple[str, str] = ("Review:", "Sentiment:")


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
    """A text and the number of its class."""

    text: str
    label: int


class IclSet(NamedTuple):
    """A set as it is used: names of classes in label order, texts to show and texts to ask, neither empty.

    No text of ``train`` is there twice or tested. ``source``: the files read, their hash, and how many texts were left
    out. ``words``: the template's, before a text and before a label.
    """

    name: str
    labels: tuple[str, ...]
    train: tuple[Labelled, ...]
    test: tuple[Labelled, ...]
    source: Json
    words: tuple[str, str]

    def asked(self, text: str) -> str:
        """A text, with the space that parts it from the one before, up to where its label begins."""
        return f" {self.words[0]} {text} {self.words[1]}"


def read_icl(folder: str | Path, name: str) -> IclSet:
    """Read one of ``KINDS`` from a folder with one subfolder for each (``SST-2``, ``mr``, ``subj``, ``sst-5`` ...).

    Raises:
        DataError: a file is missing, or a line is not what its format says; names file and line.
    """
    kind = KINDS[name]
    files = [Path(folder) / kind.folder / file for file in (kind.train, kind.test)]
    labels = kind.labels
    if labels:
        train, test = (read_labelled(file, len(labels)) for file in files)
    else:
        named = [_read_named(file, part) for file, part in zip(files, ("train", "test"), strict=True)]
        labels = tuple(sorted({label for _, label in named[0]}))
        train, test = (
            [Labelled(text, labels.index(label)) for text, label in part if label in labels] for part in named
        )
    taken, usable = {example.text for example in test}, dict[str, Labelled]()
    for example in train:
        if example.text and example.text not in taken:
            usable.setdefault(example.text, example)
    asked = tuple(example for example in test if example.text)
    if not usable or not asked:
        raise DataError(f"{files[0].parent}: {len(usable)} texts to show and {len(asked)} to ask; both need some")
    different = list(dict.fromkeys(files))
    source = {
        "files": [f"{kind.folder}/{file.name}" for file in different],
        "sha256": hashlib.sha256(b"".join(file.read_bytes() for file in different)).hexdigest()[:16],
        "train": len(usable),
        "train_left_out": len(train) - len(usable),  # empty, there twice, or tested
        "test": len(asked),
        "test_left_out": len(test) - len(asked),  # empty
    }
    return IclSet(name, labels, tuple(usable.values()), asked, source, kind.words)


def read_labelled(path: Path, classes: int) -> list[Labelled]:
    """Every line of a file, texts stripped, empty ones too.

    A ``.csv`` has ``label,text`` with normal quoting and no heading, a file that begins with ``sentence<TAB>label`` has
    such lines, every other one ``label<space>text``.

    Raises:
        DataError: no such file, or a line without label or with one that is not 0 ... ``classes - 1``.
    """

    def parse(raw: bytes, where: list[str]) -> Iterator[Labelled]:
        # only \n ends a line: some texts hold other signs that str.splitlines would take for one
        lines = [line.rstrip("\r") for line in raw.decode("utf-8-sig").split("\n")]
        tabbed = lines[0] == "sentence\tlabel"
        for number, line in enumerate(lines, 1):
            if not line or (tabbed and number == 1):
                continue
            where.append(f"line {number} ({line[:40]!r})")
            if path.suffix == ".csv":
                label, text = next(csv.reader([line]))
            else:
                label, text = line.rsplit("\t", 1)[::-1] if tabbed else line.split(" ", 1)
            if int(label) not in range(classes):
                raise ValueError("there is no such label")
            yield Labelled(text.strip(), int(label))

    return read_source(path, f"text with a label from 0 to {classes - 1}", "fetch the file again", parse).items


def _read_named(path: Path, part: str) -> list[tuple[str, str]]:
    """Texts and the names of their classes; ``part`` of a JSON file, all of another."""

    def parse(raw: bytes, where: list[str]) -> Iterator[tuple[str, str]]:
        if path.suffix == ".gz":
            pairs = json.loads(gzip.decompress(raw))[part]
        else:
            pairs = list(csv.reader(io.StringIO(raw.decode("utf-8-sig"))))[1:]
        return ((" ".join(text.split()), label.replace("_", " ")) for text, label in pairs)

    return read_source(path, "what is published", "fetch the file again", parse).items


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
    datasets: Sequence[str] = ("sst2", "mr", "subj", "sst5", "mpqa")
    local_shots: Sequence[int] = (4, 20)
    memory_shots: Sequence[int] = (0, 200, 2000)
    draws: int = 6
    limit: int | None = 30

    def __post_init__(self) -> None:
        if unknown := set(self.datasets) - KINDS.keys():
            raise ConfigError(f"datasets ({','.join(sorted(unknown))}) must be some of {', '.join(KINDS)}")
        self.sets = [read_icl(self.data, name) for name in self.datasets]

    def source(self) -> Json:
        return {
            "sets": {data.name: data.source for data in self.sets},
            "test_texts": "drawn without replacement, not stratified, the same for all seeds and systems",
            "templates": {data.name: f"{data.asked('{text}')} {{label}}." for data in self.sets},
            "content_free": list(CONTENT_FREE),
        }

    def examples(self) -> list[Example]:
        """Every chosen test text, for every seed and every number of demonstrations.

        Raises:
            DataError: a set has too few training texts.
        """
        return [example for data in self.sets for example in self._examples(data)]

    def _examples(self, data: IclSet) -> Iterator[Example]:
        reader, free = self.tokenizer, CONTENT_FREE if len(data.labels) <= MOST_CALIBRATED else ()
        options = tuple(encode_after(reader, data.words[1], [f" {label}" for label in data.labels]))
        known = encode_after(reader, ".", [f"{data.asked(text)} {data.labels[at]}." for text, at in data.train])
        chosen = drawn(f"{data.name} test", len(data.test), self.limit)
        texts = (*free, *(data.test[n].text for n in chosen))
        queries = encode_after(reader, ".", [data.asked(text) for text in texts])
        for seed, memory, local in [(s, m, n) for s in self.seeds for m in self.memory_shots for n in self.local_shots]:
            near, far = draw(data.name, seed, len(data.train), local, memory)
            shots, said = ([known[n] for n in near], [known[n] for n in far]), f"{local} + {memory}"
            for n, query in zip(chosen, queries[len(free) :], strict=True):
                asked = Asked(*shots, [query, *queries[: len(free)]], options, about=(data, data.test[n].label))
                unit = f"{data.name}/{n}"
                yield Example(f"{unit}, {said}, seed {seed}", f"{data.name}, {said}", unit, asked, seed)

    def gold(self, example: Example) -> Json:
        data, label = example.item.about
        return {"expected": data.labels[label]}

    def measure(self, example: Example, prompt: Prompt, answer: Answer) -> dict[str, float]:
        """Each 0 or 100; of equal scores the first label is taken."""
        (data, label), (scored, *free) = example.item.about, answer.scored
        corrected = calibrated(scored.logprobs, [each.logprobs for each in free])
        return {
            "first_token": 100.0 * starts_label(self.tokenizer.decode([scored.next_token]), data.labels[label]),
            "likelihood": 100.0 * (scored.best == label),
            "calibrated": 100.0 * (int(np.argmax(corrected)) == label),
        }

    def summarise(
        self, result: Json, examples: Sequence[Example], askers: Sequence[Asker], bootstrap: Bootstrap
    ) -> None:
        """With ``average, 20 + 2000`` groups, in which every set has the same weight; examples averaged over seeds.

        ``extra`` has ``per_seed`` (group -> system -> metric -> values by seed, their mean and population standard
        deviation), ``shots`` (see ``ShotsTask.shots_seen``) and ``sets`` (chance and largest class in %).
        """
        values = [one["values"] for one in result["examples"]]
        per_seed = means_by(examples, result, lambda example: example.seed, digits=9)
        spread = {group: _spread([of_group]) for group, of_group in per_seed.items()}
        shots = [example.group.rpartition(", ")[2] for example in examples]
        for said in dict.fromkeys(shots) if len(self.sets) > 1 else ():
            some, name = [n for n, each in enumerate(shots) if each == said], f"average, {said}"
            sizes = Counter(examples[n].group for n in some)
            weights = [1 / sizes[examples[n].group] for n in some]
            chosen = [examples[n] for n in some], [values[n] for n in some]
            result["groups"].append(group_scores(name, *chosen, self.metrics, bootstrap, weights=weights))
            spread[name] = _spread([per_seed[group] for group in sizes])
        means = means_by(examples, result, lambda example: example.unit, digits=2)
        result["examples"] = [
            {"id": f"{one.unit}, {said}", "group": one.group, "unit": one.unit, "values": {
                system: {metric: parts[one.unit] for metric, parts in metrics.items()}
                for system, metrics in means[one.group].items()}}
            for one, said in zip(examples, shots, strict=True) if one.seed == examples[0].seed
        ]  # fmt: skip
        about: Json = {}
        for data in self.sets:
            largest = max(Counter(example.label for example in data.test).values())
            about[data.name] = {"chance": 100 / len(data.labels), "majority": round(100 * largest / len(data.test), 2)}
        result["extra"] = {"per_seed": spread, "shots": self.shots_seen(examples, askers), "sets": about}


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


def _spread(sets: Sequence[Json]) -> Json:
    """Of each set system -> metric -> seed -> mean: over the sets, the value of each seed, their mean and deviation."""
    found: Json = {}
    for system, metrics in sets[0].items():
        for metric in metrics:
            values = np.mean([list(each[system][metric].values()) for each in sets], axis=0)
            numbers = {"values": values, "mean": values.mean(), "std": values.std()}
            found.setdefault(system, {})[metric] = leaves(numbers, lambda number: np.round(number, 3).tolist())
    return found
