"""The five short-text sets of the paper's in-context learning, in every form their files come in; two many-shot sets.

Files are those of ``data/icl/original`` in the released code. A file that begins with ``sentence<TAB>label`` has such
lines, a ``.csv`` has ``label,text`` with normal quoting and no header, every other one ``label<space>text``.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from longmem.errors import ConfigError, DataError
from longmem.evaluation.task import of_form

Split = Literal["released", "dev", "test"]
HEADER = "sentence\tlabel"
TESTED_PER_CLASS = 1000  # of an .all file: test.csv of mr, mpqa and subj is the first so many of each class


class Labelled(NamedTuple):
    """A text and the number of its class."""

    text: str
    label: int


@dataclass(frozen=True)
class IclSet:
    """A set as it is used: names of classes in label order, texts to show and texts to ask, neither empty.

    No text of ``train`` is there twice or tested. ``source``: the files read, their hash, and how many texts were left
    out. ``head`` and ``tail``: the template's words before a text and before a label.
    """

    name: str
    labels: tuple[str, ...]
    train: tuple[Labelled, ...] = field(repr=False)
    test: tuple[Labelled, ...] = field(repr=False)
    source: dict[str, object]
    head: str = "Review:"
    tail: str = "Sentiment:"

    @property
    def chance(self) -> float:
        """Accuracy of guessing, in %."""
        return 100 / len(self.labels)

    @property
    def majority(self) -> float:
        """Accuracy of the most frequent class of the test texts, in %."""
        return 100 * max(Counter(example.label for example in self.test).values()) / len(self.test)


class Intents(NamedTuple):
    """Of a set of requests with an intent each: its folder, and the files of train and test (one file may be both)."""

    folder: str
    train: str
    test: str


class Kind(NamedTuple):
    """Of a set: its folder, classes, the files of each split (the first that is there counts), template words."""

    folder: str
    labels: tuple[str, ...] = ("negative", "positive")
    train: tuple[str, ...] = ("train.csv",)
    test: tuple[str, ...] = ("test.csv",)
    dev: tuple[str, ...] = ()
    all: str = ""
    words: tuple[str, str] = ("Review:", "Sentiment:")


KINDS = {
    "sst2": Kind("SST-2", train=("train.tsv",), test=("test.tsv",), dev=("dev.tsv",)),
    "mr": Kind("mr", all="mr.all"),
    "subj": Kind("subj", ("subjective", "objective"), all="subj.all", words=("Input:", "Type:")),
    "sst5": Kind(
        "sst-5",
        ("terrible", "bad", "okay", "good", "great"),
        ("stsa.fine.train", "train.csv"),
        ("stsa.fine.test", "test.csv"),
        ("stsa.fine.dev",),
    ),
    "mpqa": Kind("mpqa", all="mpqa.all"),
}

INTENTS = {
    "banking77": Intents("icl_banking77", "train.csv", "test.csv"),
    "clinc150": Intents("icl_clinc150", "data_full.json.gz", "data_full.json.gz"),
}
"""Sets with so many classes that their demonstrations fit no window."""


def read_icl(folder: str | Path, names: Sequence[str] = tuple(KINDS), split: Split = "released") -> list[IclSet]:
    """Read sets from a folder with one subfolder each (``SST-2``, ``mr``, ``subj``, ``sst-5``, ``mpqa``).

    Args:
        folder: the names of subfolders may differ in case and hyphens.
        names: keys of ``KINDS`` or ``INTENTS``, in the order in which they are wanted.
        split: what is asked: ``released`` as the released script has it (the dev files of SST-2 and SST-5, the test
            files of the others; test where there is no dev file), ``dev`` or ``test``.

    Raises:
        ConfigError: an unknown set or split, or a set named twice.
        DataError: a folder or file is missing, or a line is not what its format says; names file and line.
    """
    if split not in get_args(Split):
        raise ConfigError(f"split ({split}) must be one of {', '.join(get_args(Split))}")
    if not names or len(set(names)) < len(names) or not set(names) <= KINDS.keys() | INTENTS.keys():
        known = ", ".join([*KINDS, *INTENTS])
        raise ConfigError(f"datasets ({','.join(names)}) must name each of {known} at most once, and one")
    root = Path(folder)
    if not root.is_dir():
        wanted = ", ".join((KINDS | INTENTS)[name].folder for name in names)
        raise DataError(f"{root}: no such folder; name the one that holds {wanted}")
    return [
        _read_intents(name, INTENTS[name], _subfolder(root, INTENTS[name].folder))
        if name in INTENTS
        else _read_set(name, KINDS[name], _subfolder(root, KINDS[name].folder), split)
        for name in names
    ]


def read_labelled(path: Path, classes: int) -> list[Labelled]:
    """Every line of a file, texts stripped, empty ones too.

    Raises:
        DataError: not UTF-8, a line without label or with one that is not 0 ... ``classes - 1``.
    """
    with of_form(path, "UTF-8", "save it as UTF-8"):
        content = path.read_bytes().decode("utf-8-sig")
    found = []
    for number, form, fields in _rows(path, content):
        label = fields[0].strip() if len(fields) == 2 else ""
        if not (label.isascii() and label.isdigit() and int(label) < classes):
            raise DataError(
                f"{path}:{number}: {' '.join(fields)[:40]!r} is not {form} with a label from 0 to {classes - 1}"
            )
        found.append(Labelled(fields[1].strip(), int(label)))
    if not found:
        raise DataError(f"{path}: no examples in it")
    return found


def _rows(path: Path, content: str) -> Iterator[tuple[int, str, list[str]]]:
    """(line number, form of a line, label and text)"""
    # only \n ends a line: some texts hold other signs that str.splitlines would take for one
    lines = [line.rstrip("\r") for line in content.split("\n")]
    if path.suffix == ".csv":
        reader = csv.reader((f"{line}\n" for line in lines), strict=True)
        try:
            yield from ((reader.line_num, "label,text", row) for row in reader if row)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not CSV ({error}); a line is label,text") from error
        return
    header = lines[0].casefold() == HEADER
    for number, line in enumerate(lines, 1):
        if line and not (header and number == 1):
            form = (
                ("text<TAB>label", line.rsplit("\t", 1)[::-1]) if header else ("label<space>text", line.split(" ", 1))
            )
            yield number, *form


def _read_set(name: str, kind: Kind, folder: Path, split: Split) -> IclSet:
    tested = kind.dev if split == "dev" else (*kind.dev, *kind.test) if split == "released" else kind.test
    train_file, test_file = (
        next((f for n in names if (f := folder / n).is_file()), None) for names in (kind.train, tested)
    )
    if train_file is not None and test_file is not None:
        files = [train_file, test_file]
        train, test = (read_labelled(file, len(kind.labels)) for file in files)
    elif kind.all and split != "dev" and (folder / kind.all).is_file():
        files = [folder / kind.all]
        train, test = _divided(read_labelled(files[0], len(kind.labels)))
    else:
        wanted = [" or ".join(kind.train), " or ".join(tested) or "a dev file, which this set has not"]
        also = f" (or {kind.all})" if kind.all and split != "dev" else ""
        raise DataError(f"{folder}: {name} needs {' and '.join(wanted)}{also}; it has {_contents(folder)}")
    return _as_set(name, kind.labels, train, test, files, kind.words)


def _as_set(
    name: str,
    labels: tuple[str, ...],
    train: Sequence[Labelled],
    test: Sequence[Labelled],
    files: Sequence[Path],
    words: tuple[str, str],
) -> IclSet:
    folder = files[0].parent
    taken = {example.text for example in test}
    asked = tuple(example for example in test if example.text)
    first = {example.text: example for example in reversed(train) if example.text and example.text not in taken}
    usable = tuple(example for example in train if first.get(example.text) is example)
    if not usable or not asked:
        raise DataError(f"{folder}: {name} has {len(usable)} texts to show and {len(asked)} to ask; both need some")
    source = {
        "files": [f"{folder.name}/{file.name}" for file in files],
        "sha256": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16],
        "train": len(usable),
        "train_left_out": len(train) - len(usable),  # empty, there twice, or tested
        "test": len(asked),
        "test_left_out": len(test) - len(asked),  # empty
    }
    return IclSet(name, labels, usable, asked, source, *words)


def _read_intents(name: str, kind: Intents, folder: Path) -> IclSet:
    """Texts whose classes are names, read from ``text,category`` lines or from JSON lists ``train`` and ``test``."""
    files = [folder / file for file in dict.fromkeys((kind.train, kind.test))]
    form = f"what is published, {' and '.join(file.name for file in files)}"
    with of_form(folder, form, f"fetch the files of {name} again"):
        if len(files) == 1:
            content = json.loads(gzip.decompress(files[0].read_bytes()))
            parts = [content["train"], content["test"]]
        else:
            parts = [list(csv.reader(io.StringIO(file.read_text("utf-8-sig"))))[1:] for file in files]
        named = [[(" ".join(text.split()), label.replace("_", " ")) for text, label in part] for part in parts]
    labels = tuple(sorted({label for _, label in named[0]}))
    number = {label: at for at, label in enumerate(labels)}
    train, test = ([Labelled(text, number[label]) for text, label in part if label in number] for part in named)
    return _as_set(name, labels, train, test, files, ("Request:", "Intent:"))


def _divided(examples: Sequence[Labelled]) -> tuple[list[Labelled], list[Labelled]]:
    """Train and test of an ``.all`` file, as in the csv files beside it."""
    seen: Counter[int] = Counter()
    parts: tuple[list[Labelled], list[Labelled]] = ([], [])
    for example in examples:
        parts[seen[example.label] < TESTED_PER_CLASS].append(example)
        seen[example.label] += 1
    return parts


def _subfolder(root: Path, name: str) -> Path:
    plain = name.casefold().replace("-", "")
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and folder.name.casefold().replace("-", "") == plain:
            return folder
    raise DataError(f"{root}: no folder {name} in it, only {_contents(root)}")


def _contents(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "nothing"
