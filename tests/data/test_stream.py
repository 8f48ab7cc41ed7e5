"""``SegmentStream`` and ``WindowSampler``: what rows are fed; and what cannot be read, tokenised or dealt out."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longmem.data.facts import told_session
from longmem.data.stream import IGNORE, SegmentStream, WindowSampler
from longmem.data.tokens import TokenCorpus, as_corpus, load_tokenizer, train_tokenizer
from longmem.errors import CheckpointError, LongMemError


def corpus_of(*lengths: int) -> TokenCorpus:
    """Documents of these lengths; document d's token t is ``1000 * d + t``."""
    ids = np.concatenate([1000 * d + np.arange(length) for d, length in enumerate(lengths)]).astype(np.uint16)
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenCorpus(ids, bounds, tuple(f"doc{d}" for d in range(len(lengths))), str(lengths))


def steps(stream: SegmentStream, count: int) -> list[list[list[int]]]:
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
    assert [batch.mask is None for batch in seen] == [True, True, False]
    assert seen[2].mask is not None
    assert seen[2].mask.tolist()[1] == [True, True, True, False]
    # the next tokens, also across the segment's end, and never beyond the document
    assert seen[0].targets.tolist() == [[1, 2, 3, 4], [1001, 1002, 1003, 1004]]
    assert seen[2].targets[1].tolist() == [2005, 2006, IGNORE, IGNORE]


def test_every_token_but_the_first_of_each_document_is_a_target_once_in_a_pass() -> None:
    corpus = corpus_of(13, 9, 30, 22, 8, 17)
    stream = SegmentStream(corpus, window=4, rows=1, seed=5)
    seen: list[int] = []
    while stream.taken <= len(stream.pieces):
        targets = stream.next().targets
        seen += targets[targets != IGNORE].tolist()
    expected = [1000 * d + t for d, n in enumerate((13, 9, 30, 22, 8, 17)) for t in range(1, n)]
    assert sorted(seen) == expected


def test_long_documents_can_be_dealt_out_in_pieces() -> None:
    stream = SegmentStream(corpus_of(40, 10), window=4, rows=1, seed=None, piece_tokens=10)
    assert [(piece.name, piece.offset, piece.last - piece.first) for piece in stream.pieces] == [
        *((f"doc0@{offset}", offset, 10) for offset in (0, 10, 20, 30)), ("doc1", 0, 10)
    ]  # fmt: skip


def test_two_processes_read_what_one_with_all_rows_reads() -> None:
    corpus = corpus_of(13, 9, 30, 22, 8, 17)
    whole = steps(SegmentStream(corpus, window=4, rows=4, seed=3), 10)
    parts = [steps(SegmentStream(corpus, window=4, rows=2, seed=3, rank=rank, world=2), 10) for rank in range(2)]
    assert [first + second for first, second in zip(*parts, strict=True)] == whole


def test_the_position_in_other_text_is_refused() -> None:
    state = SegmentStream(corpus_of(13, 9), window=4, rows=2, seed=3).state_dict()
    with pytest.raises(CheckpointError, match="resume with the data and tokenizer that the run began with"):
        SegmentStream(corpus_of(13, 9, 5), window=4, rows=2, seed=3).load_state_dict(state)
    with pytest.raises(CheckpointError, match="in other text"):
        WindowSampler(corpus_of(901), window=10, rows=2).load_state_dict(state)


# WindowSampler


def test_a_pass_shows_every_window_once_in_random_order() -> None:
    sampler = WindowSampler(corpus_of(900), window=10, rows=1, seed=1)
    starts = [int(sampler.next().ids[0, 0]) for _ in range(sampler.per_pass)]
    assert starts != sorted(starts)
    assert set(np.diff(sorted(starts)).tolist()) == {10}


def test_windows_are_a_function_of_seed_and_position() -> None:
    make = lambda seed: WindowSampler(corpus_of(900), window=10, rows=2, seed=seed, repeat_fraction=0.5)  # noqa: E731
    first, other, resumed = make(1), make(2), make(1)
    batches = [first.next().ids.tolist() for _ in range(60)]
    assert batches != [other.next().ids.tolist() for _ in range(60)]
    resumed.load_state_dict({**first.state_dict(), "position": 40})
    assert [resumed.next().ids.tolist() for _ in range(40)] == batches[20:]


def test_practice_rows_hold_a_passage_twice_and_do_not_score_what_cannot_be_foreseen() -> None:
    sampler = WindowSampler(corpus_of(900), window=32, rows=1, seed=1, repeat_fraction=1.0, repeat_random=0.0)
    for _ in range(50):
        batch = sampler.next()
        ids, targets = batch.ids[0].tolist(), batch.targets[0]
        hidden = (targets == IGNORE).nonzero().flatten().tolist()
        assert bool(batch.practice.all())
        assert 1 <= len(hidden) <= 2
        # tokens of this corpus differ, so whatever occurs twice is the passage
        again = hidden[0] + 1
        assert again >= 32 or ids[again] in ids[:again]


def test_random_rows_score_the_repetition_only() -> None:
    sampler = WindowSampler(
        corpus_of(900), window=32, rows=1, seed=1, repeat_fraction=1.0, repeat_random=1.0, special_ids=3, vocab_size=50
    )
    for _ in range(50):
        batch = sampler.next()
        assert 3 <= int(batch.ids.min()) <= int(batch.ids.max()) < 50
        scored = (batch.targets[0] != IGNORE).nonzero().flatten().tolist()
        assert scored == list(range(scored[0], scored[-1] + 1)) if scored else True
        assert len(scored) <= 16


# in one line

ERRORS: dict[str, Callable[[Path], Any]] = {
    "data.vocab_size (100) must be at least 259": lambda folder: train_tokenizer(["text"], 100),
    "no tokenizer (": load_tokenizer,
    "facts of a session (22) must be 1 to 21": lambda folder: told_session(random.Random(0), 22, held_out=True),
    "10 tokens, too few for 4 rows": lambda folder: SegmentStream(corpus_of(10), 8, 4),
    "20 tokens, which is less than two windows of data.window (16)": lambda folder: WindowSampler(corpus_of(20), 16, 1),
    "record 0 has no input_ids (it has text); tokenise": lambda folder: as_corpus([{"text": "words"}]),
    "no record has any token in input_ids; give documents": lambda folder: as_corpus([{"input_ids": []}]),
}


@pytest.mark.parametrize("message", ERRORS)
def test_what_is_wrong_is_said_in_one_line(message: str, tmp_path: Path) -> None:
    with pytest.raises(LongMemError) as raised:
        ERRORS[message](tmp_path)
    assert message in str(raised.value) and "\n" not in str(raised.value)
