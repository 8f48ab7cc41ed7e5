"""ChapterBreak: prefixes and suffixes as they are cut, and accuracies worked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longmem.errors import ConfigError
from longmem.evaluation.asking import Answer, Asker, Prompt, Scored
from longmem.evaluation.tasks.chapterbreak import ChapterBreakTask


@pytest.fixture
def task(byte_tokenizer: Any, tmp_path: Path) -> ChapterBreakTask:
    """A file of the official form; two examples of each work."""
    examples = [
        {"ctx": f"{'so it ended. ' * 8}{n}\n", "pos": f"The {n}th day.", "negs": [f"Then {k} came." for k in "abcde"]}
        for n in range(2)
    ]
    path = tmp_path / "chapterbreak_ctx_64.json"
    path.write_text(json.dumps({split: {f"{split}{w}": examples for w in (0, 1)} for split in ("pg19", "ao3")}))
    made = ChapterBreakTask(data=path, prefixes=(20, 60), suffix_tokens=10)
    made.begin([Asker("backbone", "backbone", {}, None, tokenizer=byte_tokenizer, window=16)])
    return made


def test_accuracy_of_scores_worked_by_hand(task: ChapterBreakTask) -> None:
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
        found = task.measure(task.examples()[0], prompt, answer)
        assert found == {"accuracy": summed, "accuracy_per_token": each, "gold_nats": 1.0}


def test_prefixes_lose_their_left_end_and_suffixes_their_right(task: ChapterBreakTask) -> None:
    decode = task.tokenizer.decode
    for example in [example for example in task.examples() if example.unit == "ao3/ao30"]:
        prompt, (prefix, item) = task.prompt(example, None), example.item  # type: ignore[arg-type]
        assert decode(prompt.contexts[0]) == f"{'so it ended. ' * 8}{item.number}\n\n"[-prefix:]
        decoded = [decode(option) for option in prompt.options]
        assert decoded == [f"The {item.number}th da", *(f"Then {k} cam" for k in "abcde")]
    with pytest.raises(ConfigError, match=r"--prefix 65 is longer than the prefixes of chapterbreak_ctx_64.json"):
        ChapterBreakTask(data=task.data, prefixes=(20, 65))
