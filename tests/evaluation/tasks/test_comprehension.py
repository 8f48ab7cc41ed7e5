"""ChapterBreak: prefixes and suffixes as they are cut, and accuracies worked by hand. SQuAD: prompts and scores."""

from pathlib import Path
from typing import Any

import pytest

from longmem.errors import ConfigError, DataError
from longmem.evaluation.asking import Answer, Asker, Prompt, Scored
from longmem.evaluation.tasks.comprehension import ChapterBreakTask, SquadTask, f1_score, normalise_answer

HOME = Path(__file__).with_name("home")


def chapters(*prefixes: int) -> ChapterBreakTask:
    return ChapterBreakTask(data=str(HOME / "chapters_ctx_300.json"), prefixes=prefixes, suffix_tokens=10)


def test_accuracy_of_scores_worked_by_hand() -> None:
    task, prompt = chapters(20), Prompt(((1,),), ((1,) * 4, (1,) * 2, (1,) * 8, (1,), (1,), (1,)))
    for logprobs, summed, each in (
        # per token: -1, -1.5, -0.375, -9, -9, -9: summed the second wins, per token the third
        ((-4.0, -3.0, -3.0, -9.0, -9.0, -9.0), 0, 0),
        # per token: -1, -2, -0.625: summed the first wins
        ((-4.0, -4.5, -5.0, -9.0, -9.0, -9.0), 100, 0),
        # the published script calls an example right unless a negative scores more
        ((-4.0, -4.0, -8.0, -9.0, -9.0, -9.0), 100, 100),
    ):
        found = task.measure(task.examples()[0], prompt, Answer((Scored(logprobs, (False,) * 6, 0),)))
        assert found == {"accuracy": summed, "accuracy_per_token": each, "gold_nats": 1.0}


def test_a_prefix_that_the_file_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--prefix 301 is longer than the prefixes of chapters_ctx_300.json"):
        chapters(20, 301)


# SQuAD


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ("train.json", r"train.json: 1 demonstrations .* 200 in memory need 201 different ones, there are 15"),
        ("dev.json", "there are 0"),  # a passage that is asked about is not shown
    ],
)
def test_no_passage_is_shown_twice_and_none_that_is_asked(train: str, said: str, byte_tokenizer: Any) -> None:
    shots: dict[str, Any] = {"local_shots": 1, "memory_shots": (200,), "draws": 1}
    task = SquadTask(train=HOME / train, data=HOME / "dev.json", **shots, limit=None, max_answer_tokens=6)
    task.begin([Asker("backbone", "", {}, None, tokenizer=byte_tokenizer, window=2000)])
    with pytest.raises(DataError, match=said):
        task.examples()


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
