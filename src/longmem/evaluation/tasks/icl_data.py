"""The five short-text sets of the paper's in-context learning, in every form their files come in.

Files are those of ``data/icl/original`` in the released code. A file that begins with ``sentence<TAB>label`` has such
lines, a ``.csv`` has ``label,text`` with normal quoting and no header, every other one ``label<space>text``.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from longmem.errors import ConfigError, DataError

Split = Literal["released", "dev", "test"]
HEADER = "sentence\tlabel"
TESTED_PER_CLASS = 1000  # of an .all file: test.csv of mr, mpqa and subj is the first so many of each class


@dataclass(frozen=True)
class IclKind:
    """One set: the names of its classes in label order, its folder, and the files of each split, best first."""

    folder: str
    labels: tuple[str, ...]
    train: tuple[str, ...]
    test: tuple[str, ...]
    dev: tuple[str, ...] = ()
    all: str | None = None
    head: str = "Review:"
    tail: str = "Sentiment:"


POLARITY = ("negative", "positive")
KINDS = {
    "sst2": IclKind("SST-2", POLARITY, ("train.tsv",), ("test.tsv",), dev=("dev.tsv",)),
    "mr": IclKind("mr", POLARITY, ("train.csv",), ("test.csv",), all="mr.all"),
    "subj": IclKind(
        "subj",
        ("subjective", "objective"),
        ("train.csv",),
        ("test.csv",),
        all="subj.all",
        head="Input:",
        tail="Type:",
    ),
    "sst5": IclKind(
        "sst-5",
        ("terrible", "bad", "okay", "good", "great"),
        ("stsa.fine.train", "train.csv"),
        ("stsa.fine.test", "test.csv"),
        dev=("stsa.fine.dev",),
    ),
    "mpqa": IclKind("mpqa", POLARITY, ("train.csv",), ("test.csv",), all="mpqa.all"),
}


@dataclass(frozen=True)
class Labelled:
    """A text and the number of its class."""

    text: str
    label: int


@dataclass(frozen=True)
class IclSet:
    """A set as it is used.

    Attributes:
        name: key of ``KINDS``.
        kind: its classes and template words.
        train: what demonstrations are drawn from: not empty, no text twice, none that is tested.
        test: what is asked: not empty.
        source: the files read, their hash, and how many texts were left out, for the result file.
    """

    name: str
    kind: IclKind
    train: tuple[Labelled, ...]
    test: tuple[Labelled, ...]
    source: dict[str, object]

    @property
    def chance(self) -> float:
        """Accuracy of guessing, in %."""
        return 100 / len(self.kind.labels)

    @property
    def majority(self) -> float:
        """Accuracy of the most frequent class of the test texts, in %."""
        return 100 * max(Counter(example.label for example in self.test).values()) / len(self.test)


def read_icl(folder: str | Path, names: Sequence[str] = tuple(KINDS), split: Split = "released") -> list[IclSet]:
    """Read sets from a folder with one subfolder each (``SST-2``, ``mr``, ``subj``, ``sst-5``, ``mpqa``).

    Args:
        folder: the names of subfolders may differ in case and hyphens.
        names: keys of ``KINDS``, in the order in which they are wanted.
        split: what is asked: ``released`` as the released script has it (the dev files of SST-2 and SST-5, the test
            files of the others; test where there is no dev file), ``dev`` or ``test``.

    Raises:
        ConfigError: an unknown set or split, or a set named twice.
        DataError: a folder or file is missing, or a line is not what its format says; names file and line.
    """
    if split not in get_args(Split):
        raise ConfigError(f"split ({split}) must be one of {', '.join(get_args(Split))}")
    unknown = [name for name in names if name not in KINDS]
    if unknown or not names or len(set(names)) < len(names):
        raise ConfigError(f"datasets ({','.join(names)}) must name each of {', '.join(KINDS)} at most once, and one")
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; name the one that holds {', '.join(_folders(names))}")
    return [_read_set(name, KINDS[name], _subfolder(root, KINDS[name].folder), split) for name in names]


def read_labelled(path: Path, classes: int) -> list[Labelled]:
    """Every line of a file, texts stripped, empty ones too.

    Raises:
        DataError: not UTF-8, a line without label or with one that is not 0 ... ``classes - 1``.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    found = []
    for number, label, text in _rows(path, lines):
        if not (label.isascii() and label.isdigit() and int(label) < classes):
            raise DataError(f"{path}:{number}: label {label[:20]!r} must be a number from 0 to {classes - 1}")
        found.append(Labelled(text.strip(), int(label)))
    if not found:
        raise DataError(f"{path}: no examples in it")
    return found


def _rows(path: Path, content: str) -> Iterator[tuple[int, str, str]]:
    """(line number, label, text)"""
    if path.suffix == ".csv":
        reader = csv.reader(io.StringIO(content, newline=""), strict=True)
        try:
            for row in reader:
                if not row:  # an empty line
                    continue
                if len(row) != 2:
                    raise DataError(f"{path}:{reader.line_num}: {len(row)} fields; a line is label,text")
                yield reader.line_num, row[0], row[1]
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not CSV ({error}); a line is label,text") from error
        return
    # only \n ends a line: some texts hold other signs that str.splitlines would take for one
    lines = [line.rstrip("\r") for line in content.split("\n")]
    headed = lines[0].casefold() == HEADER
    for number, line in enumerate(lines, 1):
        if (number == 1 and headed) or not line:
            continue
        text, separator, label = line.rpartition("\t") if headed else line.partition(" ")[::-1]
        if not separator:
            wanted = "text<TAB>label" if headed else "label<space>text"
            raise DataError(f"{path}:{number}: {line[:40]!r} is not {wanted}")
        yield number, label, text


def _read_set(name: str, kind: IclKind, folder: Path, split: Split) -> IclSet:
    classes = len(kind.labels)
    train_file, test_file = _first(folder, kind.train), _first(folder, _tested(kind, split))
    if split == "released" and test_file is None:
        test_file = _first(folder, kind.test)
    if train_file is not None and test_file is not None:
        files = [train_file, test_file]
        train, test = (read_labelled(file, classes) for file in files)
    elif kind.all is not None and split != "dev" and (folder / kind.all).is_file():
        files = [folder / kind.all]
        train, test = _divided(read_labelled(files[0], classes))
    else:
        wanted = [" or ".join(kind.train), " or ".join(_tested(kind, split)) or "a dev file, which this set has not"]
        also = "" if kind.all is None or split == "dev" else f" (or {kind.all})"
        raise DataError(f"{folder}: {name} needs {' and '.join(wanted)}{also}; it has {_contents(folder)}")
    tested, asked = {example.text for example in test}, tuple(example for example in test if example.text)
    first = {example.text: example for example in reversed(train) if example.text and example.text not in tested}
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
    return IclSet(name, kind, usable, asked, source)


def _tested(kind: IclKind, split: Split) -> tuple[str, ...]:
    return kind.dev if split == "dev" or (split == "released" and kind.dev) else kind.test


def _divided(examples: Sequence[Labelled]) -> tuple[list[Labelled], list[Labelled]]:
    """Train and test of an ``.all`` file, as in the csv files beside it."""
    seen: Counter[int] = Counter()
    train, test = list[Labelled](), list[Labelled]()
    for example in examples:
        (test if seen[example.label] < TESTED_PER_CLASS else train).append(example)
        seen[example.label] += 1
    return train, test


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _subfolder(root: Path, name: str) -> Path:
    plain = name.casefold().replace("-", "")
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and folder.name.casefold().replace("-", "") == plain:
            return folder
    raise DataError(f"{root}: no folder {name} in it, only {_contents(root)}")


def _contents(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "nothing"


def _folders(names: Sequence[str]) -> list[str]:
    return [KINDS[name].folder for name in names]
