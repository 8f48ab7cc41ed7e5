"""In-context learning: files in all their forms, which texts are shown and asked, and scores worked by hand."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest

from longmem.errors import ConfigError, DataError
from longmem.evaluation.asking import Asker
from longmem.evaluation.tasks.icl import (
    Asked,
    IclTask,
    Labelled,
    calibrated,
    draw,
    lay_out,
    read_icl,
    read_labelled,
    starts_label,
)

TEXTS = [("a dull , long film", 0), ('she said " never " again', 1), ("so-so\u2028and more", 1)]


def write(folder: Path, name: str, lines: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


def plain(texts: list[tuple[str, int]]) -> list[str]:
    return [f"{label} {text} " for text, label in texts]


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
    ],
)
def test_every_form_gives_the_same_examples(name: str, lines: list[str], tmp_path: Path) -> None:
    assert read_labelled(write(tmp_path, name, lines), 2) == [Labelled(text, label) for text, label in TEXTS]
    # empty lines at the end are no examples
    assert len(read_labelled(write(tmp_path, name, [*lines, "", ""]), 2)) == len(TEXTS)


def test_nothing_is_shown_that_is_empty_there_twice_or_asked(tmp_path: Path) -> None:
    train = [("same", 0), ("same", 1), ("", 1), ("asked", 0), ("other", 1)]
    write(tmp_path / "mpqa", "train.csv", quoted(train))
    write(tmp_path / "mpqa", "test.csv", quoted([("asked", 0), ("", 1), ("new", 1), ("new", 1)]))
    data = read_icl(tmp_path, "mpqa")
    assert data.train == (Labelled("same", 0), Labelled("other", 1))
    assert [example.text for example in data.test] == ["asked", "new", "new"]
    assert (data.source["train_left_out"], data.source["test_left_out"]) == (3, 1)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mr/train.csv: cannot be read \(No such file or directory\); fetch"):
        read_icl(tmp_path, "mr")
    with pytest.raises(ConfigError, match=r"datasets \(imdb\) must be some of sst2, mr, subj, sst5, mpqa"):
        IclTask(data=tmp_path, datasets=["mr", "imdb"])


@pytest.mark.shared
def test_the_official_files_have_as_many_examples_as_their_page_says(shared_dir: Path) -> None:
    sizes = {"sst2": (6920, 872), "mr": (8662, 2000), "subj": (8000, 2000), "sst5": (8544, 1101), "mpqa": (8606, 2000)}
    for data in (read_icl(shared_dir / "data" / "icl", name) for name in sizes):
        train, test = (len(getattr(data, part)) + data.source[f"{part}_left_out"] for part in ("train", "test"))
        assert (train, test) == sizes[data.name]


def test_intents_are_read_from_csv_and_from_json(tmp_path: Path) -> None:
    write(tmp_path / "icl_banking77", "train.csv", ["text,category", '"Where, oh', 'where?",card_lost', "How?,pin"])
    write(tmp_path / "icl_banking77", "test.csv", ["text,category", "Why?,pin", "Lost!,card_lost"])
    parts = {"train": [["a b", "x_y"], ["c", "z"]], "test": [["d", "z"], ["e", "oos"]]}
    clinc = write(tmp_path / "icl_clinc150", "data_full.json.gz", [])
    clinc.write_bytes(gzip.compress(json.dumps(parts).encode()))
    first, second = (read_icl(tmp_path, name) for name in ("banking77", "clinc150"))
    assert first.labels == ("card lost", "pin")
    assert first.train == (Labelled("Where, oh where?", 0), Labelled("How?", 1))
    assert first.test == (Labelled("Why?", 1), Labelled("Lost!", 0))
    assert (second.labels, second.test) == (("x y", "z"), (Labelled("d", 1),))
    clinc.write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"data_full.json.gz: cannot be read"):
        read_icl(tmp_path, "clinc150")


def test_the_first_token_must_be_a_prefix_of_the_label() -> None:
    # a blank is empty once stripped, though every text begins with nothing
    right = {
        " positive": True,
        " pos": True,
        "": False,
        " ": False,
        " Positive": False,
        "positively": False,
        " neg": False,
    }
    assert {first: starts_label(first, "positive") for first in right} == right


def test_calibration_divides_by_what_labels_get_for_nothing() -> None:
    # shares of two labels where there is nothing to judge: 0.8 to 0.2 and 0.6 to 0.4, on average 0.7 to 0.3
    free = [[math.log(0.08), math.log(0.02)], [math.log(0.3), math.log(0.2)]]
    found = calibrated([math.log(0.6), math.log(0.3)], free)
    assert [math.exp(value) for value in found] == pytest.approx([0.6 / 0.7, 0.3 / 0.3])
    assert calibrated([-1.0, -2.0], [[0.0, -2000.0]])[1] == pytest.approx(-2 - math.log(1e-300))


# demonstrations

ASKED = Asked(((1, 1, 1), (2, 2), (3, 3)), ((10, 10, 10), (11, 11), (12, 12)), [(7, 8)], new_tokens=2)


def asker(window: int, *, whole: bool = False) -> Asker:
    return Asker("it", "it", {}, None, tokenizer=None, window=window, whole=whole)


def test_a_draw_has_no_demonstration_twice_and_more_contain_fewer() -> None:
    near, far = draw("sst2", 3, 50, 20, 30)
    assert sorted(near + far) == list(range(50))
    assert draw("sst2", 3, 50, 4, 10) == (near[-4:], far[-10:])
    assert draw("sst2", 4, 50, 20, 30) != (near, far) != draw("mr", 3, 50, 20, 30)
    with pytest.raises(DataError, match=r"mr: 20 demonstrations .* 2,000 in memory need 2,020 .* there are 50"):
        draw("mr", 1, 50, 20, 2000)


@pytest.mark.parametrize(
    ("window", "whole", "local", "memory", "context"),
    [
        (12, False, 3, 0, (0, 1, 1, 1, 2, 2, 3, 3, 7, 8)),
        (
            11,
            False,
            2,
            0,
            (0, 2, 2, 3, 3, 7, 8),
        ),  # one token short of the farthest demonstration: it is gone as a whole
        (8, False, 1, 0, (0, 3, 3, 7, 8)),
        (6, False, 0, 0, (0, 7, 8)),
        (16, True, 3, 2, (0, 11, 11, 12, 12, 1, 1, 1, 2, 2, 3, 3, 7, 8)),  # those of memory in front
        (11, True, 2, 0, (0, 2, 2, 3, 3, 7, 8)),  # not even all of the window's fit
    ],
)
def test_demonstrations_are_kept_whole_from_the_right(
    window: int, whole: bool, local: int, memory: int, context: tuple[int, ...]
) -> None:
    laid = lay_out(ASKED, asker(window, whole=whole), (0,))
    assert laid == ((context,), local, memory, 0)


def test_every_query_fits_behind_the_demonstrations_and_loses_its_beginning_where_it_must() -> None:
    calibrating = ASKED._replace(queries=[(7, 8), (9, 9, 9, 9)])
    assert lay_out(calibrating, asker(13), (0,)).contexts == ((0, 2, 2, 3, 3, 7, 8), (0, 2, 2, 3, 3, 9, 9, 9, 9))
    assert lay_out(ASKED._replace(queries=[(5, 6, 7, 8)]), asker(5), (0,)) == (((0, 7, 8),), 0, 0, 2)
    with pytest.raises(ConfigError, match=r"window \(3\) has no room for a question beside 2 tokens"):
        lay_out(ASKED, asker(3), (0,))
