"""Exact match and F1 of answers as SQuAD v1.1 defines them (Rajpurkar et al. 2016, the published evaluate-v1.1.py)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, one space between words."""
    # punctuation goes first, as published: "a-ha" is one word, not the article and a word
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction is one of the answers after ``normalise_answer``, else 0.0.

    Raises:
        ValueError: no answers.
    """
    if not answers:
        raise ValueError("answers is empty; a prediction is compared with one answer or more")
    found = normalise_answer(prediction)
    return float(any(found == normalise_answer(answer) for answer in answers))


def f1_score(prediction: str, answers: Sequence[str]) -> float:
    """The best F1 (0 to 1) of the prediction's words against those of one of the answers, both normalised.

    Words count as often as they occur in both. Where they share no word F1 is 0, also if both are empty.

    Raises:
        ValueError: no answers.
    """
    if not answers:
        raise ValueError("answers is empty; a prediction is compared with one answer or more")
    return max(_f1(normalise_answer(prediction).split(), normalise_answer(answer).split()) for answer in answers)


def _f1(predicted: list[str], true: list[str]) -> float:
    shared = (Counter(predicted) & Counter(true)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(true)
    return 2 * precision * recall / (precision + recall)
