"""Tokenized documents: which tokens are scored and which text they stand for."""

from __future__ import annotations

import pytest

from longmem.data.text import Document
from longmem.data.tokens import train_tokenizer
from longmem.errors import DataError
from longmem.evaluation.documents import tokenize_documents

TEXT = "Häuser am Fluss, und Fluss am Haus. " * 8
TOKENIZER = train_tokenizer([TEXT], 300)


@pytest.mark.parametrize("most", [None, 40])
def test_words_and_bytes_are_those_of_the_scored_tokens(most: int | None) -> None:
    (found,) = tokenize_documents([Document("a", TEXT, "")], TOKENIZER, max_tokens=most)
    assert found.ids.tolist() == TOKENIZER(TEXT).input_ids[:most]
    scored = TOKENIZER.decode(found.ids[1:])  # nothing precedes the first token
    assert (found.words, found.bytes) == (len(scored.split()), len(scored.encode()))


def test_nothing_to_measure_is_one_clear_line() -> None:
    with pytest.raises(DataError, match=r"^no text to measure: 1 documents read, none has two tokens; check --data"):
        tokenize_documents([Document("a", "a", "")], TOKENIZER)


def test_a_project_is_the_name_up_to_the_separator_or_the_document_itself() -> None:
    names = ["test/clowder__02-sets.tex", "test/clowder__03.tex", "a/plain.txt", "b/plain.txt"]
    found = tokenize_documents([Document(name, TEXT, "") for name in names], TOKENIZER)
    assert [d.project for d in found] == ["clowder", "clowder", "a/plain.txt", "b/plain.txt"]
    assert {d.group for d in found} == {None}
    found = tokenize_documents([Document(name, TEXT, "") for name in names], TOKENIZER, group_separator="/")
    assert [(d.group, d.project) for d in found] == [("test", "test"), ("test", "test"), ("a", "a"), ("b", "b")]
