"""ChapterBreak: files as they are read, prefixes and suffixes as they are cut, and accuracies worked by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longmem.errors import ConfigError
from longmem.evaluation.asking import Answer, Asker, Prompt, Scored
from longmem.evaluation.tasks.chapterbreak import ChapterBreakTask, files_for, read_chapterbreak

Write = Callable[..., Path]
ASKER = Asker("backbone", "backbone", {}, None, None, 16)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write(name, works)``: a file of the official form; two examples of each work."""

    def make(name: str = "chapterbreak_ctx_64.json", works: int = 2) -> Path:
        examples = [
            {
                "ctx": f"{'so it ended. ' * 8}{n}\n",
                "pos": f"The {n}th day.",
                "negs": [f"Then {k} came." for k in "abcde"],
            }
            for n in range(2)
        ]
        splits = {split: {f"{split}{w}": examples for w in range(works)} for split in ("pg19", "ao3")}
        (tmp_path / name).write_text(json.dumps(splits))
        return tmp_path / name

    return make


def task(tokenizer: Any, *files: Path, **settings: Any) -> ChapterBreakTask:
    wanted: dict[str, Any] = {"prefixes": (20, 60), "suffix_tokens": 10} | settings
    return ChapterBreakTask([read_chapterbreak(file) for file in files], tokenizer, **wanted)


def test_accuracy_of_scores_worked_by_hand(write: Write, byte_tokenizer: Any) -> None:
    made = task(byte_tokenizer, write())
    prompt = Prompt(((1,),), ((1,) * 4, (1,) * 2, (1,) * 8, (1,), (1,), (1,)))
    for logprobs, summed, each in (
        # per token: -1, -1.5, -0.375, -9, -9, -9: summed the second wins, per token the third
        ((-4.0, -3.0, -3.0, -9.0, -9.0, -9.0), 0, 0),
        # per token: -1, -2, -0.625: summed the first wins
        ((-4.0, -4.5, -5.0, -9.0, -9.0, -9.0), 100, 0),
        # the published script calls an example right unless a negative scores more
        ((-4.0, -4.0, -8.0, -9.0, -9.0, -9.0), 100, 100),
    ):
        answer = Answer((Scored(logprobs, (False,) * 6, 0),))
        found = made.measure(made.examples()[0], prompt, answer)
        assert found == {"accuracy": summed, "accuracy_per_token": each, "gold_nats": 1.0}


def test_for_a_prefix_the_shortest_file_that_is_long_enough_is_taken(write: Write) -> None:
    files = [read_chapterbreak(write(f"chapterbreak_ctx_{n}.json")) for n in (128, 64, 512)]
    assert [file.prefix for length in (10, 64, 65, 512) for file in files_for(files, length)] == [64, 64, 128, 512]
    with pytest.raises(ConfigError, match=r"--prefix 513 is longer than the prefixes of the files \(512 tokens"):
        files_for(files, 513)
    unnamed = read_chapterbreak(write("mine.json"))
    assert files_for([unnamed], 9000) == [unnamed]


def test_prefixes_lose_their_left_end_and_suffixes_their_right(write: Write, byte_tokenizer: Any) -> None:
    made = task(byte_tokenizer, write())
    for example in [example for example in made.examples() if example.unit == "ao3/ao30"]:
        prompt, (prefix, item) = made.prompt(example, ASKER), example.item
        text = f"{'so it ended. ' * 8}{item.number}\n\n"
        assert byte_tokenizer.decode(prompt.contexts[0]) == text[-prefix:]
        decoded = [byte_tokenizer.decode(option) for option in prompt.options]
        assert decoded == [f"The {item.number}th da", *(f"Then {k} cam" for k in "abcde")]
