"""Facts that are hidden in text."""

from __future__ import annotations

import numpy as np
import pytest

from longmem.data.facts import KINDS, OPTIONS, draw_facts


@pytest.mark.parametrize("kind", KINDS)
def test_question_and_true_answer_are_said_by_the_facts_and_no_wrong_answer_is(kind: str) -> None:
    for seed in range(30):
        facts = draw_facts(kind, np.random.default_rng(seed))
        assert len(set(facts.options)) == OPTIONS
        cue, said = facts.question.strip(), "".join(facts.asked)
        for sentence in facts.answer.split(". "):
            assert sentence.strip() in said
        assert cue + facts.answer.split(".")[0] in said
        assert not any(option.split()[-1] in said for option in facts.options[1:])


def test_facts_are_the_same_for_the_same_seed() -> None:
    assert draw_facts("multi", np.random.default_rng(4)) == draw_facts("multi", np.random.default_rng(4))
    assert draw_facts("multi", np.random.default_rng(4)) != draw_facts("multi", np.random.default_rng(5))
