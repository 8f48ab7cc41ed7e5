"""Tokenized documents: which tokens are scored and which text they stand for."""

from __future__ import annotations

from typing import Any

import pytest

from longmem.data.text import Document
from longmem.data.tokens import train_tokenizer
from longmem.errors import DataError
from longmem.evaluation.loading import tokenize_documents

TEXT = "Häuser am Fluss, und Fluss am Haus. " * 8
TOKENIZER = train_tokenizer([TEXT], 300)


def test_words_and_bytes_are_those_of_the_scored_tokens() -> None:
    (found,) = tokenize_documents([Document("a", TEXT, "")], TOKENIZER)
    scored = TOKENIZER.decode(found.ids[1:])  # nothing precedes the first token
    assert TEXT.endswith(scored)
    assert found.bytes == len(scored.encode())
    assert found.words == len(scored.split())
    assert TOKENIZER.decode(found.ids) == TEXT


def test_nothing_to_measure_is_one_clear_line() -> None:
    with pytest.raises(DataError, match=r"^no text to measure: 1 documents read, none has two tokens; check --data"):
        tokenize_documents([Document("a", "a", "")], TOKENIZER)


def test_only_the_beginning_of_a_long_text_is_tokenised() -> None:
    """And its tokens, words and bytes are those of the whole text, cut."""
    text, seen = "".join(f"{i} {TEXT}" for i in range(300)), list[int]()

    class Watched:
        bos_token_id = None

        def __call__(self, text: str, **settings: object) -> object:
            seen.append(len(text))
            return TOKENIZER(text, **settings)

        def decode(self, ids: list[int], **settings: Any) -> str:
            return str(TOKENIZER.decode(ids, **settings))

    (found,) = tokenize_documents([Document("a", text, "")], Watched(), max_tokens=500)
    ids = TOKENIZER(text).input_ids[:500]
    assert found.ids.tolist() == ids
    assert max(seen) < len(text) / 10
    kept = TOKENIZER.decode(ids[1:])
    assert (found.words, found.bytes) == (len(kept.split()), len(kept.encode()))


def test_a_project_is_the_name_up_to_the_separator_or_the_document_itself() -> None:
    names = ["test/clowder__02-sets.tex", "test/clowder__03.tex", "a/plain.txt", "b/plain.txt"]
    found = tokenize_documents([Document(name, TEXT, "") for name in names], TOKENIZER)
    assert [d.project for d in found] == ["clowder", "clowder", "a/plain.txt", "b/plain.txt"]
    assert {d.group for d in found} == {None}
    found = tokenize_documents([Document(name, TEXT, "") for name in names], TOKENIZER, group_separator="/")
    assert [(d.group, d.project) for d in found] == [("test", "test"), ("test", "test"), ("a", "a"), ("b", "b")]
