"""SQuAD's exact match and F1, against values worked by hand from the definitions in evaluate-v1.1.py."""

from __future__ import annotations

import pytest

from longmem.evaluation.tasks.squad_metrics import exact_match, f1_score, normalise_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Denver Broncos.", "denver broncos"),
        ("  a  man,\tAN ape\nand THE theatre ", "man ape and theatre"),
        ("the a an", ""),
        ("A-ha", "aha"),  # the hyphen goes before articles are looked for
        ("it's", "its"),
        ("1,000", "1000"),
        ("Café “Zürich”", "café “zürich”"),  # only ASCII punctuation is removed
        ("under_score", "underscore"),
        ("vitamin a", "vitamin"),
    ],
)
def test_answers_are_normalised_as_published(text: str, expected: str) -> None:
    assert normalise_answer(text) == expected


def test_exact_match_takes_any_of_the_answers() -> None:
    assert exact_match("the Santa Clara, California", ["Levi's Stadium", "Santa Clara California"]) == 1.0
    assert exact_match("Santa Clara", ["Levi's Stadium", "Santa Clara California"]) == 0.0
    assert exact_match("", ["the"]) == 1.0  # both are empty after normalisation


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Denver Broncos", ["The Denver Broncos"], 1.0),
        ("Denver", ["Denver Broncos"], 2 * 1 * 0.5 / 1.5),  # precision 1/1, recall 1/2
        ("in Denver in Colorado", ["in Colorado"], 2 * 0.5 * 1 / 1.5),  # 2 of 4 words, the second "in" has no partner
        ("cats and dogs", ["dogs", "cats and birds"], 2 / 3),  # the better one: 2 of 3 and 2 of 3
        ("red", ["blue"], 0.0),
        ("the", ["the"], 0.0),  # no shared word is left: 0, as published
    ],
)
def test_f1_counts_shared_words_and_takes_the_best_answer(prediction: str, answers: list[str], expected: float) -> None:
    assert f1_score(prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize("metric", [exact_match, f1_score])
def test_a_question_without_answers_is_refused(metric: object) -> None:
    assert callable(metric)
    with pytest.raises(ValueError, match="answers is empty"):
        metric("Denver", [])
