"""What cannot be read, tokenised or dealt out, each in one line."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.data.test_stream import corpus_of

from longmem.data.facts import draw_facts, told_session
from longmem.data.stream import SegmentStream, WindowSampler
from longmem.data.tokens import as_corpus, load_tokenizer, train_tokenizer
from longmem.errors import LongMemError

ERRORS: dict[str, Callable[[Path], Any]] = {
    "data.vocab_size (100) must be at least 259": lambda folder: train_tokenizer(["text"], 100),
    "no tokenizer (": load_tokenizer,
    "kind ('riddle') must be one of passkey, pair, multi, twohop": lambda folder: draw_facts(
        "riddle", np.random.default_rng(0)
    ),
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
