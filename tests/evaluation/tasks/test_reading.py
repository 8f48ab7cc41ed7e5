"""Files of the tasks: what is read of them, and one line that says what is wrong, and where."""

import gzip
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from longmem.data.facts import ToldFact
from longmem.errors import ConfigError, DataError
from longmem.evaluation.tasks.comprehension import read_chapterbreak, read_squad
from longmem.evaluation.tasks.conversations import read_dialogues, read_told
from longmem.evaluation.tasks.hidden import Story, read_babi, read_haystack
from longmem.evaluation.tasks.icl import IclTask, Labelled, read_icl, read_labelled

HOME = Path(__file__).parents[1] / "home" / "small"


def test_locomo_is_read_with_dates_speakers_and_pictures() -> None:
    file = read_dialogues(HOME / "locomo10.json")
    (conversation,) = file.items
    first, second = conversation.sessions
    assert file.name == "locomo10.json"
    assert first.startswith("DATE: 7:55 pm on 9 June, 2023\nCONVERSATION:\n")
    assert first.endswith('Ada said, "I got a dog."\nBo said, "Look!" [shares a photo of a cat]\n\n')
    assert second == 'DATE: 2:00 pm on 2 July, 2023\nCONVERSATION:\nBo said, "Bye."\n\n'
    assert [(each.group, each.text, each.answer) for each in conversation.questions] == [
        ("single-hop", "What did Ada get?", "a dog"),
        ("temporal", "When? Use DATE of CONVERSATION to answer with an approximate date.", "2023"),
        ("adversarial", "What did Bo get?", "a dog"),
    ]


def test_msc_is_read_with_earlier_sessions_and_every_turn_as_a_reply() -> None:
    """Only a line end parts conversations."""
    first, second = read_dialogues(HOME / "test.txt").items
    assert [(each.id, each.of) for each in (first, second)] == [("valid_3:1", "valid_3"), ("line:2", None)]
    earlier = "Speaker 1: Hi.\nSpeaker 2: Hello you.\n(5 days later)\n\n"
    assert first.sessions == (earlier, "Speaker 1: Again.\n\n")
    assert [(each.group, each.before, each.text, each.answer) for each in first.questions] == [
        ("session 3", "", "Speaker 1:", "How is the dog?"),
        ("session 3", "Speaker 1: How is the dog?\n", "Speaker 2:", "Fine."),
    ]
    assert [each.answer for each in second.questions] == ["one two three"]


def test_a_story_of_babi_has_all_facts_before_its_question() -> None:
    (task,) = read_babi(str(HOME / "babi"), [1])
    first, second, third = task.test
    assert first == Story(("Ann went to the attic.", "Bob went to the barn."), "Where is Ann?", "attic")
    assert second == Story((*first.facts, "Ann went to the cave."), "Where is Ann?", "cave")
    assert third.facts == ("Bob went to the attic.",)
    assert task.labels == ["attic", "cave"]
    with pytest.raises(DataError, match=r"qa2_\*_train.txt"):
        read_babi(str(HOME / "babi"), [2])


def test_facts_of_ones_own_are_lines_of_json() -> None:
    """Only a line end parts them."""
    said = ((f"Boat {number} is\u2028the Heron.", f"Which is boat {number}?") for number in range(3))
    assert read_told(HOME / "told.jsonl") == [ToldFact(*each, "It is the ", "Heron", ".") for each in said]


def test_the_default_text_is_the_source_of_the_standard_library(byte_tokenizer: Any) -> None:
    found = read_haystack([], byte_tokenizer, 5000, 16)
    assert found.ids.shape == (313, 16)
    assert byte_tokenizer.decode(found.ids[0]).startswith("# file: email")


# labelled sets

SAID = [("a dull , long film", "no"), ('she said " never " again', "yes"), ("so-so\u2028and more", "yes")]
FORMS: dict[str, str | bytes] = {
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
    with pytest.raises(ConfigError, match=r"datasets \(imdb\) must be some of sst2, mr, subj, sst5, mpqa"):
        IclTask(data=str(tmp_path), datasets=["mr", "imdb"], local_shots=[1], memory_shots=[0], draws=1, limit=None)


@pytest.mark.shared
def test_the_official_files_have_as_many_examples_as_their_page_says(shared_dir: Path) -> None:
    sizes = {"sst2": (6920, 872), "mr": (8662, 2000), "subj": (8000, 2000), "sst5": (8544, 1101), "mpqa": (8606, 2000)}
    for data in (read_icl(shared_dir / "data" / "icl", name) for name in sizes):
        assert tuple(data.source[part]["items"] for part in ("train", "test")) == sizes[data.name]


# files of another form

TALK: dict[str, Any] = {"sample_id": "conv-1", "conversation": {}, "qa": []}
UNSAID = {"session_1": [{"speaker": "A", "text": None}]}
SQUAD = '{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "1", "question": "q", "answers": []}]}]}]}'
read_numbered = partial(read_labelled, labels=("no", "yes"))


@pytest.mark.parametrize(
    ("read", "content", "said"),
    [
        (read_chapterbreak, '{"pg19": {"7": [{"pos": "b"}]}}', "work 7, example 1 is not .*KeyError: 'ctx'"),
        (read_chapterbreak, '{"pg19": {"7": [{"ctx": "a", "pos": "b", "negs": ["c"]}]}}', "five negs"),
        (read_numbered, "0 fine\n2 bad", r"text 2 \(\['bad', '2'\]\) is not of text with a label from 0 to 1"),
        (read_numbered, "sentence\tlabel\nfine 1", r"text 1 \(\['fine 1'\]\) is not"),
        (read_told, '{"said": "a", "asked": "b", "answer": "c"}', "line 1 is not of the form .*no value in braces"),
        (read_squad, SQUAD, r"data\[0\].paragraphs\[0\].qas\[0\].*no answer; SQuAD v1.1 has one or more"),
        (read_dialogues, '[{"a": 1}]', "sample 0 is not of LoCoMo's form.*KeyError: 'conversation'"),
        (read_dialogues, "words", "line 1 is not of LoCoMo's form .* or MSC's"),
        (read_dialogues, "[]", "nothing in it"),
        (read_dialogues, "[" * 100_000, "the file is not of .*RecursionError"),
        (read_dialogues, json.dumps([TALK | {"qa": [{"question": "?", "category": 1, "answer": None}]}]), "is null"),
        (read_dialogues, json.dumps([TALK | {"conversation": UNSAID}]), "a text is a NoneType"),
        (read_labelled, FORMS["all.json.gz"][:-20], "the file is not of .*; fetch the file again"),
    ],
    # what is packed holds the time
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_other_files_are_refused_by_what_is_wrong(
    read: Callable[[Path], Any], content: str | bytes, said: str, tmp_path: Path
) -> None:
    path = write(tmp_path / ("x.gz" if isinstance(content, bytes) else "x.json"), content)
    with pytest.raises(DataError, match=rf"x\.\w+: .*{said}"):
        read(path)
    with pytest.raises(DataError, match=r"no\.json: "):
        read(tmp_path / "no.json")
