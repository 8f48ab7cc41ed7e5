"""ChapterBreak: prefixes and suffixes as they are cut, and accuracies worked by hand. SQuAD: prompts and scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longmem.errors import ConfigError, DataError
from longmem.evaluation.asking import Answer, Asker, Prompt, Scored
from longmem.evaluation.tasks.comprehension import ChapterBreakTask, SquadTask, f1_score, normalise_answer


@pytest.fixture
def chapters(byte_tokenizer: Any, tmp_path: Path) -> ChapterBreakTask:
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


def test_accuracy_of_scores_worked_by_hand(chapters: ChapterBreakTask) -> None:
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
        found = chapters.measure(chapters.examples()[0], prompt, answer)
        assert found == {"accuracy": summed, "accuracy_per_token": each, "gold_nats": 1.0}


def test_prefixes_lose_their_left_end_and_suffixes_their_right(chapters: ChapterBreakTask) -> None:
    decode = chapters.tokenizer.decode
    for example in [example for example in chapters.examples() if example.unit == "ao3/ao30"]:
        prompt, (prefix, item) = chapters.prompt(example, None), example.item  # type: ignore[arg-type]
        assert decode(prompt.contexts[0]) == f"{'so it ended. ' * 8}{item.number}\n\n"[-prefix:]
        decoded = [decode(option) for option in prompt.options]
        assert decoded == [f"The {item.number}th da", *(f"Then {k} cam" for k in "abcde")]
    with pytest.raises(ConfigError, match=r"--prefix 65 is longer than the prefixes of chapterbreak_ctx_64.json"):
        ChapterBreakTask(data=chapters.data, prefixes=(20, 65), suffix_tokens=10)


# SQuAD


def test_demonstrations_show_no_passage_twice_and_none_that_is_asked(byte_tokenizer: Any) -> None:
    train, dev = (Path(__file__).with_name("home") / name for name in ("train.json", "dev.json"))

    def task(train: Path) -> SquadTask:
        shots: dict[str, Any] = {"local_shots": 1, "memory_shots": (0, 4), "draws": 2}
        made = SquadTask(train=train, data=dev, **shots, limit=None, max_answer_tokens=6)
        made.begin([Asker("memory_200", "", {}, None, 200, tokenizer=byte_tokenizer, window=2000)])
        return made

    made = task(train)
    passages = {question.passage for question in made.shown.items}
    assert len(passages) == 15 and not passages & {question.passage for question in made.asked.items}
    for seed in made.seeds:
        local, memory = made.shots(seed, 4)
        texts = [str(byte_tokenizer.decode(ids)) for ids in (*local, *memory)]
        shown = {text.splitlines()[0].removeprefix("Context: ") for text in texts}
        assert len(shown) == 5 and shown <= passages and all(text.endswith("\n\n") for text in texts)
        assert made.shots(seed, 0)[0] == local
    with pytest.raises(DataError, match=r"train.json: 1 demonstrations .* there are 15"):
        made.shots(1, 200)
    with pytest.raises(DataError, match=r"dev.json: 1 demonstrations .* there are 0"):
        task(dev).examples()


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        # as published: case, ASCII punctuation, English articles and white space do not count
        ("The Denver Broncos.", ["denver broncos"], 1.0),
        ("  a  man,\tAN ape\nand THE theatre ", ["man ape and theatre"], 1.0),
        ("A-ha", ["aha"], 1.0),  # the hyphen goes before articles are looked for
        ("Café “Zürich”", ["café “zürich”"], 1.0),
        ("Café “Zürich”", ["café zürich"], 0.5),
        ("the", ["the"], 0.0),  # no shared word is left
        ("Denver", ["Denver Broncos"], 2 * 1 * 0.5 / 1.5),  # precision 1/1, recall 1/2
        ("in Denver in Colorado", ["in Colorado"], 2 * 0.5 * 1 / 1.5),  # 2 of 4 words, the second "in" has no partner
        ("cats and dogs", ["dogs", "cats and birds"], 2 / 3),  # the better one: 2 of 3 and 2 of 3
        ("red", ["blue"], 0.0),
    ],
)
def test_f1_counts_shared_words_and_takes_the_best_answer(prediction: str, answers: list[str], expected: float) -> None:
    assert f1_score(prediction, answers) == pytest.approx(expected)
    exact = normalise_answer(prediction) in map(normalise_answer, answers)
    assert exact == (expected == 1 or prediction == "the")
