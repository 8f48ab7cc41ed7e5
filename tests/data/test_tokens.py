"""Tokens: tokenizer, cache, documents one by one; and what rows are fed, ``SegmentStream`` and ``WindowSampler``."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from longmem.data.facts import told_session
from longmem.data.stream import IGNORE, SegmentStream, WindowSampler
from longmem.data.text import Document, TextSource
from longmem.data.tokens import (
    TokenCorpus,
    as_corpus,
    first_text,
    load_tokenizer,
    tokenize,
    tokenize_documents,
    train_tokenizer,
)
from longmem.errors import DataError, LongMemError


def test_a_learned_tokenizer_gives_every_text_back_after_saving(tmp_path: Path, made_text: Callable[..., str]) -> None:
    train_tokenizer([made_text(500)], 300).save_pretrained(str(tmp_path))
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == 300
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    for text in ("  \\alpha\n\t x", "naïve 漢字 🙂", made_text(50, seed=3)):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_cache_is_used_while_text_and_tokenizer_are_the_same(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in ("a", "ab"), ("b", "é x"):
        (tmp_path / f"{name}.txt").write_text(text)
    source, cache = TextSource((str(tmp_path),)), tmp_path / ".cache"
    first, end = tokenize(source, byte_tokenizer, cache), byte_tokenizer.eos_token_id
    for number, text in enumerate(("ab", "é x")):
        assert first.document(number).tolist() == [*byte_tokenizer(text)["input_ids"], end]
    with monkeypatch.context() as patch:
        patch.setattr(TokenCorpus, "from_parts", None)
        again = tokenize(source, byte_tokenizer, cache)
    assert isinstance(again.ids, np.memmap) and again.ids.tolist() == first.ids.tolist()
    assert again.bounds.tolist() == [0, 3, 8]
    assert (again.names, again.fingerprint) == (("a.txt", "b.txt"), first.fingerprint)
    (file,) = cache.rglob("ids.npy")
    assert tokenize(source, train_tokenizer(["ab"], 260), cache).fingerprint != first.fingerprint
    file.write_bytes(file.read_bytes()[:-6])
    with pytest.raises(DataError, match=r"damaged token cache \(.*\); delete the folder"):
        tokenize(source, byte_tokenizer, cache)
    (tmp_path / "a.txt").write_text("other text")
    assert tokenize(source, byte_tokenizer, cache).document(0).tolist() != first.document(0).tolist()


def test_a_beginning_has_the_tokens_of_the_whole_text(
    byte_tokenizer: PreTrainedTokenizerFast, made_text: Callable[..., str]
) -> None:
    learned = train_tokenizer([made_text(3000)], 400)
    for text in (made_text(3000, 1), made_text(3000, 2).replace(" ", ""), "漢字" * 4000, " " * 9000 + "x"):
        for tokenizer in (learned, byte_tokenizer):
            whole = tokenizer(text, verbose=False)["input_ids"]
            for count in (1, 7, 200, 1000, len(whole)):
                first = first_text(text, tokenizer, count)
                assert text.startswith(first)
                assert tokenizer(first, verbose=False)["input_ids"][:count] == whole[:count]
    assert len(first_text(made_text(3000, 1), learned, 100)) < 5000, "the rest is not tokenised"


# documents one by one

TEXT = "Häuser am Fluss, und Fluss am Haus. " * 8
TOKENIZER = train_tokenizer([TEXT], 300)


@pytest.mark.parametrize("most", [None, 40])
def test_words_and_bytes_are_those_of_the_scored_tokens(most: int | None) -> None:
    (found,) = tokenize_documents([Document("a", TEXT, "")], TOKENIZER, max_tokens=most)
    assert found.ids.tolist() == TOKENIZER(TEXT).input_ids[:most]
    scored = TOKENIZER.decode(found.ids[1:])  # nothing precedes the first token
    assert (found.words, found.bytes) == (len(scored.split()), len(scored.encode()))


def test_a_project_is_the_name_up_to_the_separator_or_the_document_itself() -> None:
    names = ["test/clowder__02-sets.tex", "test/clowder__03.tex", "a/plain.txt", "b/plain.txt"]
    documents = [Document(name, TEXT, "") for name in names]
    for separator, groups, projects in (
        (None, [None] * 4, ["clowder", "clowder", "a/plain.txt", "b/plain.txt"]),
        ("/", ["test", "test", "a", "b"], ["test", "test", "a", "b"]),
    ):
        found = tokenize_documents(documents, TOKENIZER, group_separator=separator)
        assert [(each.group, each.project) for each in found] == list(zip(groups, projects, strict=True))


LENGTHS = (13, 9, 30, 22, 8, 17)


def corpus_of(*lengths: int) -> TokenCorpus:
    """Documents of these lengths; document d's token t is ``1000 * d + t``."""
    ids = np.concatenate([1000 * d + np.arange(length) for d, length in enumerate(lengths)]).astype(np.uint16)
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenCorpus(ids, bounds, tuple(f"doc{d}" for d in range(len(lengths))), str(lengths))


def steps(stream: SegmentStream | WindowSampler, count: int) -> list[list[list[int]]]:
    return [stream.next().ids.tolist() for _ in range(count)]


# SegmentStream


def test_a_row_reads_its_document_in_consecutive_segments_then_the_next() -> None:
    stream = SegmentStream(corpus_of(9, 5, 7), window=4, rows=2, seed=None, pad_id=99)
    seen = [stream.next() for _ in range(3)]
    assert [batch.ids.tolist() for batch in seen] == [
        [[0, 1, 2, 3], [1000, 1001, 1002, 1003]],
        [[4, 5, 6, 7], [2000, 2001, 2002, 2003]],
        [[0, 1, 2, 3], [2004, 2005, 2006, 99]],
    ]
    assert [batch.documents for batch in seen] == [("doc0", "doc1"), ("doc0", "doc2"), ("doc0", "doc2")]
    assert [batch.offsets for batch in seen] == [(0, 0), (4, 0), (0, 4)]
    assert [batch.starts.tolist() for batch in seen] == [[True, True], [False, True], [True, False]]
    assert [batch.mask if batch.mask is None else batch.mask.tolist() for batch in seen] == [
        None, None, [[True] * 4, [True, True, True, False]]
    ]  # fmt: skip
    # the next tokens, also across the segment's end, and never beyond the document
    assert seen[0].targets.tolist() == [[1, 2, 3, 4], [1001, 1002, 1003, 1004]]
    assert seen[2].targets[1].tolist() == [2005, 2006, IGNORE, IGNORE]


def test_every_token_but_the_first_of_each_document_is_a_target_once_in_a_pass() -> None:
    stream = SegmentStream(corpus_of(*LENGTHS), window=4, rows=1, seed=5)
    seen: list[int] = []
    while stream.taken <= len(stream.pieces):
        targets = stream.next().targets
        seen += targets[targets != IGNORE].tolist()
    assert sorted(seen) == [1000 * d + t for d, n in enumerate(LENGTHS) for t in range(1, n)]


def test_long_documents_can_be_dealt_out_in_pieces() -> None:
    stream = SegmentStream(corpus_of(40, 10), window=4, rows=1, seed=None, piece_tokens=10)
    assert [(piece.name, piece.offset, piece.last - piece.first) for piece in stream.pieces] == [
        *((f"doc0@{offset}", offset, 10) for offset in (0, 10, 20, 30)), ("doc1", 0, 10)
    ]  # fmt: skip


def test_two_processes_read_what_one_with_all_rows_reads() -> None:
    for kind in (SegmentStream, WindowSampler):
        whole = steps(kind(corpus_of(*LENGTHS), window=4, rows=4, seed=3), 10)
        parts = [
            steps(kind(corpus_of(*LENGTHS), window=4, rows=2, seed=3, rank=rank, world=2), 10) for rank in range(2)
        ]
        assert [first + second for first, second in zip(*parts, strict=True)] == whole


# WindowSampler


def test_a_pass_shows_every_window_once_in_an_order_of_seed_and_position() -> None:
    make = lambda seed: WindowSampler(corpus_of(900), window=10, rows=2, seed=seed, repeat_fraction=0.5)  # noqa: E731
    first, other, resumed = make(1), make(2), make(1)
    batches = steps(first, 60)
    assert batches != steps(other, 60)
    resumed.load_state_dict({**first.state_dict(), "position": 40})
    assert steps(resumed, 40) == batches[20:]
    plain = WindowSampler(corpus_of(900), window=10, rows=1, seed=1)
    starts = [int(plain.next().ids[0, 0]) for _ in range(plain.per_pass)]
    assert starts != sorted(starts)
    assert set(np.diff(sorted(starts)).tolist()) == {10}


@pytest.mark.parametrize("drawn", [0.0, 1.0], ids=["of the text", "of random tokens"])
def test_practice_rows_hold_a_passage_twice_and_do_not_score_what_cannot_be_foreseen(drawn: float) -> None:
    practice: dict[str, Any] = {"repeat_fraction": 1.0, "repeat_random": drawn, "special_ids": 3, "vocab_size": 50}
    sampler = WindowSampler(corpus_of(900), window=32, rows=1, seed=1, **practice)
    for _ in range(50):
        batch = sampler.next()
        ids, targets = batch.ids[0].tolist(), batch.targets[0]
        scored = (targets != IGNORE).nonzero().flatten().tolist()
        assert bool(batch.practice.all())
        if drawn:  # the repetition alone
            assert 3 <= min(ids) <= max(ids) < 50
            assert len(scored) <= 16 and scored == [scored[0] + place for place in range(len(scored))]
        else:  # all but where the passage begins again, and what follows it
            hidden = [place for place in range(32) if place not in scored]
            assert 1 <= len(hidden) <= 2
            # tokens of this corpus differ, so whatever occurs twice is the passage
            again = hidden[0] + 1
            assert again >= 32 or ids[again] in ids[:again]


# in one line


def moved(kind: Any) -> None:
    """Goes on in other text than it began in."""
    state = kind(corpus_of(21), window=10, rows=2).state_dict()  # as many pieces as rows
    kind(corpus_of(22), window=10, rows=2).load_state_dict(state)


ERRORS: dict[str, Callable[[], Any]] = {
    "data.vocab_size (100) must be at least 259": lambda: train_tokenizer(["text"], 100),
    "facts of a session (22) must be 1 to 21": lambda: told_session(random.Random(0), 22, held_out=True),
    "10 tokens, too few for 4 rows": lambda: SegmentStream(corpus_of(10), 8, 4),
    "resume with the data and tokenizer that the run began with": lambda: moved(SegmentStream),
    "the saved place is in other text": lambda: moved(WindowSampler),
    "record 0 has no input_ids (it has text); tokenise": lambda: as_corpus([{"text": "words"}]),
    "no record has any token in input_ids; give documents": lambda: as_corpus([{"input_ids": []}]),
}


@pytest.mark.parametrize("message", ERRORS)
def test_what_is_wrong_is_said_in_one_line(message: str) -> None:
    with pytest.raises(LongMemError) as raised:
        ERRORS[message]()
    assert message in str(raised.value) and "\n" not in str(raised.value)
