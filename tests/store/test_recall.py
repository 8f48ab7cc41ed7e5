"""Re-reading: the passages that share words with a question."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from tests.store.small import open_small

from longmem.chat import PlainTexts, Recall, passages
from longmem.store import MemoryStore


@pytest.fixture
def notes(tmp_path: Path) -> Iterator[MemoryStore]:
    monday = "user: My sister Ada keeps three bees.\nassistant: Noted.\nuser: The boat is called Petrel."
    with open_small(tmp_path / "memory") as store:
        store.add_document("ann", monday, name="monday")
        store.add_document("ann", "user: I paint on Sundays.", name="tuesday")
        store.add_document("bob", "Bob's boat is Gull.", name="m")
        yield store


def test_the_line_that_answers_comes_first_with_its_place_and_no_namespace_sees_another(notes: MemoryStore) -> None:
    first, *others = Recall(notes, "ann").search("What is the name of my boat, bees or a Gull?", 10)
    assert (first.document, first.text) == ("monday", "user: The boat is called Petrel.")
    assert notes.text("ann", "monday")[first.start :] == first.text
    assert not Recall(notes, "ann").search("Petrel", without=["monday"])
    assert others and not [each for each in others if "Gull" in each.text]
    assert Recall(notes, "nobody").search("boat") == []


def test_passages_stand_in_the_order_of_their_age(notes: MemoryStore) -> None:
    notes.add_document("ann", "user: The name of my boat is Heron: the boat is called Heron.", name="aloud")
    recall = Recall(notes, "ann")
    text, found = recall.notes("What is the name of my boat?", lambda text, **_: {"input_ids": text.split()}, 3)
    assert [passage.document for passage in found][:2] == ["aloud", "monday"]
    assert text.index("Petrel") < text.index("Heron")


@pytest.mark.parametrize(
    ("query", "count"),
    [('boat" OR "x', 1), ("NEAR(boat bees)", 2), ("boat*", 1), ("-boat", 1), ("text:boat", 1), ("??", 0), ("", 0)],
)
def test_words_of_a_question_are_no_operators(notes: MemoryStore, query: str, count: int) -> None:
    assert len(Recall(notes, "ann").search(query, 5)) == count


def test_of_a_very_long_question_the_rarest_words_are_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longmem.chat.QUERY_WORDS", 2)  # their number is what takes time
    texts = {f"{number}": "Some of my chatter" for number in range(9)} | {"boat": "The boat is called Petrel."}
    question = ["some", "of", "my", *(f"unheard{number}" for number in range(1000)), "chatter", "petrels", "boats"]
    recall = Recall(PlainTexts(texts), "")
    assert [each.document for each in recall.search(" ".join(question), 20)] == ["boat"]
    assert not recall.search(" ".join(question[3:-3]))


def test_what_changes_while_documents_are_read_is_noticed_next_time(notes: MemoryStore) -> None:
    with open_small(notes.path, mode="read") as store:
        recall, documents = Recall(store, "ann"), store.documents

        def changing(*given: Any) -> Any:
            found = documents(*given)
            notes.add_document("ann", "user: The boat is called Heron now.", name="new")
            notes.forget("ann", name="monday")
            return found

        with patch.object(store, "documents", changing):
            assert recall.search("Petrel")
        assert recall.search("Heron") and not recall.search("Petrel")


def test_documents_are_read_again_only_after_a_change_or_when_one_expires(notes: MemoryStore) -> None:
    later = time.time() + 60
    notes.add_document("ann", "The boat is sold.", name="soon", expires=later)
    recall = Recall(notes, "ann")
    with patch.object(notes, "documents", wraps=notes.documents) as read:
        for _ in range(3):
            assert recall.search("sold")
        assert read.call_count == 1
        with patch("time.time", lambda: later):
            assert not recall.search("sold") and not recall.search("sold")
        assert read.call_count == 2


def test_long_lines_are_cut_and_nothing_is_lost() -> None:
    text = "\n".join(" ".join(f"word{i}x{j}" for j in range(150)) + "." for i in range(3)) + "\n\nA short. And more."
    found = passages(text)
    assert all(len(passage.split()) <= 60 for _, passage in found)
    assert " ".join(passage for _, passage in found).split() == text.split()
    assert all(text[start : start + len(passage)] == passage for start, passage in found)
    assert found[-1][1] == "A short. And more."
