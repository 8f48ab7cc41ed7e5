"""Rules for answers, worked by hand."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longmem.errors import ConfigError
from longmem.evaluation.asking import Answer, Prompt, Scored
from longmem.evaluation.tasks.comprehension import ChapterBreakTask, f1_score
from longmem.evaluation.tasks.conversations import NOTHING, DialogueTask, Question, bleu, names, word_scores
from longmem.evaluation.tasks.hidden import answered
from longmem.evaluation.tasks.icl import calibrated, starts_label

HOME = Path(__file__).parents[1] / "home"


def dialogue(said: str, answer: str, category: int) -> float:
    offered = {"a": NOTHING, "b": answer} if category == 5 else None
    return word_scores(said, Question("0", "", "", "?", answer, category, offered), with_bleu=False)["f1"] / 100


def babi(said: str) -> bool:
    return answered(said, "Where is Ann?", "attic", ("attic", "cave", "Ann"))


@pytest.mark.parametrize(
    ("rule", "given", "expected"),
    [
        # as published: case, ASCII punctuation, English articles and white space do not count
        (f1_score, ("The Denver Broncos.", ["denver broncos"]), 1),
        (f1_score, ("  a  man,\tAN ape\nand THE theatre ", ["man ape and theatre"]), 1),
        (f1_score, ("A-ha", ["aha"]), 1),  # the hyphen goes before articles are looked for
        (f1_score, ("Café “Zürich”", ["café “zürich”"]), 1),
        (f1_score, ("Café “Zürich”", ["café zürich"]), 0.5),
        (f1_score, ("the", ["the"]), 0),  # no shared word is left
        (f1_score, ("Denver", ["Denver Broncos"]), 2 * 1 * 0.5 / 1.5),  # precision 1/1, recall 1/2
        (f1_score, ("in Denver in Colorado", ["in Colorado"]), 2 * 0.5 * 1 / 1.5),  # the second "in" has no partner
        (f1_score, ("cats and dogs", ["dogs", "cats and birds"]), 2 / 3),  # the better one: 2 of 3 and 2 of 3
        (dialogue, ("Came back in June!", "in June, 2023", 2), 4 / 7),  # 2 shared: P 2/4, R 2/3
        (dialogue, ("", "a dog", 4), 0),
        # of several answers: oslo is there (1), of "new york" half of the words (P 1, R 1/2: 2/3)
        (dialogue, ("York, Oslo", "Oslo, New York", 1), (1 + 2 / 3) / 2),
        # an open-domain answer ends before its reason
        (dialogue, ("No", "No; she cannot eat nuts", 3), 1),
        (dialogue, ("No", "No; she cannot eat nuts", 4), 2 / 6),
        # adversarial questions follow LoCoMo's rules: other letters are b
        *((dialogue, (said, "a dog", 5), 1) for said in ("a", "(A)", "No Information Available.", "is not mentioned")),
        *((dialogue, (said, "a dog", 5), 0) for said in ("b", "(b)", "x", "The dog is Ada's")),
        (names, ("in ROME.", "Rome"), True),
        (names, ("Romeo", "Rome"), False),
        (names, ("130", "30"), False),
        (babi, (" The Attic. Not the cave.",), True),
        (babi, ("Ann is in the attic",), True),
        (babi, ("the attic or the cave",), False),
        (babi, ("nowhere",), False),
        *((starts_label, (first, "positive"), True) for first in (" positive", " pos")),
        # a blank is empty once stripped, though every text begins with nothing
        *((starts_label, (first, "positive"), False) for first in ("", " ", " Positive", "positively", " neg")),
    ],
)
def test_an_answer_is_worth_what_its_rule_says(rule: Callable[..., float], given: tuple[Any], expected: float) -> None:
    assert rule(*given) == pytest.approx(expected)


def test_bleu_is_worked_by_hand_and_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # of the orders 1 to 4: 6/7, 5/6, 4/5, 3/4, whose product is 3/7; two words have no more than two orders
    assert bleu("a cat sat on the mat today", "a cat sat on the mat") == pytest.approx(100 * (3 / 7) ** 0.25)
    assert bleu("a dog", "a dog") == 100 and bleu("", "a dog") == 0
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ConfigError, match="longmem-lm\\[eval\\]"):
        DialogueTask(data=[])


def test_calibration_divides_by_what_labels_get_for_nothing() -> None:
    # shares of two labels where there is nothing to judge: 0.8 to 0.2 and 0.6 to 0.4, on average 0.7 to 0.3
    free = [[math.log(0.08), math.log(0.02)], [math.log(0.3), math.log(0.2)]]
    found = calibrated([math.log(0.6), math.log(0.3)], free)
    assert [math.exp(value) for value in found] == pytest.approx([0.6 / 0.7, 0.3 / 0.3])
    assert calibrated([-1.0, -2.0], [[0.0, -2000.0]])[1] == pytest.approx(-2 - math.log(1e-300))


@pytest.mark.parametrize(
    ("logprobs", "summed", "each"),
    [
        # per token: -1, -1.5, -0.375, -9, -9, -9: summed the second wins, per token the third
        ((-4.0, -3.0, -3.0, -9.0, -9.0, -9.0), 0, 0),
        # per token: -1, -2, -0.625: summed the first wins
        ((-4.0, -4.5, -5.0, -9.0, -9.0, -9.0), 100, 0),
        # the published script calls an example right unless a negative scores more
        ((-4.0, -4.0, -8.0, -9.0, -9.0, -9.0), 100, 100),
    ],
)
def test_the_likeliest_beginning_of_a_chapter_wins(logprobs: tuple[float, ...], summed: int, each: int) -> None:
    task = ChapterBreakTask(data=str(HOME / "chapters_ctx_300.json"), prefixes=[20], suffix_tokens=10)
    prompt = Prompt(((1,),), ((1,) * 4, (1,) * 2, (1,) * 8, (1,), (1,), (1,)))
    found = task.measure(task.examples()[0], prompt, Answer((Scored(logprobs, (False,) * 6, 0),)))
    assert found == {"accuracy": summed, "accuracy_per_token": each, "gold_nats": 1.0}
    with pytest.raises(ConfigError, match=r"--prefix 301 is longer than the prefixes of chapters_ctx_300.json"):
        ChapterBreakTask(data=str(HOME / "chapters_ctx_300.json"), prefixes=[20, 301], suffix_tokens=10)
