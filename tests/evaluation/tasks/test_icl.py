"""In-context learning: files in all their forms, which texts are shown and asked, and scores worked by hand."""

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.calling import Command

from longmem.errors import ConfigError, DataError
from longmem.evaluation.asking import Asker
from longmem.evaluation.tasks.icl import (
    Asked,
    IclTask,
    Labelled,
    calibrated,
    lay_out,
    read_icl,
    read_labelled,
    starts_label,
)

SAID = [("a dull , long film", "no"), ('she said " never " again', "yes"), ("so-so\u2028and more", "yes")]
FORMS = {
    "dev.tsv": "sentence\tlabel\n" + "".join(f"{text}\t{int(label == 'yes')}\n" for text, label in SAID),
    "test.tsv": "".join(f"{int(label == 'yes')} {text} \r\n" for text, label in SAID),
    "test.csv": "".join('{},"{}"\n'.format(int(label == "yes"), text.replace('"', '""')) for text, label in SAID),
    "named.csv": "text,category\n" + "".join('"{}\n",{}\n'.format(text.replace('"', '""'), at) for text, at in SAID),
    "all.json.gz": gzip.compress(json.dumps({"train": [], "test": SAID}).encode()),
}


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_texts(name: str, tmp_path: Path) -> None:
    named = name in ("named.csv", "all.json.gz")
    found = read_labelled(write(tmp_path / name, FORMS[name]), () if named else ("no", "yes"), "test")
    assert found.items == [Labelled(" ".join(text.split()) if named else text, label) for text, label in SAID]


def test_a_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "all.json.gz", FORMS["all.json.gz"][:-20])
    with pytest.raises(DataError, match=r"all.json.gz: the file is not of .*; fetch the file again"):
        read_labelled(path)


def test_nothing_is_shown_that_is_empty_there_twice_or_asked(tmp_path: Path) -> None:
    write(tmp_path / "mpqa" / "train.csv", '0,same\n1,same\n1,""\n0,asked\n1,other\n')
    write(tmp_path / "mpqa" / "test.csv", '0,asked\n1,""\n1,new\n1,new\n')
    data = read_icl(tmp_path, "mpqa")
    assert data.train == (Labelled("same", "negative"), Labelled("other", "positive"))
    assert [example.text for example in data.test] == ["asked", "new", "new"]
    assert (data.source["train"]["left_out"], data.source["test"]["left_out"]) == (3, 1)
    parts = {"train": [["a b", "x_y"], ["c", "z"]], "test": [["d", "z"], ["e", "oos"]]}
    write(tmp_path / "icl_clinc150" / "data_full.json.gz", gzip.compress(json.dumps(parts).encode()))
    data = read_icl(tmp_path, "clinc150")
    assert (data.labels, data.test) == (("x y", "z"), (Labelled("d", "z"),))  # no example shows the class oos


def test_a_set_that_is_not_known_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"datasets \(imdb\) must be some of sst2, mr, subj, sst5, mpqa"):
        IclTask(data=tmp_path, datasets=["mr", "imdb"], local_shots=[1], memory_shots=[0], draws=1, limit=None)


@pytest.mark.shared
def test_the_official_files_have_as_many_examples_as_their_page_says(shared_dir: Path) -> None:
    sizes = {"sst2": (6920, 872), "mr": (8662, 2000), "subj": (8000, 2000), "sst5": (8544, 1101), "mpqa": (8606, 2000)}
    for data in (read_icl(shared_dir / "data" / "icl", name) for name in sizes):
        assert tuple(data.source[part]["items"] for part in ("train", "test")) == sizes[data.name]


def test_the_first_token_must_be_a_prefix_of_the_label() -> None:
    # a blank is empty once stripped, though every text begins with nothing
    assert all(starts_label(first, "positive") for first in (" positive", " pos"))
    assert not any(starts_label(first, "positive") for first in ("", " ", " Positive", "positively", " neg"))


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


@pytest.mark.parametrize(
    ("window", "whole", "local", "memory", "context"),
    [
        (12, False, 3, 0, (0, 1, 1, 1, 2, 2, 3, 3, 7, 8)),
        (11, False, 2, 0, (0, 2, 2, 3, 3, 7, 8)),  # a token short of the farthest demonstration: all of it is gone
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


def test_text_search_puts_demonstrations_of_memory_next_to_the_question(
    byte_tokenizer: Any, tmp_path: Path, command: Command
) -> None:
    shown = ["a red boat", "the red boat of an old man", "green hills", "blue seas and the end"]
    write(tmp_path / "mr" / "train.csv", "".join(f"{n % 2},{text}\n" for n, text in enumerate(shown)))
    write(tmp_path / "mr" / "test.csv", "0,an old red boat\n")
    task = IclTask(
        data=str(tmp_path), datasets=["mr"], local_shots=[1], memory_shots=[0, 3], draws=1, limit=None, recall=2
    )
    plain = replace(asker(400), tokenizer=byte_tokenizer)
    _, recalled = task.begin([plain])
    nothing, example = task.examples()
    assert task.prompt(nothing, recalled) == task.prompt(nothing, plain)
    local, found = (byte_tokenizer.decode(task.prompt(example, each).contexts[0]) for each in (plain, recalled))
    asked = " Review: an old red boat Sentiment:"
    best = " Review: a red boat Sentiment: negative. Review: the red boat of an old man Sentiment: positive."
    assert local.endswith(asked)
    assert found == local.removesuffix(asked) + best + asked
    task.prompt(example, replace(recalled, window=130))
    (note,) = task.notes({})
    assert note.startswith("mr, 1 + 3, it+recall: on average 2 demonstrations fit the window")
    given = ("--data", tmp_path, "--datasets", "mr", "--memory-shots", "3", "--recall", "2")
    assert "nowhere" in command("eval", "icl", "--model", "nowhere", *given).error
