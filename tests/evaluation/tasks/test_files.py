"""Files of the tasks that are of another form: one line that says what is wrong, and where."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from longmem.errors import DataError
from longmem.evaluation.tasks.comprehension import read_chapterbreak, read_squad
from longmem.evaluation.tasks.conversations import read_dialogues, read_told
from longmem.evaluation.tasks.icl import read_labelled

TALK: dict[str, Any] = {"sample_id": "conv-1", "conversation": {}, "qa": []}
UNSAID = {"session_1": [{"speaker": "A", "text": None}]}
read_numbered = partial(read_labelled, labels=("no", "yes"))
SQUAD = '{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "1", "question": "q", "answers": %s}]}]}]}'


@pytest.mark.parametrize(
    ("read", "content", "said"),
    [
        (
            read_chapterbreak,
            '{"pg19": {"7": [{"pos": "b", "negs": []}]}}',
            "work 7, example 1 is not .*KeyError: 'ctx'",
        ),
        (read_chapterbreak, '{"pg19": {"7": [{"ctx": "a", "pos": "b", "negs": ["c"]}]}}', "five negs"),
        (read_numbered, "0 fine\n2 bad", r"text 2 \(\['bad', '2'\]\) is not of text with a label from 0 to 1"),
        (read_numbered, "sentence\tlabel\nfine 1", r"text 1 \(\['fine 1'\]\) is not"),
        (read_told, '{"said": "a", "asked": "b", "answer": "c"}', "line 1 is not of the form .*no value in braces"),
        (read_squad, SQUAD % "[]", r"data\[0\].paragraphs\[0\].qas\[0\].*no answer; SQuAD v1.1 has one or more"),
        (read_dialogues, '[{"a": 1}]', "sample 0 is not of LoCoMo's form.*KeyError: 'conversation'"),
        (read_dialogues, "words", "line 1 is not of LoCoMo's form .* or MSC's"),
        (read_dialogues, "[]", "nothing in it"),
        (read_dialogues, "[" * 100_000, "the file is not of .*RecursionError"),
        (read_dialogues, json.dumps([TALK | {"qa": [{"question": "?", "category": 1, "answer": None}]}]), "is null"),
        (read_dialogues, json.dumps([TALK | {"conversation": UNSAID}]), "a text is a NoneType"),
    ],
)
def test_other_files_are_refused_by_what_is_wrong(
    read: Callable[[Path], Any], content: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=rf"x\.json.*{said}"):
        read(tmp_path / "x.json")
    with pytest.raises(DataError, match=r"no\.json: "):
        read(tmp_path / "no.json")
