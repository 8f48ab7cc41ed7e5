"""The five sets in all the forms of their files, and what is said of files that are something else."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from longmem.errors import ConfigError, DataError
from longmem.evaluation.tasks.icl_data import Labelled, read_icl, read_labelled

TEXTS = [("a dull , long film", 0), ('she said " never " again', 1), ("so-so\u2028and more", 1)]


def write(folder: Path, name: str, lines: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


def plain(texts: list[tuple[str, int]]) -> list[str]:
    return [f"{label} {text} " for text, label in texts]  # the official .all files have a space at each line's end


def quoted(texts: list[tuple[str, int]]) -> list[str]:
    return [f'{label},"{text.replace(chr(34), chr(34) * 2)}"' for text, label in texts]


def tabbed(texts: list[tuple[str, int]]) -> list[str]:
    return ["sentence\tlabel", *(f"{text}\t{label}" for text, label in texts)]


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("train.tsv", tabbed(TEXTS)),
        ("test.tsv", plain(TEXTS)),  # the test file of SST-2 has no header
        ("test.csv", quoted(TEXTS)),
        ("stsa.fine.test", plain(TEXTS)),
        ("mr.all", plain(TEXTS)),
    ],
)
def test_every_form_gives_the_same_examples(name: str, lines: list[str], tmp_path: Path) -> None:
    assert read_labelled(write(tmp_path, name, lines), 2) == [Labelled(text, label) for text, label in TEXTS]
    # empty lines at the end are no examples
    assert len(read_labelled(write(tmp_path, name, [*lines, "", ""]), 2)) == len(TEXTS)


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("test.csv", ["0,a,b"], r"test.csv:1: '0 a b' is not label,text"),
        ("test.csv", ['0,"a" b'], r"test.csv:1: not CSV"),
        ("mr.all", ["0 fine", "2 bad"], r"mr.all:2: '2 bad' is not label<space>text with a label from 0 to 1"),
        ("mr.all", ["0 fine", "fine"], r"mr.all:2: 'fine' is not label<space>text"),
        ("dev.tsv", ["sentence\tlabel", "fine 1"], r"dev.tsv:2: 'fine 1' is not text<TAB>label"),
        ("dev.tsv", ["sentence\tlabel"], r"dev.tsv: no examples in it"),
    ],
)
def test_a_wrong_line_is_named(name: str, lines: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_labelled(write(tmp_path, name, lines), 2)


def test_the_released_split_is_dev_where_there_is_one(tmp_path: Path) -> None:
    for number, name in enumerate(("train.tsv", "dev.tsv")):
        write(tmp_path / "SST-2", name, tabbed([(f"text {number}", 1)]))
    write(tmp_path / "SST-2", "test.tsv", plain([("text 2", 0)]))
    for number, name in enumerate(("train.csv", "test.csv")):
        write(tmp_path / "sst-5", name, quoted([(f"text {number}", 4)]))

    def asked(split: str) -> list[str]:
        return [data.test[0].text for data in read_icl(tmp_path, ("sst2", "sst5"), split)]  # type: ignore[arg-type]

    assert asked("released") == ["text 1", "text 1"]  # SST-5 as csv has no dev file
    assert asked("test") == ["text 2", "text 1"]
    with pytest.raises(DataError, match=r"sst5 needs .* and stsa.fine.dev; it has test.csv, train.csv"):
        asked("dev")


def test_an_all_file_is_divided_as_the_csv_files_are(tmp_path: Path) -> None:
    texts = [(f"text {number}", number % 2) for number in range(2004)]
    write(tmp_path / "subj", "subj.all", plain(texts))
    (data,) = read_icl(tmp_path, ("subj",))
    assert [example.text for example in data.test] == [text for text, _ in texts[:2000]]
    assert [example.text for example in data.train] == [text for text, _ in texts[2000:]]
    assert data.source["files"] == ["subj/subj.all"]


def test_nothing_is_shown_that_is_empty_there_twice_or_asked(tmp_path: Path) -> None:
    train = [("same", 0), ("same", 1), ("", 1), ("asked", 0), ("other", 1)]
    write(tmp_path / "MPQA", "train.csv", quoted(train))
    write(tmp_path / "MPQA", "test.csv", quoted([("asked", 0), ("", 1), ("new", 1), ("new", 1)]))
    (data,) = read_icl(tmp_path, ("mpqa",))
    assert data.train == (Labelled("same", 0), Labelled("other", 1))
    assert [example.text for example in data.test] == ["asked", "new", "new"]
    assert (data.source["train_left_out"], data.source["test_left_out"]) == (3, 1)
    assert (data.chance, round(data.majority, 2)) == (50, 66.67)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder; name the one that holds SST-2, mr, subj, sst-5, mpqa"):
        read_icl(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no folder mr in it, only nothing"):
        read_icl(tmp_path, ("mr",))
    write(tmp_path / "mr", "train.csv", quoted(TEXTS))
    with pytest.raises(DataError, match=r"mr needs train.csv and test.csv \(or mr.all\); it has train.csv"):
        read_icl(tmp_path, ("mr",))
    with pytest.raises(ConfigError, match=r"datasets \(mr,imdb\) must name each of sst2, mr, subj, sst5, mpqa"):
        read_icl(tmp_path, ("mr", "imdb"))


@pytest.mark.shared
def test_the_official_files_have_as_many_examples_as_their_page_says(shared_dir: Path) -> None:
    for name, train, test in (
        ("sst2", 6920, 872),
        ("mr", 8662, 2000),
        ("subj", 8000, 2000),
        ("sst5", 8544, 1101),
        ("mpqa", 8606, 2000),
    ):
        (data,) = read_icl(shared_dir / "data" / "icl", (name,))
        source = data.source
        assert len(data.train) + int(str(source["train_left_out"])) == train
        assert len(data.test) + int(str(source["test_left_out"])) == test


def test_intents_are_read_from_csv_and_from_json(tmp_path: Path) -> None:
    banking, clinc = tmp_path / "icl_banking77", tmp_path / "icl_clinc150"
    for folder in (banking, clinc):
        folder.mkdir()
    (banking / "train.csv").write_text('text,category\n"Where, oh\nwhere?",card_lost\nHow?,pin\nWhy?,pin\n')
    (banking / "test.csv").write_text("text,category\nWhy?,pin\nLost!,card_lost\n")
    parts = {"train": [["a b", "x_y"], ["c", "z"]], "test": [["d", "z"], ["e", "oos"]]}
    (clinc / "data_full.json.gz").write_bytes(gzip.compress(json.dumps(parts).encode()))
    first, second = read_icl(tmp_path, ["banking77", "clinc150"])
    assert first.labels == ("card lost", "pin")
    assert first.train == (Labelled("Where, oh where?", 0), Labelled("How?", 1))  # what is tested is not shown
    assert first.test == (Labelled("Why?", 1), Labelled("Lost!", 0))
    assert (second.labels, second.test) == (("x y", "z"), (Labelled("d", 1),))
    (clinc / "data_full.json.gz").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"icl_clinc150: cannot be read"):
        read_icl(tmp_path, ["clinc150"])
